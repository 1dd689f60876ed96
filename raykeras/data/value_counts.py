"""How often each value of a column occurs, such as the classes to predict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raykeras.data.sources.base import OpenSource

_COUNTED_UNITS, _COUNTED_ROWS, _MAX_DISTINCT = 1000, 10_000_000, 100_000


@dataclass(frozen=True)
class ValueCounts:
    """How often each value of a column occurs.

    Attributes:
        column: The column.
        counts: Value to number of rows, most frequent first.
        num_nulls: Rows without a value.
        num_rows: Rows that were counted.
        is_complete: Whether all rows were counted.
        is_sorted: Whether the rows are in the order of their values, of which there are several.
    """

    column: str
    counts: Mapping[Any, int]
    num_nulls: int
    num_rows: int
    is_complete: bool
    is_sorted: bool


def count_values(opened: OpenSource, name: str) -> ValueCounts:
    """Count the values of a column of numbers or text.

    Counts all rows of sources of up to 1,000 units and 10,000,000 rows, and otherwise those of units that are spread
    over the source. Stops at 100,000 different values.

    Raises:
        SourceError: If the column cannot be read.
        ColumnError: If there is no such column.
    """
    opened.field(name)
    units = np.flatnonzero(opened.unit_rows)
    mean_rows = max(1, opened.num_rows // len(units))
    chosen = units[_spread(len(units), min(_COUNTED_UNITS, max(1, _COUNTED_ROWS // mean_rows)))]
    counts: dict[Any, int] = {}
    num_nulls = num_rows = 0
    is_sorted, last, num_counted = True, None, 0
    for index in chosen:
        rows = int(opened.unit_rows[index])
        column = opened.reader.read(opened.unit(int(index)), 0, rows, [name])[name]
        array = _one_array(column)
        num_rows, num_nulls, num_counted = num_rows + rows, num_nulls + array.null_count, num_counted + 1
        array = array.drop_null()
        for entry in pc.value_counts(array).to_pylist():
            counts[entry["values"]] = counts.get(entry["values"], 0) + entry["counts"]
        if is_sorted and len(array):
            is_sorted = _follows(last, array)
            last = array[-1].as_py()
        if len(counts) > _MAX_DISTINCT:
            break
    ordered = dict(sorted(counts.items(), key=lambda item: -item[1]))
    is_complete = num_counted == len(units)
    return ValueCounts(name, ordered, num_nulls, num_rows, is_complete, is_sorted and len(counts) > 1)


def _spread(num: int, max_num: int) -> np.ndarray:
    """Return up to `max_num` indices below `num`, evenly spaced: int64 (n,)."""
    return np.unique(np.linspace(0, num - 1, min(num, max_num)).astype(int))


def _one_array(column: Any) -> pa.Array:
    array = pa.array(column.tolist()) if isinstance(column, np.ndarray) else column
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(
            [chunk.dictionary_decode() if _is_dictionary(chunk) else chunk for chunk in array.chunks]
        )
    return array.dictionary_decode() if _is_dictionary(array) else array


def _is_dictionary(array: pa.Array) -> bool:
    return pa.types.is_dictionary(array.type)


def _follows(last: Any, array: pa.Array) -> bool:
    """Return whether values are ascending, and none is less than the last one before them."""
    if last is not None and array[0].as_py() < last:
        return False
    return len(array) < 2 or bool(pc.all(pc.less_equal(array[:-1], array[1:])).as_py())
