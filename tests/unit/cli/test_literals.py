"""Values as Python code."""

from __future__ import annotations

import ast
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raykeras.cli.literals import literal

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner) | st.tuples(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner),
)


@given(VALUES, st.none() | st.integers(0, 100))
def test_code_evaluates_to_the_value(value: Any, indent: int | None) -> None:
    code = literal(value, indent=indent)
    assert ast.literal_eval(code) == value
    assert all(char.isprintable() or char == "\n" for char in code)
    if indent is None:
        assert "\n" not in code


@pytest.mark.parametrize(
    ("value", "code"),
    [
        ("a", '"a"'),
        ('say "a"', "'say \"a\"'"),
        ("it's", '"it\'s"'),
        ("\x1b[31m", '"\\x1b[31m"'),
        (1e20, "1e20"),
        ((1,), "(1,)"),
        ({"a": [1, 2]}, '{"a": [1, 2]}'),
    ],
)
def test_style(value: Any, code: str) -> None:
    assert literal(value) == code


def test_long_code_is_split() -> None:
    assert literal({"x": ["long name"] * 12}, indent=4) == "\n".join(
        ["{", '        "x": [', *['            "long name",'] * 12, "        ],", "    }"]
    )
