"""Decode stored columns, as readers return them, into the arrays that tensors are made of.

Columns of a fixed shape become NumPy arrays, without a copy where Arrow's format allows it; strings and ragged
lists stay Arrow arrays.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raykeras.core.errors import ColumnError
from raykeras.data.sources.base import Field


def decode(
    column: Any,
    field: Field,
    *,
    where: str,
    pad: Mapping[str, int | tuple[int, Any]],
    ragged: bool = False,
    fill: Mapping[str, Any],
) -> Any:
    """Decode a column.

    Args:
        column: NumPy array, Arrow array or Arrow chunked array.
        field: The column's type.
        where: The file and row group, for messages.
        pad: For list columns, the length or `(length, value)`, by name.
        ragged: Whether the lengths of lists may differ.
        fill: Replacements for nulls, by name.

    Returns:
        A NumPy array (rows, *shape); for strings an Arrow binary array; with `ragged` an Arrow list array.

    Raises:
        ColumnError: If there are nulls that `fill` does not replace, or lists of different lengths without `pad` or
            `ragged`.
    """
    if isinstance(column, np.ndarray):
        return _strings(column) if field.kind == "string" else column
    array = _combined(column) if isinstance(column, pa.ChunkedArray) else column
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    if field.kind == "string":
        return _without_nulls(array, field, where, fill).cast(pa.large_binary())
    if field.kind == "list":
        return _lists(array, field, where, pad, ragged, fill)
    if array.null_count and pa.types.is_fixed_size_list(array.type):
        return _filled_rows(array, field, where, fill)
    rows = len(array)
    while pa.types.is_fixed_size_list(array.type):
        array = array.flatten()
    return _to_numpy(_without_nulls(array, field, where, fill)).reshape(rows, *field.shape)


def _combined(column: pa.ChunkedArray) -> pa.Array:
    if column.num_chunks == 1:
        return column.chunk(0)  # combine_chunks() copies even a single chunk
    array = column.combine_chunks()
    return pa.concat_arrays(array.chunks) if isinstance(array, pa.ChunkedArray) else array


def for_transform(array: Any) -> np.ndarray:
    """Return a decoded column as a transform receives it: strings and lists become object arrays (rows,)."""
    if isinstance(array, np.ndarray):
        return array
    if pa.types.is_large_binary(array.type):
        return array.to_numpy(zero_copy_only=False)
    result = np.empty(len(array), object)
    result[:] = [_to_numpy(row.values) for row in array]
    return result


def from_transform(array: Any) -> Any:
    """Return an array of a transform as a decoded column: text and bytes become an Arrow binary array."""
    array = np.asarray(array)
    return _strings(array) if array.dtype.kind in "OSU" else array


def _strings(array: np.ndarray) -> pa.Array:
    values = [v.encode() if isinstance(v, str) else v for v in array.ravel().tolist()]
    return pa.array(values, pa.large_binary())


def _without_nulls(array: pa.Array, field: Field, where: str, fill: Mapping[str, Any]) -> pa.Array:
    if not array.null_count:
        return array
    if field.name not in fill:
        raise null_error(field.name, array.null_count, where)
    return pc.fill_null(array, _fill_value(field.name, array.type, fill))


def _fill_value(name: str, kind: pa.DataType, fill: Mapping[str, Any]) -> pa.Scalar:
    value = fill[name]
    with contextlib.suppress(pa.ArrowException, OverflowError):
        scalar = pa.scalar(value, kind)
        if not pa.types.is_integer(kind) or scalar.as_py() == value:  # Arrow truncates 0.5
            return scalar
    raise ColumnError(f"`fill` must have a value of the column's type; column {name!r} contains {kind}; got {value!r}.")


def null_error(name: str, count: int, where: str) -> ColumnError:
    """Return the error for nulls in a column that is used."""
    return ColumnError(
        f"x, y and sample_weight must not contain nulls; column {name!r} has {count:,} in {where}. "
        f"Pass `fill={{{name!r}: value}}`, or drop those rows."
    )


def _filled_rows(array: pa.Array, field: Field, where: str, fill: Mapping[str, Any]) -> np.ndarray:
    """Decode fixed-size lists in which whole rows are null; the stored values of such rows are undefined."""
    if field.name not in fill:
        raise null_error(field.name, array.null_count, where)
    valid = array.is_valid().to_numpy(zero_copy_only=False)
    kind = array.type
    while pa.types.is_fixed_size_list(kind):
        kind = kind.value_type
    result = np.full((len(array), *field.shape), _fill_value(field.name, kind, fill).as_py(), field.dtype)
    inner = array.filter(pa.array(valid))
    rows = len(inner)
    while pa.types.is_fixed_size_list(inner.type):
        inner = inner.flatten()
    result[valid] = _to_numpy(_without_nulls(inner, field, where, fill)).reshape(rows, *field.shape)
    return result


def _lists(
    array: pa.Array,
    field: Field,
    where: str,
    pad: Mapping[str, int | tuple[int, Any]],
    ragged: bool,
    fill: Mapping[str, Any],
) -> Any:
    if array.null_count:
        raise null_error(field.name, array.null_count, where)
    flat = _without_nulls(array.flatten(), field, where, fill)
    lengths = pc.list_value_length(array).to_numpy(zero_copy_only=False).astype(np.int64)
    splits = np.concatenate([[0], np.cumsum(lengths)])
    if ragged:
        return pa.LargeListArray.from_arrays(pa.array(splits), flat)
    values = _to_numpy(flat)
    if field.name in pad:
        option = pad[field.name]
        length, value = option if isinstance(option, tuple) else (option, 0)
        return _padded(values, splits, lengths, length, value)
    length = field.shape[0] if field.shape else (int(lengths[0]) if len(lengths) else 0)
    uneven = np.flatnonzero(lengths != length)
    if len(uneven):
        raise ColumnError(
            f"All rows of a tensor must have the same shape; column {field.name!r} has a list of "
            f"{lengths[uneven[0]]} values and others of {length} in {where}. Pass `pad={{{field.name!r}: length}}` or "
            f"`ragged=[{field.name!r}]`."
        )
    return values.reshape(len(lengths), length)


def _padded(values: np.ndarray, splits: np.ndarray, lengths: np.ndarray, length: int, value: Any) -> np.ndarray:
    """Truncate or pad lists at their end to (rows, length)."""
    result = np.full((len(lengths), length), value, values.dtype)
    column = np.arange(length)
    present = column < lengths[:, None]  # (rows, length)
    result[present] = values[(splits[:-1, None] + column)[present]]
    return result


def _to_numpy(array: pa.Array) -> np.ndarray:
    if pa.types.is_boolean(array.type):
        return array.cast(pa.uint8()).to_numpy().view(np.bool_)
    return array.to_numpy(zero_copy_only=False)
