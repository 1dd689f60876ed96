"""What the methods of a source return and show: first rows, the first batch, and a description."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from raykeras.compat.keras_api import current_floatx
from raykeras.core import html
from raykeras.core.config import Scale
from raykeras.core.errors import printable_line
from raykeras.data.batch_spec import ROLES, ElementSpec
from raykeras.data.column_sample import cells, read_columns
from raykeras.data.inputs import Rows, check_positive, train_spec
from raykeras.data.inspection import kind_of
from raykeras.data.sources.arrays import NpySource
from raykeras.data.sources.base import Field, OpenSource, Source, flat_names
from raykeras.data.sources.parquet import ParquetSource
from raykeras.data.sources.ray_dataset import DatasetSource
from raykeras.data.streaming.interleave import RankInput, chunks_of

if TYPE_CHECKING:
    import pandas

_MAX_SHOWN = 40  # columns


def head(source: Source, num_rows: int) -> pandas.DataFrame:
    """See `Source.head`."""
    import pandas

    check_positive("num_rows", num_rows)
    opened = source.with_all_columns().open()
    rows: dict[str, list[Any]] = {name: [] for name in opened.fields}
    num_read = 0
    for unit in np.flatnonzero(opened.unit_rows):
        columns = dict(read_columns(opened, int(unit), num_rows - num_read, list(rows)))
        rows = {name: rows[name] + cells(c) for name, c in columns.items() if not isinstance(c, Exception)}
        num_read += min(num_rows - num_read, int(opened.unit_rows[unit]))
        if num_read == num_rows:
            break
    return pandas.DataFrame({name: _series(opened, name, values) for name, values in rows.items()})


def _series(opened: OpenSource, name: str, values: list[Any]) -> Any:
    """Return values with their stored dtype, or as objects if there are nulls, text, tensors or lists."""
    import pandas

    field = opened.fields[name]
    is_plain = field.kind == "dense" and not field.shape and not field.dtype.startswith("arrow:")
    if is_plain and all(value is not None for value in values):
        return pandas.Series(np.array(values, field.dtype))
    objects = np.empty(len(values), object)
    objects[:] = [_as_array(value, field) if isinstance(value, list | np.ndarray) else value for value in values]
    return pandas.Series(objects)


def _as_array(value: Any, field: Field) -> np.ndarray:
    """Return a cell of numbers with the stored dtype, or of anything else, such as nulls, as NumPy stores it."""
    array = np.array(value)
    return array.astype(field.dtype) if array.dtype.kind in "biuf" and not field.dtype.startswith("arrow:") else array


def first_batch(source: Source, batch_size: int, shuffle: bool | int, seed: int) -> tuple[Any, ...]:
    """See `Source.batch`."""
    spec: Any = train_spec(
        Rows(source, source.open(), {}),
        batch_size=batch_size,
        shuffle=shuffle,
        class_weight=None,
        steps_per_epoch=None,
        scale=Scale(),
        seed=seed,
        floatx=current_floatx(),
    )
    rank_input = RankInput(spec.opened, spec.batch_spec, spec.plan, rank=0, num_ranks=1, local_replicas=1, num_steps=1)
    components = iter(next(iter(chunks_of(rank_input))).arrays)
    return spec.batch_spec.structure(
        [_batch_array(tensor, next(components), components) for tensor in spec.batch_spec.tensors]
    )


def _batch_array(tensor: ElementSpec, values: np.ndarray, components: Any) -> np.ndarray:
    """Return a tensor of a batch; a ragged one, whose row splits are the next component, as an object array."""
    if tensor.kind != "ragged":
        return values
    splits = next(components)
    rows = np.empty(len(splits) - 1, object)
    rows[:] = [values[a:b] for a, b in itertools.pairwise(splits)]
    return rows


def as_text(source: Source) -> str:
    """Return what `print(source)` shows."""
    title, options, columns = _description(source)
    lines = [title, *_aligned(list(options.items()), indent="  ")]
    if columns:
        lines += ["", *_aligned(columns)]
    return "\n".join(printable_line(line) for line in lines)


def as_html(source: Source) -> str:
    """Return what a notebook shows for a source."""
    title, options, columns = _description(source)
    tables = html.table(["option", "value"], list(options.items()), is_text=True)
    if columns:
        tables += html.table(columns[0], columns[1:], is_text=True)
    return html.line(title) + tables


def _description(source: Source) -> tuple[str, Mapping[str, str], list[tuple[str, ...]]]:
    """Return a title, the options, and a table of the columns with its header, or none if they are not known."""
    options = {name: str(value) for name, value in source.options().items()}
    name = type(source).__name__
    if not _opens_fast(source):
        return f"{name}: `source.schema` reads its columns", options, []
    try:
        opened = source.with_all_columns().open()
    except Exception as error:  # showing a source never fails
        return f"{name}: {str(error).splitlines()[0]}", options, []
    roles: dict[str, str] = {}
    for role in ROLES:
        for column in flat_names(getattr(source, role)):
            roles[column] = f"{roles[column]}, {role}" if column in roles else role
    table = [("column", "kind", "used as")]
    table += [(n, kind_of(f), roles.get(n, "")) for n, f in list(opened.fields.items())[:_MAX_SHOWN]]
    if len(opened.fields) > _MAX_SHOWN:
        table.append((f"and {len(opened.fields) - _MAX_SHOWN:,} more", "", ""))
    files = len(set(opened.files))
    title = f"{name}: {opened.num_rows:,} rows, {files:,} {'file' if files == 1 else 'files'}"
    return title, options, table  # type: ignore[return-value]


def _opens_fast(source: Source) -> bool:
    """Return whether opening a source neither uses a network nor loads nor computes its rows."""
    if isinstance(source, DatasetSource):
        return source.rows.are_ready
    if isinstance(source, NpySource):
        return source.archive is None and not any("://" in path for path in source.paths.values())
    if isinstance(source, ParquetSource):
        return not any("://" in path.removeprefix("file://") for path in source.paths)
    return True


def _aligned(rows: list[tuple[str, ...]], indent: str = "") -> list[str]:
    """Return the rows of a table as lines."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))] if rows else []
    return [
        indent + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
