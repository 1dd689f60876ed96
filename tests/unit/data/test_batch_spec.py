"""Stored columns become tensors: dtypes, shapes, weights, transforms, and errors."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import raykeras as rk
from raykeras.data.decode import decode
from raykeras.data.resolve import resolve
from raykeras.data.sources.base import Field


def tensors(tmp_path: Path, columns: dict[str, Any], class_weight: Any = None, **specs: Any) -> tuple[Any, ...]:
    """Return one batch of all rows of a source with these columns."""
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    source = rk.parquet(tmp_path / "t.parquet", **specs)
    opened = source.open()
    batch_spec = resolve(source, opened, class_weight=class_weight)
    decoded = batch_spec.decode(opened.head(1 << 20, batch_spec.columns), "here")
    flat = batch_spec.assemble(batch_spec.apply_transform(decoded, (0,), "here"), "here")
    return batch_spec.structure(batch_spec.unpack(batch_spec.pack(flat)))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "bool"])
def test_integers_and_bools_keep_dtype(tmp_path: Path, dtype: str) -> None:
    values = np.array([0, 1, 1, 0], dtype)
    (x,) = tensors(tmp_path, {"a": values}, x="a")
    assert x.dtype == dtype
    np.testing.assert_array_equal(x, values)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_floats_become_floatx(tmp_path: Path, dtype: str) -> None:
    values = np.array([0.5, -1.25, 3], dtype)
    (x,) = tensors(tmp_path, {"a": values}, x="a")
    assert x.dtype == "float32"
    np.testing.assert_array_equal(x, values.astype("float32"))


def test_tensors_and_fixed_size_lists_keep_shape(tmp_path: Path) -> None:
    images = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    nested = pa.FixedSizeListArray.from_arrays(pa.FixedSizeListArray.from_arrays(pa.array(images.ravel()), 4), 3)
    columns = {"tensor": pa.FixedShapeTensorArray.from_numpy_ndarray(images), "nested": nested}
    (x,) = tensors(tmp_path, columns, x={"t": "tensor", "n": "nested"})
    np.testing.assert_array_equal(x["t"], images)
    np.testing.assert_array_equal(x["n"], images)


def test_lists_of_equal_length_are_tensors(tmp_path: Path) -> None:
    (x,) = tensors(tmp_path, {"a": pa.array([[1, 2, 3], [4, 5, 6]])}, x="a")
    np.testing.assert_array_equal(x, [[1, 2, 3], [4, 5, 6]])


def test_columns_are_stacked_into_matrix(tmp_path: Path) -> None:
    columns = {"a": np.array([1, 2], np.int32), "b": np.array([0.5, 1.5]), "c": np.array([True, False])}
    (x,) = tensors(tmp_path, columns, x=["a", "b", "c"])
    assert x.dtype == "float32"
    np.testing.assert_array_equal(x, [[1, 0.5, 1], [2, 1.5, 0]])


def test_many_rows_are_stacked(tmp_path: Path) -> None:
    a, b = np.arange(200_003) * 2**33 + 1, np.arange(200_003, dtype=np.float32)  # not a multiple of the tile size
    (x,) = tensors(tmp_path, {"a": a, "b": b}, x=["a", "b"])
    np.testing.assert_array_equal(x, np.stack([a.astype(np.float32), b], 1))


def test_many_columns_are_stacked(tmp_path: Path) -> None:
    columns = {f"c{i}": np.arange(7) * i for i in range(600)}
    (x,) = tensors(tmp_path, columns, x=list(columns))
    np.testing.assert_array_equal(x, np.stack(list(columns.values()), 1).astype(np.float32))


def test_strings_and_dictionary_strings_become_bytes(tmp_path: Path) -> None:
    text = pa.array(["ä", "b", "ä"])
    (x,) = tensors(tmp_path, {"s": text, "d": text.dictionary_encode()}, x={"s": "s", "d": "d"})
    assert x["s"].to_pylist() == x["d"].to_pylist() == ["ä".encode(), b"b", "ä".encode()]


def test_lists_are_padded_and_truncated(tmp_path: Path) -> None:
    (x,) = tensors(tmp_path, {"a": pa.array([[1], [], [2, 3, 4]])}, x="a", pad={"a": (2, -1)})
    np.testing.assert_array_equal(x, [[1, -1], [-1, -1], [2, 3]])


def test_ragged_lists_keep_lengths(tmp_path: Path) -> None:
    (x,) = tensors(tmp_path, {"a": pa.array([[1.0], [], [2, 3, 4]])}, x="a", ragged=["a"])
    assert x.to_pylist() == [[1.0], [], [2, 3, 4]]


def test_fill_replaces_nulls(tmp_path: Path) -> None:
    rows = pa.array([[1.0, 2.0], None, [None, 4.0]], pa.list_(pa.float64(), 2))
    columns = {"a": pa.array([1, None, 3]), "l": rows}
    (x,) = tensors(tmp_path, columns, x={"a": "a", "l": "l"}, fill={"a": -1, "l": 9.0})
    np.testing.assert_array_equal(x["a"], [1, -1, 3])
    np.testing.assert_array_equal(x["l"], [[1, 2], [9, 9], [9, 4]])


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        (pa.array([1, None], pa.uint8()), -1, "column 'a' contains uint8; got -1."),
        (pa.array([1, None]), 0.5, "column 'a' contains int64; got 0.5."),
        (pa.array([1.0, None]), "?", "column 'a' contains double; got '?'."),
        (pa.array(["b", None]), 0, "column 'a' contains string; got 0."),
        (pa.array([[1, 2], None], pa.list_(pa.int8(), 2)), 300, "column 'a' contains int8; got 300."),
    ],
    ids=lambda value: str(getattr(value, "type", "")),
)
def test_fill_of_another_type_is_refused(tmp_path: Path, column: pa.Array, value: Any, message: str) -> None:
    with pytest.raises(rk.ColumnError, match=re.escape(message)):
        tensors(tmp_path, {"a": column}, x="a", fill={"a": value})


def test_null_without_statistics_is_found_on_read(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": pa.array([1.0, None])}), tmp_path / "t.parquet", write_statistics=False)
    source = rk.parquet(tmp_path / "t.parquet", x="a")
    opened = source.open()
    batch_spec = resolve(source, opened)
    with pytest.raises(rk.ColumnError, match="column 'a' has 1 in file f, row group 0"):
        batch_spec.decode(opened.head(2, ["a"]), "file f, row group 0")


def test_class_weight_multiplies_with_sample_weight(tmp_path: Path) -> None:
    columns = {"a": np.zeros(3), "y": np.array([0, 1, 2]), "w": np.array([1.0, 2.0, 3.0])}
    *_, w = tensors(tmp_path, columns, x="a", y="y", sample_weight="w", class_weight={1: 10.0, 2: 0.5})
    np.testing.assert_array_equal(w, np.array([1, 20, 1.5], np.float32))
    *_, w = tensors(tmp_path, columns, x="a", y="y", class_weight={1: 10.0})
    np.testing.assert_array_equal(w, np.array([1, 10, 1], np.float32))


def test_class_weight_applies_to_named_output(tmp_path: Path) -> None:
    columns = {"a": np.zeros(2), "p": np.array([0, 1]), "q": np.array([0.5, 0.7])}
    *_, w = tensors(tmp_path, columns, x="a", y={"p": "p", "q": "q"}, class_weight={"p": {1: 3.0}})
    np.testing.assert_array_equal(w["p"], [1, 3])
    np.testing.assert_array_equal(w["q"], [1, 1])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_must_be_finite(tmp_path: Path, bad: float) -> None:
    columns = {"a": np.zeros(3), "w": np.array([1.0, -2.0, 0.0])}
    *_, w = tensors(tmp_path, columns, x="a", y="a", sample_weight="w")
    np.testing.assert_array_equal(w, [1, -2, 0])
    columns["w"][1] = bad
    with pytest.raises(rk.ColumnError, match=rf"'w' holds {bad} at row 1 of here"):
        tensors(tmp_path, columns, x="a", y="a", sample_weight="w")


def test_transform_may_take_random_generator(tmp_path: Path) -> None:
    def plain(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"z": columns["a"] * 2}

    def noisy(columns: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
        return {"z": columns["a"] + rng.random(len(columns["a"]))}

    columns = {"a": np.arange(3.0)}
    (x,) = tensors(tmp_path, columns, x="z", transform=plain)
    np.testing.assert_array_equal(x, [0, 2, 4])
    once, again = (tensors(tmp_path, columns, x="z", transform=noisy)[0] for _ in range(2))
    np.testing.assert_array_equal(once, again)
    assert (once != [0, 1, 2]).all()


def test_transform_receives_bytes(tmp_path: Path) -> None:
    def decode_all(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"pixels": np.stack([np.frombuffer(data, np.uint8) for data in columns["png"]])}

    (x,) = tensors(tmp_path, {"png": pa.array([b"\x01\x02", b"\x03\x04"])}, x="pixels", transform=decode_all)
    np.testing.assert_array_equal(x, [[1, 2], [3, 4]])


def test_transform_errors_are_reported(tmp_path: Path) -> None:
    def fails(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        raise KeyError("colour")

    with pytest.raises(rk.UserCodeError, match="raised KeyError") as caught:
        tensors(tmp_path, {"a": np.zeros(3)}, x="a", transform=fails)
    assert "test_batch_spec.py" in caught.value.user_traceback
    with pytest.raises(rk.ColumnError, match="got 3 and returned 2"):
        tensors(tmp_path, {"a": np.zeros(3)}, x="a", transform=lambda c: {"a": c["a"][1:]})


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ({"x": []}, "at least one column"),
        ({"x": ["a", "s"]}, r"stacks 's', which is text"),
        ({"x": "a", "sample_weight": "s"}, "Weights must be numbers"),
        ({"x": "a", "y": {"p": "a"}, "sample_weight": {"q": "a"}}, r"got 'q'.*Outputs: p"),
        ({"x": None}, "must name the columns of x"),
        ({"x": "a", "pad": {"a": 3}}, "`pad` is for list columns"),
    ],
)
def test_invalid_specs_are_refused(tmp_path: Path, specs: dict[str, Any], message: str) -> None:
    with pytest.raises(rk.ValidationError, match=message):
        tensors(tmp_path, {"a": np.zeros(2), "s": pa.array(["p", "q"])}, **specs)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    hnp.arrays(
        st.sampled_from([np.float32, np.int16, np.bool_]),
        hnp.array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=5),
        elements={"allow_nan": False, "allow_infinity": False},
    )
)
def test_decode_round_trip(tmp_path: Path, array: np.ndarray) -> None:
    flat = pa.array(array.reshape(-1))
    column = flat if array.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, int(np.prod(array.shape[1:])))
    field = Field("a", "dense", array.dtype.name, array.shape[1:])
    np.testing.assert_array_equal(decode(column, field, where="", pad={}, fill={}), array)
