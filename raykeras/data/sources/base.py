"""The interface of sources: what the user describes (`Source`), and its schema and units once opened (`OpenSource`).

A *unit* is a row group of a Parquet file, a range of an array, or a part of a Ray dataset. Opening a source reads only
metadata, except that a Ray dataset is executed; a `Reader` then reads any part of a unit in any process.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import itertools
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import numpy as np

from raykeras.core.errors import ColumnError, OptionError, SourceError, ValidationError
from raykeras.core.plain_values import plain_value

if TYPE_CHECKING:
    import pandas

_MAX_LISTED = 10


Spec = str | Sequence[str] | Mapping[str, str | Sequence[str]] | None
"""A column, several columns to stack into a matrix, or either by input or output name."""


Columns = dict[str, Any]
"""Column name to a NumPy array (rows first) or an Arrow array, all of the same length."""


DATASET = "the Ray dataset"
"""The path of units of a Ray dataset, which have no file."""


@dataclass(frozen=True)
class Field:
    """The type of a stored column.

    Attributes:
        name: The column's name.
        kind: "dense" (fixed shape), "string" (text or bytes), or "list" (lengths may differ).
        dtype: NumPy dtype name of the elements, "string" or "bytes"; begins with "arrow:" if the column cannot be used.
        shape: Shape of one row; for lists that are known to have the same length `(length,)`, otherwise `()`.
    """

    name: str
    kind: Literal["dense", "string", "list"]
    dtype: str
    shape: tuple[int, ...] = ()

    @property
    def row_nbytes(self) -> int:
        """The bytes of one decoded row; an estimate if lengths may differ."""
        if self.kind == "dense":
            return int(np.dtype(self.dtype).itemsize * np.prod(self.shape, dtype=np.int64))
        return 64


class UnitRef(NamedTuple):
    """What a reader needs to find a unit.

    Attributes:
        path: File; "" for arrays, `DATASET` for a Ray dataset.
        group: Row group in the file, or index of the unit in the dataset.
        start: First row of the unit within the row group or array.
        partition: Names and values of the hive partition.
        group_rows: Rows of the row group when the source was opened; None if it cannot change.
    """

    path: str
    group: int
    start: int
    partition: tuple[tuple[str, Any], ...] = ()
    group_rows: int | None = None

    def __str__(self) -> str:
        if self.path == DATASET:
            return f"{DATASET}, unit {self.group}"
        return f"file {self.path}, row group {self.group}" if self.path else f"rows from {self.start}"


class Reader(Protocol):
    """Reads units, in any process that it is pickled to.

    Attributes:
        in_memory: Whether all rows are in memory.
    """

    in_memory: bool

    def read(self, unit: UnitRef, start: int, stop: int, columns: Sequence[str]) -> Columns:
        """Read rows `start` to `stop` of a unit."""
        ...


@dataclass(frozen=True)
class OpenSource:
    """A source whose metadata has been read.

    Attributes:
        reader: Reads units.
        fields: The columns, by name.
        files: All files, in source order.
        unit_file, unit_group, unit_start, unit_rows: For each unit the index of its file, its row group, its first row
            there, and its number of rows: int64 (units,).
        fingerprint: Digest that changes when the data does.
        partitions: For each file the names and values of its hive partition.
        num_cached_footers: Number of footers that were taken from the cache.
        unit_group_rows: For each unit the rows of its row group, if files may change: int64 (units,).
        unusable: The error for each column that cannot be used.
        fingerprint_parts: What the fingerprint is made of, for `what_changed`: small and JSON-serializable.
    """

    reader: Reader
    fields: dict[str, Field]
    files: tuple[str, ...]
    unit_file: np.ndarray
    unit_group: np.ndarray
    unit_start: np.ndarray
    unit_rows: np.ndarray
    fingerprint: str
    partitions: tuple[tuple[tuple[str, Any], ...], ...] = ()
    num_cached_footers: int = 0
    unit_group_rows: np.ndarray | None = None
    unusable: Mapping[str, ValidationError] = dataclasses.field(default_factory=dict)
    fingerprint_parts: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def num_rows(self) -> int:
        """The number of rows."""
        return int(self.unit_rows.sum())

    def unit(self, index: int) -> UnitRef:
        """Return the reference of a unit."""
        file = int(self.unit_file[index])
        partition = self.partitions[file] if self.partitions else ()
        group_rows = None if self.unit_group_rows is None else int(self.unit_group_rows[index])
        return UnitRef(
            self.files[file], int(self.unit_group[index]), int(self.unit_start[index]), partition, group_rows
        )

    def field(self, name: str) -> Field:
        """Return the type of a column.

        Raises:
            ColumnError: If there is no such column.
            SourceError: If the column cannot be read.
        """
        if name not in self.fields:
            known = join_names(self.fields)
            raise ColumnError(
                f"Columns must exist in the source; got {name!r}.{did_you_mean(name, self.fields)} Columns: {known}."
            )
        if isinstance(error := self.unusable.get(name), SourceError):
            raise error
        return self.fields[name]

    def slice(self, start: int, stop: int) -> OpenSource:
        """Return a source of rows `start` to `stop`, in source order, without reading any."""
        ends = np.cumsum(self.unit_rows)
        begins = ends - self.unit_rows
        units = np.flatnonzero((ends > start) & (begins < stop))
        skipped = np.maximum(start - begins[units], 0)
        rows = np.minimum(stop - begins[units], self.unit_rows[units]) - skipped
        return dataclasses.replace(
            self,
            unit_file=self.unit_file[units],
            unit_group=self.unit_group[units],
            unit_start=self.unit_start[units] + skipped,
            unit_rows=rows,
            fingerprint=fingerprint([self.fingerprint, start, stop]),
            unit_group_rows=None if self.unit_group_rows is None else self.unit_group_rows[units],
        )

    def head(self, num_rows: int, columns: Sequence[str]) -> Columns:
        """Read at most `num_rows` rows of the first unit that has any."""
        index = self._first_unit
        return self.reader.read(self.unit(index), 0, min(num_rows, int(self.unit_rows[index])), columns)

    @property
    def head_unit(self) -> UnitRef:
        """The unit that `head` reads."""
        return self.unit(self._first_unit)

    @property
    def _first_unit(self) -> int:
        return int(np.flatnonzero(self.unit_rows)[0])


Transform = Callable[..., Mapping[str, Any]]


def _unchanged(columns: Columns) -> Columns:
    return columns


Cache = Literal["auto", "memory"] | None


@dataclass(frozen=True, kw_only=True)
class Source(ABC):
    """Where rows are stored, and which columns are x, y and sample_weight.

    Attributes:
        x: Column spec of the inputs.
        y: Column spec of the targets.
        sample_weight: Column spec of the weights of the rows.
        transform: `f(columns)` or `f(columns, rng)`, called on windows of rows inside the read tasks. It takes and
            returns a dict of NumPy arrays, rows first, with the same number of rows.
        columns: The columns passed to `transform`; None for all usable ones.
        pad: For columns of lists of different lengths: the length, or `(length, value)`.
        ragged: List columns that become a `tf.RaggedTensor`.
        fill: For columns with nulls: the value that replaces them.
        cache: "memory" reads all rows once and keeps them in memory, for several workers in Ray's object store; None
            reads them again in each epoch; "auto" caches sources that are small. The order of rows is always the same.
    """

    x: Spec = None
    y: Spec = None
    sample_weight: Spec = None
    transform: Transform | None = None
    columns: Sequence[str] | None = None
    pad: Mapping[str, int | tuple[int, Any]] = dataclasses.field(default_factory=dict)
    ragged: Sequence[str] = ()
    fill: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    cache: Cache = "auto"

    def __post_init__(self) -> None:
        if self.transform is not None and not callable(self.transform):
            raise OptionError(f"`transform` must be a function of a dict of arrays; got {self.transform!r}.")
        if self.columns is not None and (isinstance(self.columns, str) or not self.columns):
            raise OptionError(f"`columns` must be a list of at least one column; got {self.columns!r}.")
        if self.columns is not None and self.transform is None:
            raise OptionError(
                f"`columns` lists the columns passed to `transform`; got {list(self.columns)} without `transform`. "
                "Leave it out: only columns named by x, y and sample_weight are read."
            )
        for name, value in self.pad.items():
            length = value[0] if isinstance(value, tuple) else value
            if isinstance(length, bool) or not isinstance(length, int) or length < 1:
                raise OptionError(
                    f"`pad` must map a column to a length of at least 1 or to (length, value); got {name!r}: {value!r}."
                )
        if self.cache not in ("auto", "memory", None):
            raise OptionError(f'`cache` must be "auto", "memory" or None; got {self.cache!r}.')
        padded_ragged = set(self.pad) & set(self.ragged)
        if padded_ragged:
            raise OptionError(f"A column can be padded or ragged, not both; got both for {sorted(padded_ragged)}.")

    @abstractmethod
    def open(self) -> OpenSource:
        """Read the metadata.

        Returns:
            The opened source: its schema, its units of rows and its fingerprint.

        Raises:
            SourceError: If files are missing, unreadable or without rows.
            ColumnError: If a column that x, y, sample_weight or `columns` name cannot be used.
        """

    @property
    def schema(self) -> dict[str, Field]:
        """The stored columns, by name, read from the metadata.

        Raises:
            SourceError: If files are missing, unreadable or without rows.
        """
        return self.with_all_columns().open().fields

    def head(self, num_rows: int = 5) -> pandas.DataFrame:
        """Return the first rows as they are stored, without the transform.

        Args:
            num_rows: Maximum number of rows, at least 1.

        Returns:
            A DataFrame of all columns that can be read; a cell of a tensor or a list is a NumPy array.

        Raises:
            OptionError: If `num_rows` is not an integer of at least 1.
            SourceError: If files are missing, unreadable or without rows.
        """
        from raykeras.data.preview import head

        return head(self, num_rows)

    def batch(self, batch_size: int = 32, *, shuffle: bool | int = True, seed: int = 0) -> tuple[Any, ...]:
        """Return the first batch that `raykeras.fit` would train on, without Ray and TensorFlow.

        Columns are selected, transformed, padded, filled and shuffled as `fit` does on up to 8 workers, without
        `validation_split`. Pass it on as in `model.train_on_batch(*source.batch())`.

        Args:
            batch_size: Rows of the batch, at least 1.
            shuffle: The `shuffle` of `fit`.
            seed: The seed of `raykeras.Run`.

        Returns:
            `(x,)`, `(x, y)` or `(x, y, sample_weight)`. Each is a NumPy array (batch_size, *shape) or a dict of them;
            text and ragged lists are object arrays (batch_size,) of bytes and of arrays.

        Raises:
            OptionError: If the options do not fit together.
            SourceError: If files are missing, unreadable or without rows.
            ColumnError: If a column cannot be used.
            UserCodeError: If the transform raises.
        """
        from raykeras.data.preview import first_batch

        return first_batch(self, batch_size, shuffle, seed)

    def with_all_columns(self) -> Source:
        """Return a source of the same rows whose metadata is read, and checked, for all columns."""
        return dataclasses.replace(self, x=None, y=None, sample_weight=None, columns=None, transform=_unchanged)

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self.options().items())
        return f"{type(self).__name__}({options})"

    def __str__(self) -> str:
        from raykeras.data.preview import as_text

        return as_text(self)

    def _repr_html_(self) -> str:
        from raykeras.data.preview import as_html

        return as_html(self)

    def options(self) -> dict[str, Any]:
        """Return the options that are set, as JSON values without credentials."""
        shown = {field.name: field for field in dataclasses.fields(self) if field.repr}
        values = {name: getattr(self, name) for name, field in shown.items() if getattr(self, name) != field.default}
        names = {name: getattr(value, "__qualname__", value) for name, value in values.items() if value not in ({}, ())}
        return {name: plain_value(value) for name, value in names.items()}

    def needed_columns(self) -> list[str] | None:
        """Return the stored columns to read; None for all usable ones, if a transform takes them."""
        if self.transform is not None:
            return None if self.columns is None else list(dict.fromkeys(self.columns))
        return sorted({name for spec in (self.x, self.y, self.sample_weight) for name in flat_names(spec)})


def flat_names(spec: Spec) -> list[str]:
    """Return all column names in a spec."""
    if spec is None:
        return []
    if isinstance(spec, str):
        return [spec]
    nested: Iterable[Any] = spec.values() if isinstance(spec, Mapping) else spec
    return [name for inner in nested for name in flat_names(inner)]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a suggestion for messages, ` Did you mean 'image'?`, or an empty string if no known name is similar."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {match[0]!r}?" if match else ""


def join_names(names: Iterable[Any]) -> str:
    """Return names as text for messages, at most the first ten of them."""
    texts = [str(name) for name in names]
    more = f" and {len(texts) - _MAX_LISTED} more" if len(texts) > _MAX_LISTED else ""
    return ", ".join(texts[:_MAX_LISTED]) + more or "none"


def fingerprint(value: Any) -> str:
    """Return a digest of a JSON-serializable value: 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def what_changed(before: Mapping[str, Any], opened: OpenSource) -> str:
    """Describe how a source's data changed: what differs first, such as "the columns changed".

    Args:
        before: The previous `fingerprint_parts`.
        opened: The present source.
    """
    now = opened.fingerprint_parts
    changed = [name for name in {**before, **now} if name != "files" and before.get(name) != now.get(name)]
    if not changed:
        return "the selection of rows changed"
    pairs = itertools.zip_longest(before.get("files", ()), now.get("files", ()))
    file_index = next((i for i, (old, new) in enumerate(pairs) if old != new), None)
    old, new = before.get(changed[0]), now.get(changed[0])
    numbers = f" from {old:,} to {new:,}" if isinstance(old, int) and isinstance(new, int) else ""
    first = ""
    if file_index is not None and "files" in before and "files" in now:
        is_present = file_index < len(opened.files)
        first = f", first {opened.files[file_index]!r}" if is_present else f", after {opened.files[-1]!r}"
    return f"the {changed[0]} changed{numbers}{first}"
