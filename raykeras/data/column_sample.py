"""The first rows of a few units of a source, as they are stored, and what they show about each column."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from raykeras.core.errors import RaykerasError, SourceError
from raykeras.data.sources.base import OpenSource

_UNITS, _ROWS_PER_UNIT = 8, 128

_UNIT_NBYTES = 16 << 20  # decoded bytes that are read of a unit

_EXAMPLES = 3

_CONTAINERS = (list, dict, np.ndarray)

_UNREADABLE = (RaykerasError, pa.ArrowException, KeyError, ValueError, TypeError, OSError)


@dataclass
class ColumnSample:
    """What the sampled rows show about a column.

    Attributes:
        num_rows: Sampled rows.
        num_nulls: Rows that are null; elements of tensors and lists are not counted.
        num_not_finite: Numbers that are NaN or infinite.
        values: For columns with one number or text per row: the values that are not null.
        range: Least and greatest finite number; None if there is none.
        lengths: Least and greatest length of the lists; None for other columns.
        examples: Up to three different values.
        error: Why the column cannot be read; None if it can.
    """

    num_rows: int = 0
    num_nulls: int = 0
    num_not_finite: int = 0
    values: list[Any] = field(default_factory=list)
    range: tuple[Any, Any] | None = None
    lengths: tuple[int, int] | None = None
    examples: list[Any] = field(default_factory=list)
    error: str | None = None

    @property
    def num_distinct(self) -> int:
        """The number of different `values`."""
        return len(set(self.values))

    def add(self, column: Any) -> None:
        """Add the rows of a column as a reader returns it."""
        rows = cells(column)
        present = [row for row in rows if row is not None]
        self.num_rows += len(rows)
        self.num_nulls += len(rows) - len(present)
        for row in present if len(self.examples) < _EXAMPLES else ():
            if isinstance(row, _CONTAINERS) or row not in self.examples:
                self.examples.append(row)
            if len(self.examples) == _EXAMPLES:
                break
        if not present:
            return
        if isinstance(present[0], list | np.ndarray) and _rank(present[0]) == 1:
            lengths = [len(row) for row in present]
            self.lengths = _extended(self.lengths, min(lengths), max(lengths))
        elif not isinstance(present[0], _CONTAINERS):
            self.values += present
        numbers = _numbers(present)
        self.num_not_finite += int((~np.isfinite(numbers)).sum())
        finite = numbers[np.isfinite(numbers)]
        if finite.size:
            self.range = _extended(self.range, finite.min().item(), finite.max().item())


def sample_columns(opened: OpenSource, names: Sequence[str]) -> dict[str, ColumnSample]:
    """Return samples of columns.

    The first rows of up to eight units, spread over the source, are read. A column that cannot be read does not affect
    the others.
    """
    samples = {name: ColumnSample() for name in names}
    units = np.flatnonzero(opened.unit_rows)
    chosen = units[np.unique(np.linspace(0, len(units) - 1, _UNITS).astype(int))]
    row_nbytes = sum(opened.fields[name].row_nbytes for name in names if not is_unusable(opened, name))
    max_rows = max(1, min(_ROWS_PER_UNIT, _UNIT_NBYTES // max(1, row_nbytes)))
    for unit in chosen:
        readable = [name for name in names if samples[name].error is None]
        for name, column in read_columns(opened, int(unit), max_rows, readable):
            try:
                if isinstance(column, Exception):
                    raise column
                samples[name].add(column)
            except _UNREADABLE as error:
                samples[name].error = str(error).split("\n")[0]
    return samples


def read_columns(opened: OpenSource, unit: int, max_rows: int, names: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Yield columns of the first rows of a unit; for one that cannot be read, the error."""
    num_rows = min(max_rows, int(opened.unit_rows[unit]))
    encrypted = {name: opened.unusable[name] for name in names if isinstance(opened.unusable.get(name), SourceError)}
    yield from encrypted.items()
    readable = [name for name in names if name not in encrypted]
    try:
        columns = opened.reader.read(opened.unit(unit), 0, num_rows, readable)
        yield from ((name, columns[name]) for name in readable)
        return
    except _UNREADABLE as error:
        if len(readable) <= 1:
            yield from ((name, error) for name in readable)
            return
    middle = len(readable) // 2  # find the columns that cannot be read
    for part in (readable[:middle], readable[middle:]):
        yield from read_columns(opened, unit, max_rows, part)


def is_unusable(opened: OpenSource, name: str) -> bool:
    """Return whether a column has a type that cannot become a tensor."""
    return opened.fields[name].dtype.startswith("arrow:")


def cells(column: Any) -> list[Any]:
    """Return a column's rows as Python values: None for nulls, arrays for tensors, lists for lists."""
    if isinstance(column, np.ndarray):
        return list(column) if column.ndim > 1 else column.tolist()
    if isinstance(column.type, pa.FixedShapeTensorType):
        shape = tuple(column.type.shape)
        storage = column.cast(column.type.storage_type) if isinstance(column, pa.ChunkedArray) else column.storage
        return [None if row is None else np.array(row).reshape(shape) for row in storage.to_pylist()]
    return column.to_pylist()


def _rank(row: Any) -> int:
    return row.ndim if isinstance(row, np.ndarray) else 1 + (_rank(row[0]) if row and isinstance(row[0], list) else 0)


def _numbers(present: Sequence[Any]) -> np.ndarray:
    """Return all numbers in rows, flat; none if they contain something else."""
    if isinstance(present[0], list | np.ndarray):
        parts = [np.asarray(row).ravel() for row in present if np.size(row)]
        if not parts or any(part.dtype.kind not in "biuf" for part in parts):
            return np.zeros(0)
        return np.concatenate(parts)
    array = np.asarray(present)
    return array if array.dtype.kind in "biuf" else np.zeros(0)


def _extended(range_: tuple[Any, Any] | None, least: Any, greatest: Any) -> tuple[Any, Any]:
    return (least, greatest) if range_ is None else (min(range_[0], least), max(range_[1], greatest))
