"""Where rows come from: paths and arrays in, row units with a schema out.

Enters: what the user named. Leaves: an `OpenSource`, which knows every *unit* (a row group, or a
range of an array) by file, number and length, the columns' types, and a fingerprint of the data,
and whose `reader` reads any part of a unit in any process. Opening reads metadata only; a Ray dataset
is run.

    fields        Arrow columns as fields
    footer_cache  what was read of Parquet footers, kept from one opening to the next
    encryption    which columns of a Parquet file are encrypted
    footers       what Parquet files tell of themselves
    partitions    columns that the names of folders make
    parquet_checks  whether their columns can be used
    parquet       files, folders, globs, hive partitions, on any fsspec filesystem
    arrays        NumPy arrays in memory, `.npz` archives among them, and `.npy`, memory-mapped
    units         a part of a Ray dataset, as its tasks make it
    dataset       a `ray.data.Dataset`, run once and held in the object store
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import itertools
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from raykeras.errors import ColumnError, OptionError, SourceError, ValidationError

_MAX_LISTED = 10

Spec = str | Sequence[str] | Mapping[str, str | Sequence[str]] | None
"""One column, several that are stacked into one matrix, or either by input or output name."""

Columns = dict[str, Any]
"""Column name to a NumPy array (rows first) or an Arrow array, all of one length."""

DATASET = "the Ray dataset"
"""Stands for the file of rows that come from none."""


@dataclass(frozen=True)
class Field:
    """One column as it is stored.

    Attributes:
        name: Its name.
        kind: "dense" (fixed shape), "string" (text or bytes), or "list" (lengths may differ).
        dtype: NumPy name of the elements' type, "string" or "bytes".
        shape: Shape of one row; for a list of known equal lengths `(length,)`, else `()`.
    """

    name: str
    kind: Literal["dense", "string", "list"]
    dtype: str
    shape: tuple[int, ...] = ()

    @property
    def row_nbytes(self) -> int:
        """Bytes of one row once decoded; a guess where lengths may differ."""
        if self.kind == "dense":
            return int(np.dtype(self.dtype).itemsize * np.prod(self.shape, dtype=np.int64))
        return 64


class UnitRef(NamedTuple):
    """What a reader needs to find a unit.

    Attributes:
        path: File; "" for arrays, `DATASET` for a Ray dataset.
        group: Row group in the file, or number of the unit in the dataset.
        start: First row of the unit in the row group or array.
        partition: Names and values of the hive partition.
        group_rows: Rows of the whole row group; None where it cannot change.
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
    """Reads units in whatever process it was pickled to."""

    in_memory: bool

    def read(self, unit: UnitRef, start: int, stop: int, columns: Sequence[str]) -> Columns:
        """Rows `start` to `stop` of a unit."""
        ...


