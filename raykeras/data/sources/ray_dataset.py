"""Ray dataset sources: a `ray.data.Dataset`, executed once and kept in the object store.

Its rows are cut into units whose boundaries depend only on the rows, not on the blocks that Ray Data made. So the row
order is the same on any cluster, and reading a window does not load a whole block of up to 128 MB.
"""

from __future__ import annotations

import re
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from raykeras.compat.ray_data import executed_blocks
from raykeras.core.error_context import root_cause
from raykeras.core.errors import ColumnError, OptionError, RaykerasError, SourceError, UserCodeError, ValidationError
from raykeras.data.sources.base import (
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
from raykeras.data.sources.fields import stored_field
from raykeras.data.sources.ray_blocks import Unit, common_schema, conflict_of, make_unit, read_part

_UNIT_NBYTES = 4 << 20


_GROUP_UNITS = 256  # references are stored in groups, since a task needs few and pickling each takes time


_CHAINED = "\n\nThe above exception was the direct cause of the following exception:\n\n"


class DatasetReader:
    """Reads units from the object store.

    In the process that opened the source, which may be on another node than the rows, a task reads them where they
    are. Once pickled to a task, the reader maps the units into memory.
    """

    in_memory = False

    def __init__(self, ref_groups: Sequence[Any], schema: pa.Schema) -> None:
        self._ref_groups = tuple(ref_groups)  # references to lists of references to units
        self.schema = schema
        self._loaded_group: dict[int, list[Any]] = {}
        self._maps_units = False

    def __getstate__(self) -> dict[str, Any]:
        return {"_ref_groups": self._ref_groups, "schema": self.schema, "_loaded_group": {}, "_maps_units": True}

    def __copy__(self) -> DatasetReader:
        return self  # threads may share it

    def read(self, unit: UnitRef, start: int, stop: int, columns: Sequence[str]) -> Columns:
        import ray

        group, index = divmod(unit.group, _GROUP_UNITS)
        if group not in self._loaded_group:
            self._loaded_group = {group: ray.get(self._ref_groups[group])}
        ref = self._loaded_group[group][index]
        selection = (unit.start + start, unit.start + stop, pa.schema([self.schema.field(name) for name in columns]))
        if self._maps_units:
            table = read_part(ray.get(ref), *selection)
        else:
            table = ray.get(ray.remote(num_cpus=0)(read_part).remote(ref, *selection))
        return {name: table.column(name) for name in columns}


class Rows:
    """The rows of a dataset in the object store; the dataset is executed when they are first needed.

    It is executed again if Ray was restarted since.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self._worker_id: str | None = None  # identifies the connection to Ray
        self._units: tuple[DatasetReader, list[Unit], np.ndarray] | None = None

    @property
    def are_ready(self) -> bool:
        """Whether the rows are in the object store of the Ray that this process is connected to."""
        return self._units is not None and self._worker_id == _worker_id()

    def units(self) -> tuple[DatasetReader, list[Unit], np.ndarray]:
        """Return a reader, the summary of each unit, and the rows of each unit, int64 (units,).

        Raises:
            SourceError: If the dataset cannot be executed or has no rows.
            UserCodeError: If a function of the dataset raises.
        """
        if self._units is None or not self.are_ready:
            self._units = _cut(_blocks(self.dataset))
            self._worker_id = _worker_id()
        return self._units


def _worker_id() -> str | None:
    import ray

    return ray.get_runtime_context().get_worker_id() if ray.is_initialized() else None


@dataclass(frozen=True, kw_only=True, repr=False)
class DatasetSource(Source):
    """A Ray dataset; made by `raykeras.dataset`."""

    rows: Rows = field(repr=False)
    cache: Cache = None  # the rows are in the object store

    def open(self) -> OpenSource:
        reader, units, unit_rows = self.rows.units()
        fields = {f.name: _field_of(f) for f in reader.schema}
        needed = self.needed_columns()
        unusable: dict[str, ValidationError] = {}
        for name in [n for n in (fields if needed is None else needed) if n in fields]:
            try:
                if conflict := conflict_of(reader.schema.field(name)):
                    raise ColumnError(
                        f"A column must have the same type in all rows; {name!r} is {conflict}. Convert it in the "
                        "dataset's functions."
                    )
                fields[name] = _checked(self, fields[name], units)
            except ColumnError as error:
                if needed is not None:
                    raise
                unusable[name] = error.with_traceback(None)
        indices = np.arange(len(units))
        parts = {
            "columns": fingerprint(str(reader.schema)),
            "number of rows": int(unit_rows.sum()),
            "contents of the rows": fingerprint([unit_rows.tolist(), [unit.digest for unit in units]]),
        }
        return OpenSource(
            reader=reader,
            fields=fields,
            files=(DATASET,) * len(units),
            unit_file=indices,
            unit_group=indices,
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
    """Return a source that reads a `ray.data.Dataset`.

    Args:
        ds: The dataset. It is executed once, in order, when the source is first used. Its rows stay in the object
            store, which may spill them to disk, for the lifetime of the source.
        x: One column; a list of numeric columns, stacked to a (rows, k) matrix; or a dict of either by the model's
            input names.
        y: Likewise, by output names.
        sample_weight: Likewise, by output names.
        transform: `f(columns)` or `f(columns, rng)`, called on windows of rows inside the read tasks; see `Source`.
        columns: The columns passed to `transform`; None for all usable ones.
        pad: For columns of lists of different lengths: the length, or `(length, value)`.
        ragged: List columns that become a `tf.RaggedTensor`.
        fill: For columns with nulls: the value that replaces them.

    Returns:
        A source; nothing is executed until it is used.

    Raises:
        OptionError: If `ds` is not a Ray dataset, or the options do not fit together.
    """
    if not is_ray_dataset(ds):
        raise OptionError(
            f"`dataset` takes a ray.data.Dataset; got {type(ds).__name__}. Use `rk.parquet` or `rk.npy` for files, "
            "and pass arrays directly."
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
    """Return whether a value is a `ray.data.Dataset`, without importing Ray."""
    return any(c.__name__ == "Dataset" and c.__module__.startswith("ray.data") for c in type(value).__mro__)


def _blocks(ds: Any) -> list[tuple[Any, int, int]]:
    """Execute a dataset; return the reference, rows and bytes of each of its blocks, in order."""
    options = ds.context.execution_options
    preserve_order, options.preserve_order = options.preserve_order, True
    try:
        materialized = ds.materialize()
    except Exception as error:
        cause = root_cause(error)
        if isinstance(cause, RaykerasError):
            raise cause from None
        if "UserCodeException" in {c.__name__ for c in type(error).__mro__}:
            raise _user_error(str(error)) from None
        raise SourceError(
            f"A dataset must run to completion before training; this one raised {type(error).__name__}: "
            f"{_first_line(str(error))} Try `ds.materialize()` alone."
        ) from error
    finally:
        options.preserve_order = preserve_order
    return [block for block in executed_blocks(materialized) if block[1]]


def _cut(blocks: list[tuple[Any, int, int]]) -> tuple[DatasetReader, list[Unit], np.ndarray]:
    """Make units of blocks, in tasks.

    Args:
        blocks: Reference, rows and bytes of each block; cleared, so that Ray can free them.

    Returns:
        A reader, the summary of each unit, and the rows of each unit, int64 (units,).
    """
    import ray

    ends = np.cumsum([rows for _, rows, _ in blocks])
    num_rows = int(ends[-1]) if blocks else 0
    if not num_rows:
        raise SourceError("A source must have at least one row; this dataset has none. Check `ds.count()`.")
    row_nbytes = max(1, sum(size for _, _, size in blocks) // num_rows)
    size = 1 << max(0, (_UNIT_NBYTES // row_nbytes).bit_length() - 1)
    task = ray.remote(num_returns=2)(make_unit)
    summary_refs, refs = [], []
    for start in range(0, num_rows, size):
        stop = min(start + size, num_rows)
        lo, hi = np.searchsorted(ends, (start, stop - 1), "right")
        begin = int(ends[lo]) - blocks[lo][1]
        summary_ref, ref = task.remote(start - begin, stop - begin, *(block for block, _, _ in blocks[lo : hi + 1]))
        summary_refs.append(summary_ref)
        refs.append(ref)
    blocks.clear()
    units = ray.get(summary_refs)
    for unit in units:
        if isinstance(unit, ColumnError):
            raise unit
    schema = common_schema([unit.schema for unit in units])
    ref_groups = [ray.put(refs[i : i + _GROUP_UNITS]) for i in range(0, len(refs), _GROUP_UNITS)]
    starts = np.arange(0, num_rows, size, dtype=np.int64)
    return DatasetReader(ref_groups, schema), units, np.diff(starts, append=num_rows)


def _field_of(column: pa.Field) -> Field:
    name = getattr(column.type, "extension_name", "")
    if name.startswith("ray.data.arrow_variable_shaped_tensor"):
        return Field(column.name, "dense", "arrow:tensors of different shapes")
    if name.startswith("ray.data.arrow_pickled_object"):
        return Field(column.name, "dense", "arrow:Python objects")
    return stored_field(column)


def _checked(source: Source, column: Field, units: Sequence[Unit]) -> Field:
    """Check nulls and lengths of lists; return the column, with a shape if all lists have the same length."""
    name = column.name
    if column.dtype.startswith("arrow:tensors"):
        raise ColumnError(
            f"All rows of a tensor must have the same shape; column {name!r} contains "
            f"{column.dtype.removeprefix('arrow:')}. Resize or pad them in the dataset's functions."
        )
    if column.kind != "list":
        nulls = sum(unit.nulls[name] for unit in units)
        if nulls and name not in source.fill:
            raise ColumnError(
                f"x, y and sample_weight must not contain nulls; column {name!r} has {nulls:,} in {DATASET}. "
                f"Pass `fill={{{name!r}: value}}`, or drop those rows."
            )
        return column
    if name in source.pad or name in source.ragged:
        return column
    lengths = [unit.lengths[name] for unit in units if name in unit.lengths]
    min_length, max_length = min(a for a, _ in lengths), max(b for _, b in lengths)
    if min_length != max_length or len(lengths) != len(units):
        raise ColumnError(
            f"All rows of a tensor must have the same shape; the lists of column {name!r} have {min_length} to "
            f"{max_length} values. Pass `pad={{{name!r}: length}}` or `ragged=[{name!r}]`."
        )
    return Field(name, "list", column.dtype, (min_length,))


def _user_error(text: str) -> UserCodeError:
    """Parse the text of Ray's exception for an error of a user's function; Ray does not keep the original exception."""
    head, *frames = re.split(r'(?m)^(?=  File ")', text.rsplit(_CHAINED, 1)[0])
    last, _, message = frames[-1].partition("\n")
    indented = [line for line in message.split("\n") if line.startswith("    ")]
    message = "\n".join(line for line in message.split("\n") if line not in indented).strip()
    frames[-1] = "\n".join([last, *indented, ""])
    stdlib = tuple(f'  File "{sysconfig.get_path(name)}' for name in ("stdlib", "platstdlib"))
    user_frames = [f for f in frames if "/site-packages/" not in f.split("\n")[0] and not f.startswith(stdlib)]
    node = re.search(r"ip=([^,)]+)", head)
    return UserCodeError(
        f"A function of the dataset raised {message.splitlines()[0]}",
        rank=None,
        node=node.group(1) if node else "unknown",
        cause=message.split(":")[0],
        user_traceback=f"Traceback (most recent call last):\n{''.join(user_frames or frames[-3:])}{message}",
    )


def _first_line(text: str) -> str:
    return text.strip().split("\n")[0].rstrip(".") + "."
