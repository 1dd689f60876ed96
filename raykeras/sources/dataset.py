"""A `ray.data.Dataset`, with the user's own preprocessing, as a source.

Enters: a dataset. Leaves: its rows in the cluster's object store, cut into units whose borders depend on
the rows alone, not on how the cluster happened to make blocks of them: so the order of a run is the
same on any cluster, and a window does not take a whole block of 128 MB with it.
"""

from __future__ import annotations

import re
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from raykeras.errors import (
    ColumnError,
    OptionError,
    RaykerasError,
    SourceError,
    UserCodeError,
    ValidationError,
    root_cause,
)
from raykeras.sources import (
    DATASET,
    Cache,
    Columns,
    Field,
    OpenSource,
    Source,
    Spec,
    Transform,
    UnitRef,
    fingerprint,
)
from raykeras.sources.fields import stored_field
from raykeras.sources.units import Unit, common_schema, conflict_of, make_unit, read_part

_UNIT_NBYTES = 4 << 20
_SHEET_UNITS = 256  # references that are sent together: a task needs few, and each costs some microseconds
_CHAINED = "\n\nThe above exception was the direct cause of the following exception:\n\n"


class DatasetReader:
    """Reads units that lie in the object store.

    In the process that opened the source, which may be far from the rows, it has a task read them where
    they are; wherever it is pickled to, it maps them.
    """

    in_memory = False

    def __init__(self, sheets: Sequence[Any], schema: pa.Schema) -> None:
        self._sheets = tuple(sheets)  # references to lists of references to units
        self.schema = schema
        self._read_before: dict[int, list[Any]] = {}
        self._maps = False

    def __getstate__(self) -> dict[str, Any]:
        return {"_sheets": self._sheets, "schema": self.schema, "_read_before": {}, "_maps": True}

    def __copy__(self) -> DatasetReader:
        return self  # it holds nothing that threads may not share

    def read(self, unit: UnitRef, start: int, stop: int, columns: Sequence[str]) -> Columns:
        import ray

        sheet, index = divmod(unit.group, _SHEET_UNITS)
        if sheet not in self._read_before:
            self._read_before = {sheet: ray.get(self._sheets[sheet])}
        ref = self._read_before[sheet][index]
        part = (unit.start + start, unit.start + stop, pa.schema([self.schema.field(name) for name in columns]))
        if self._maps:
            table = read_part(ray.get(ref), *part)
        else:
            table = ray.get(ray.remote(num_cpus=0)(read_part).remote(ref, *part))
        return {name: table.column(name) for name in columns}


