"""Which columns are suggested as x, y and sample_weight."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import raykeras as rk
from raykeras.data.inspection import Inspection, inspect_source
from raykeras.data.resolve import resolve
from raykeras.data.suggestion import suggest

NUM_ROWS = 60


@pytest.fixture
def found(tmp_path: Path) -> Inspection:
    rows = np.arange(NUM_ROWS)
    images = np.zeros((NUM_ROWS, 4, 4), np.uint8)
    table = pa.table(
        {
            "user_id": rows + 1000,
            "age": pa.array(rows % 7, mask=rows == 3),
            "income": rows / 2,
            "city": pa.array(np.array(["b", "a"])[rows % 2], mask=rows == 5),
            "comment": [f"text {i}" for i in rows],
            "image": pa.FixedShapeTensorArray.from_numpy_ndarray(images),
            "clicks": [list(range(i % 4)) for i in rows],
            "file": [b"raw"] * NUM_ROWS,
            "when": pa.array(range(NUM_ROWS), pa.date32()),
            "label": rows % 3,
            "weight": np.ones(NUM_ROWS),
            "month": rows % 12,
        }
    )
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=10)
    return inspect_source(rk.parquet(tmp_path / "a.parquet"))


def test_suggested_source_can_be_used(found: Inspection) -> None:
    suggested = suggest(found)
    assert suggested.arguments() == {
        "x": {"numbers": ["age", "income", "month"], "city": "city", "image": "image", "clicks": "clicks"},
        "y": "label",
        "sample_weight": "weight",
        "pad": {"clicks": 3},
        "fill": {"age": 3, "city": ""},
    }
    assert {name: suggested.inputs[name].kind for name in suggested.inputs} == {
        "numbers": "numbers",
        "city": "text",
        "image": "tensor",
        "clicks": "tensor",
    }
    assert set(suggested.left_out) == {"user_id", "comment", "file", "when"}
    source = rk.parquet(found.source.paths, **suggested.arguments())  # type: ignore[attr-defined]
    resolve(source, source.open())
    x, y, _ = source.batch(8)
    assert x["numbers"].shape == (8, 3) and x["clicks"].shape == (8, 3) and y.shape == (8,)


def test_chosen_columns_are_used(found: Inspection) -> None:
    chosen = suggest(found, x=["user_id", "month"], y="income", categories=["month"])
    assert chosen.arguments() == {
        "x": {"numbers": ["user_id"], "month": "month"},
        "y": "income",
        "sample_weight": "weight",
    }
    assert chosen.inputs["month"].kind == "categories"
    assert suggest(found, x=["image"]).x == "image"
    assert suggest(found, x=["age"]).x == ["age"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"x": ["when"]}, "'when' is not: it is date32"),
        ({"x": ["file"]}, "decode them in a transform"),
        ({"x": ["agee"]}, "Did you mean 'age'"),
        ({"y": "labl"}, "Did you mean 'label'"),
        ({"x": ["age"], "y": "age"}, "y must not be an input as well"),
        ({"x": ["income"], "categories": ["income"]}, "not a column of integers"),
    ],
)
def test_unsuitable_choices_are_refused(found: Inspection, options: dict[str, object], message: str) -> None:
    with pytest.raises(rk.ColumnError, match=message):
        suggest(found, **options)  # type: ignore[arg-type]


def test_y_is_the_last_column_if_no_name_says_so(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": [1, 2], "b": [1.0, 2.0], "c": [[1], [2]]}), tmp_path / "a.parquet")
    assert suggest(inspect_source(rk.parquet(tmp_path))).y == "b"
    pq.write_table(pa.table({"only": [1, 2]}), tmp_path / "a.parquet")
    alone = suggest(inspect_source(rk.parquet(tmp_path)))
    assert alone.y is None and alone.arguments() == {"x": ["only"]}


def test_input_names_are_valid_and_different(tmp_path: Path) -> None:
    names = ["a/b", "a b", "1st", "ü", "numbers", "n"]
    columns = {name: ["x", "y"] for name in names[:-1]} | {"n": [1, 2], "label": [0, 1]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    suggested = suggest(inspect_source(rk.parquet(tmp_path)))
    assert list(suggested.inputs) == ["numbers", "a_b", "a_b_2", "input_1st", "input", "numbers_2"]