@dataclass(frozen=True)
class OpenSource:
    """A source whose metadata was read.

    Attributes:
        reader: Reads units.
        fields: The columns, by name.
        files: Every file, in source order.
        unit_file, unit_group, unit_start, unit_rows: For each unit its file's index, its row group,
            its first row there, and its number of rows: int64 (units,).
        fingerprint: Changes when the data does.
        partitions: For each file the names and values of its hive partition.
        kept_footers: How many files' footers did not have to be read, having been kept.
        unusable: Columns that cannot be used, with the error for those who use them.
        fingerprint_parts: What the fingerprint was made of, for `what_changed`; as JSON, and small.
        unit_group_rows: For each unit the rows of its whole row group, where a file may change: int64 (units,).
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
    kept_footers: int = 0
    unit_group_rows: np.ndarray | None = None
    unusable: Mapping[str, ValidationError] = dataclasses.field(default_factory=dict)
    fingerprint_parts: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        return int(self.unit_rows.sum())

    def unit(self, index: int) -> UnitRef:
        file = int(self.unit_file[index])
        partition = self.partitions[file] if self.partitions else ()
        group_rows = None if self.unit_group_rows is None else int(self.unit_group_rows[index])
        return UnitRef(
            self.files[file], int(self.unit_group[index]), int(self.unit_start[index]), partition, group_rows
        )

    def field(self, name: str) -> Field:
        """The column of this name. Raises ColumnError with the nearest name, or SourceError if it cannot be read."""
        if name not in self.fields:
            known = listed(self.fields)
            raise ColumnError(
                f"Every column that is named must exist; got {name!r}.{nearest(name, self.fields)} Columns: {known}."
            )
        if isinstance(error := self.unusable.get(name), SourceError):
            raise error
        return self.fields[name]

    def slice(self, start: int, stop: int) -> OpenSource:
        """Rows `start` to `stop` in source order, as a source of its own; reads nothing."""
        ends = np.cumsum(self.unit_rows)
        begins = ends - self.unit_rows
        kept = np.flatnonzero((ends > start) & (begins < stop))
        cut = np.maximum(start - begins[kept], 0)
        rows = np.minimum(stop - begins[kept], self.unit_rows[kept]) - cut
        return dataclasses.replace(
            self,
            unit_file=self.unit_file[kept],
            unit_group=self.unit_group[kept],
            unit_start=self.unit_start[kept] + cut,
            unit_rows=rows,
            fingerprint=fingerprint([self.fingerprint, start, stop]),
            unit_group_rows=None if self.unit_group_rows is None else self.unit_group_rows[kept],
        )

    def head(self, num_rows: int, columns: Sequence[str]) -> Columns:
        """The first rows, all from one unit."""
        index = self._first_unit
        return self.reader.read(self.unit(index), 0, min(num_rows, int(self.unit_rows[index])), columns)

    @property
    def head_unit(self) -> UnitRef:
        """The unit of `head`."""
        return self.unit(self._first_unit)

    @property
    def _first_unit(self) -> int:
        return int(np.flatnonzero(self.unit_rows)[0])


Transform = Callable[..., Mapping[str, Any]]
Cache = Literal["auto", "memory"] | None


@dataclass(frozen=True, kw_only=True)
class Source(ABC):
    """What `raykeras.parquet` and `raykeras.npy` return: where rows are, and what they mean.

    Attributes:
        x, y, sample_weight: Column specs.
        transform: `f(columns)` or `f(columns, rng)`, run on windows of rows inside the data tasks:
            takes and returns a dict of NumPy arrays, rows first, the same number of rows.
        columns: The columns that `transform` gets; None for all that can be used as they are.
        pad: For columns of lists of differing lengths: the length, or `(length, value)`.
        ragged: Columns of lists to hand on as `tf.RaggedTensor`.
        fill: For columns with nulls: the value that takes their place.
        cache: "memory" reads all rows once and holds them, in the driver or, for several workers, in Ray's object
            store; None reads them anew in each epoch; "auto" holds what is not large. The order of rows is the same.
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
                f"`columns` are those that `transform` gets; got {list(self.columns)} without `transform`. Leave "
                "it out: what x, y and sample_weight do not name is not read."
            )
        for name, value in self.pad.items():
            length = value[0] if isinstance(value, tuple) else value
            if isinstance(length, bool) or not isinstance(length, int) or length < 1:
                raise OptionError(
                    f"`pad` maps a column to a length of at least 1 or to (length, value); got {name!r}: {value!r}."
                )
        if self.cache not in ("auto", "memory", None):
            raise OptionError(f'`cache` must be "auto", "memory" or None; got {self.cache!r}.')
        both = set(self.pad) & set(self.ragged)
        if both:
            raise OptionError(f"A column is padded or ragged, not both; got both for {sorted(both)}.")

    @abstractmethod
    def open(self) -> OpenSource:
        """Reads the metadata. Raises SourceError or ColumnError."""

    def needed_columns(self) -> list[str] | None:
        """Return the stored columns that are needed; None for all that can be used, where a transform takes them."""
        if self.transform is not None:
            return None if self.columns is None else list(dict.fromkeys(self.columns))
        return sorted({name for spec in (self.x, self.y, self.sample_weight) for name in flat_names(spec)})


def flat_names(spec: Spec) -> list[str]:
    """All column names in a spec."""
    if spec is None:
        return []
    if isinstance(spec, str):
        return [spec]
    parts: Iterable[Any] = spec.values() if isinstance(spec, Mapping) else spec
    return [name for part in parts for name in flat_names(part)]


def nearest(name: str, known: Iterable[str]) -> str:
    """` Did you mean 'image'?`, or nothing."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {match[0]!r}?" if match else ""


def listed(names: Iterable[Any]) -> str:
    """Return names as text, the first of them if they are many."""
    every = [str(name) for name in names]
    more = f" and {len(every) - _MAX_LISTED} more" if len(every) > _MAX_LISTED else ""
    return ", ".join(every[:_MAX_LISTED]) + more or "none"


def fingerprint(value: Any) -> str:
    """A short digest of a JSON-ready value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def what_changed(before: Mapping[str, Any], opened: OpenSource) -> str:
    """Say what of a source's data is not what it was; the first thing that differs.

    Args:
        before: Its `fingerprint_parts` then.
        opened: The source now.
    """
    now = opened.fingerprint_parts
    differ = [name for name in {**before, **now} if name != "files" and before.get(name) != now.get(name)]
    if not differ:
        return "which rows are used changed"
    pairs = itertools.zip_longest(before.get("files", ()), now.get("files", ()))
    place = next((i for i, (old, new) in enumerate(pairs) if old != new), None)
    old, new = before.get(differ[0]), now.get(differ[0])
    numbers = f" from {old:,} to {new:,}" if isinstance(old, int) and isinstance(new, int) else ""
    first = ""
    if place is not None and "files" in before and "files" in now:
        first = f", first {opened.files[place]!r}" if place < len(opened.files) else f", after {opened.files[-1]!r}"
    return f"the {differ[0]} changed{numbers}{first}"