class Rows:
    """The rows of a dataset in the object store, which the dataset is run for once."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self._ray: str | None = None
        self._known: tuple[DatasetReader, list[Unit], np.ndarray] | None = None

    def units(self) -> tuple[DatasetReader, list[Unit], np.ndarray]:
        """A reader, what is known of each unit, and its rows. Raises SourceError or UserCodeError."""
        import ray

        connected = ray.get_runtime_context().get_worker_id() if ray.is_initialized() else None
        if self._known is None or connected != self._ray:
            self._known = _cut(_blocks(self.dataset))
            self._ray = ray.get_runtime_context().get_worker_id()
        return self._known


@dataclass(frozen=True, kw_only=True)
class DatasetSource(Source):
    """A Ray dataset and what its columns mean; made by `raykeras.dataset`."""

    rows: Rows = field(repr=False)
    cache: Cache = None  # it is in memory

    def open(self) -> OpenSource:
        reader, units, unit_rows = self.rows.units()
        fields = {f.name: _field_of(f) for f in reader.schema}
        needed = self.needed_columns()
        unusable: dict[str, ValidationError] = {}
        for name in [n for n in (fields if needed is None else needed) if n in fields]:
            try:
                if conflict := conflict_of(reader.schema.field(name)):
                    raise ColumnError(
                        f"A column must have one type in all rows; {name!r} is {conflict}. Give it one in the "
                        "dataset's own functions."
                    )
                fields[name] = _checked(self, fields[name], units)
            except ColumnError as error:
                if needed is not None:
                    raise
                unusable[name] = error.with_traceback(None)
        numbers = np.arange(len(units))
        parts = {
            "columns": fingerprint(str(reader.schema)),
            "number of rows": int(unit_rows.sum()),
            "contents of the rows": fingerprint([unit_rows.tolist(), [unit.digest for unit in units]]),
        }
        return OpenSource(
            reader=reader,
            fields=fields,
            files=(DATASET,) * len(units),
            unit_file=numbers,
            unit_group=numbers,
            unit_start=np.zeros(len(units), np.int64),
            unit_rows=unit_rows,
            fingerprint=fingerprint(parts),
            fingerprint_parts=parts,
            unusable=unusable,
        )


def dataset(
    ds: Any,
    *,
    x: Spec = None,
    y: Spec = None,
    sample_weight: Spec = None,
    transform: Transform | None = None,
    columns: Sequence[str] | None = None,
    pad: Mapping[str, int | tuple[int, Any]] | None = None,
    ragged: Sequence[str] = (),
    fill: Mapping[str, Any] | None = None,
) -> DatasetSource:
    """A `ray.data.Dataset` as a source.

    Args:
        ds: The dataset. When the source is first used it is run once, in its order, and its rows stay in
            the object store, which spills to disk what it has no room for, as long as the source does.
        x: One column; a list of numeric columns, stacked into a (rows, k) matrix; or a dict of
            either by the model's input names.
        y: Likewise, by output names.
        sample_weight: Likewise, by output names.
        transform, columns, pad, ragged, fill: See `Source`.

    Returns:
        A source; nothing is run until it is used.
    """
    if not is_ray_dataset(ds):
        raise OptionError(
            f"`dataset` takes a ray.data.Dataset; got {type(ds).__name__}. Files are read by `rk.parquet` and "
            "`rk.npy`, and arrays are passed as they are."
        )
    return DatasetSource(
        rows=Rows(ds),
        x=x,
        y=y,
        sample_weight=sample_weight,
        transform=transform,
        columns=columns,
        pad=dict(pad or {}),
        ragged=tuple(ragged),
        fill=dict(fill or {}),
    )


def is_ray_dataset(value: Any) -> bool:
    """Whether it is a `ray.data.Dataset`; imports nothing."""
    return any(c.__name__ == "Dataset" and c.__module__.startswith("ray.data") for c in type(value).__mro__)


def _blocks(ds: Any) -> list[tuple[Any, int, int]]:
    """Runs a dataset: reference, rows and bytes of each of its blocks, in order."""
    options = ds.context.execution_options
    before, options.preserve_order = options.preserve_order, True
    try:
        made = ds.materialize()
    except Exception as error:
        cause = root_cause(error)
        if isinstance(cause, RaykerasError):
            raise cause from None
        if "UserCodeException" in {c.__name__ for c in type(error).__mro__}:
            raise _user_error(str(error)) from None
        raise SourceError(
            f"A dataset must run to its end before it is trained on; this one raised {type(error).__name__}: "
            f"{_first_line(str(error))} Try `ds.materialize()` by itself."
        ) from error
    finally:
        options.preserve_order = before
    entries = [entry for bundle in made.iter_internal_ref_bundles() for entry in bundle.blocks]
    return [(e.ref, e.metadata.num_rows, e.metadata.size_bytes) for e in entries if e.metadata.num_rows]


def _cut(blocks: list[tuple[Any, int, int]]) -> tuple[DatasetReader, list[Unit], np.ndarray]:
    """Makes units of blocks, in tasks where the blocks are; the blocks are let go."""
    import ray

    ends = np.cumsum([rows for _, rows, _ in blocks])
    num_rows = int(ends[-1]) if blocks else 0
    if not num_rows:
        raise SourceError("A source must have at least one row; this dataset has none. Look at `ds.count()`.")
    row_nbytes = max(1, sum(size for _, _, size in blocks) // num_rows)
    size = 1 << max(0, (_UNIT_NBYTES // row_nbytes).bit_length() - 1)
    task = ray.remote(num_returns=2)(make_unit)
    known, refs = [], []
    for start in range(0, num_rows, size):
        stop = min(start + size, num_rows)
        lo, hi = np.searchsorted(ends, (start, stop - 1), "right")
        begin = int(ends[lo]) - blocks[lo][1]
        info, ref = task.remote(start - begin, stop - begin, *(block for block, _, _ in blocks[lo : hi + 1]))
        known.append(info)
        refs.append(ref)
    blocks.clear()
    units = ray.get(known)
    for unit in units:
        if isinstance(unit, ColumnError):
            raise unit
    schema = common_schema([unit.schema for unit in units])
    sheets = [ray.put(refs[i : i + _SHEET_UNITS]) for i in range(0, len(refs), _SHEET_UNITS)]
    starts = np.arange(0, num_rows, size, dtype=np.int64)
    return DatasetReader(sheets, schema), units, np.diff(starts, append=num_rows)


def _field_of(column: pa.Field) -> Field:
    name = getattr(column.type, "extension_name", "")
    if name.startswith("ray.data.arrow_variable_shaped_tensor"):
        return Field(column.name, "dense", "arrow:tensors of differing shapes")
    if name.startswith("ray.data.arrow_pickled_object"):
        return Field(column.name, "dense", "arrow:Python objects")
    return stored_field(column)


def _checked(source: Source, column: Field, units: Sequence[Unit]) -> Field:
    """Nulls and lengths of lists; the column, with its shape where all lists have one length."""
    name = column.name
    if column.dtype.startswith("arrow:tensors"):
        raise ColumnError(
            f"The rows of a tensor must have one shape; column {name!r} holds {column.dtype.removeprefix('arrow:')}. "
            "Resize or pad them in the dataset's own functions."
        )
    if column.kind != "list":
        nulls = sum(unit.nulls[name] for unit in units)
        if nulls and name not in source.fill:
            raise ColumnError(
                f"x, y and sample_weight must hold no nulls; column {name!r} has {nulls:,} in {DATASET}. "
                f"Give `fill={{{name!r}: value}}`, or drop those rows."
            )
        return column
    if name in source.pad or name in source.ragged:
        return column
    lengths = [unit.lengths[name] for unit in units if name in unit.lengths]
    least, most = min(a for a, _ in lengths), max(b for _, b in lengths)
    if least != most or len(lengths) != len(units):
        raise ColumnError(
            f"The rows of a tensor must have one shape; the lists of column {name!r} have {least} to {most} values. "
            f"Give `pad={{{name!r}: length}}` or `ragged=[{name!r}]`."
        )
    return Field(name, "list", column.dtype, (least,))


def _user_error(text: str) -> UserCodeError:
    """From the text of Ray's exception, since the one that was raised does not come with it."""
    head, *frames = re.split(r'(?m)^(?=  File ")', text.rsplit(_CHAINED, 1)[0])
    last, _, raised = frames[-1].partition("\n")
    indented = [line for line in raised.split("\n") if line.startswith("    ")]
    raised = "\n".join(line for line in raised.split("\n") if line not in indented).strip()
    frames[-1] = "\n".join([last, *indented, ""])
    theirs = tuple(sysconfig.get_path(name) for name in ("stdlib", "platstdlib"))
    mine = [f for f in frames if "/site-packages/" not in f.split("\n")[0] and not f.startswith(_opening(theirs))]
    node = re.search(r"ip=([^,)]+)", head)
    return UserCodeError(
        f"A function of the dataset raised {raised.splitlines()[0]}",
        rank=None,
        node=node.group(1) if node else "unknown",
        cause=raised.split(":")[0],
        user_traceback=f"Traceback (most recent call last):\n{''.join(mine or frames[-3:])}{raised}",
    )


def _opening(folders: Sequence[str]) -> tuple[str, ...]:
    return tuple(f'  File "{folder}' for folder in folders)


def _first_line(text: str) -> str:
    return text.strip().split("\n")[0].rstrip(".") + "."
