"""Configurations of runs and their differences."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raykeras.driver.record import parse_record
from raykeras.report.configuration import Difference, configuration, differences, flattened, text_of


def record(**changes: Any) -> dict[str, Any]:
    call = {
        "command": ["fit.py", "--name", "two words"],
        "arguments": {"epochs": 3, "class_weight": None, "scale": {"workers": 2}, "run": {"seed": 0}, **changes},
        "data": {"train": {"rows": 100, "columns": {"x": "float32 (8)"}}, "validation": None},
        "git": {"commit": "abc", "dirty": True},
        "model": "build",
        "nodes": [{"node": "head", "resources": {"CPU": 4.0}}],
    }
    model = {"class": "Sequential", "summary": "long", "optimizer": {"learning_rate": float(np.float32(0.001))}}
    return {"calls": [{"arguments": {"epochs": 1}}, call], "model": model}


def test_configuration_is_that_of_the_last_call_by_section() -> None:
    assert configuration(record()) == {
        "Arguments": {"epochs": "3", "class_weight": "None", "callbacks": "None"},
        "Scale": {"workers": "2"},
        "Run": {"seed": "0"},
        "Training data": {"rows": "100", "columns.x": "float32 (8)"},
        "Model": {"model": "build", "class": "Sequential"},
        "Optimizer": {"learning_rate": "0.001"},
        "Code and nodes": {
            "command": "fit.py --name 'two words'",
            "git.commit": "abc",
            "git.dirty": "True",
            "nodes.0.node": "head",
            "nodes.0.resources.CPU": "4.0",
        },
    }


def test_differences_are_those_values_that_are_not_the_same_in_all_runs() -> None:
    runs = [record(), record(epochs=5, scale={"workers": 2, "gpus_per_worker": 1})]
    assert differences([configuration(run) for run in runs]) == [
        Difference("Arguments", "epochs", ["3", "5"]),
        Difference("Scale", "gpus_per_worker", [None, "1"]),
    ]
    assert differences([configuration(record())] * 3) == []


def test_run_without_record_differs_in_everything() -> None:
    found = differences([configuration({}), configuration(record())])
    assert Difference("Scale", "workers", [None, "2"]) in found


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "None"),
        (True, "True"),
        ("a", "a"),
        (float(np.float32(0.1)), "0.1"),
        (0.1, "0.1"),
        (1e300, "1e+300"),
        ([1, "b"], "1, b"),
        ([], "[]"),
        (["dense", [8, 8], []], "dense, [8, 8], []"),
        ([{"a": 1}], "{a: 1}"),
    ],
)
def test_values_are_shown_as_in_python(value: Any, text: str) -> None:
    assert text_of(value) == text


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(), values, max_size=3),
    max_leaves=8,
)
NAMES = st.sampled_from(["arguments", "command", "data", "git", "versions", "callbacks", "nodes"])


@given(
    st.fixed_dictionaries(
        {}, optional={"calls": st.lists(st.dictionaries(NAMES, JSON), max_size=2) | JSON, "model": JSON}
    )
)
def test_any_record_is_accepted(values: dict[str, Any]) -> None:
    import json

    found = configuration(parse_record(json.dumps(values)))
    assert all(isinstance(text, str) for texts in found.values() for text in texts.values())


def test_nested_names_are_joined_by_dots() -> None:
    assert flattened({"a": {"b": 1, "c": {}}, "d": [2]}) == {"a.b": "1", "d": "2"}
