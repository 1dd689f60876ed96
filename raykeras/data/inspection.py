"""What a source contains: its columns, rows and row groups, and what to note before training on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from raykeras.core.errors import ColumnError
from raykeras.data.column_sample import ColumnSample, is_unusable, sample_columns
from raykeras.data.sources.base import Field, OpenSource, Source
from raykeras.data.sources.parquet import ParquetSource
from raykeras.data.sources.parquet_checks import UnreadableColumn
from raykeras.data.sources.parquet_statistics import FooterStatistics, footer_statistics
from raykeras.data.storage_warnings import storage_warnings
from raykeras.data.value_counts import ValueCounts, count_values

_MAX_NAMED = 5  # columns that a warning names

Origin = Literal["footers", "some footers", "sample", "all rows"]
"""What a figure was computed from."""


@dataclass(frozen=True)
class Column:
    """A column of a source.

    Attributes:
        name: Its name.
        kind: Its kind in plain words, such as "image 8×8, uint8".
        field: Its type.
        is_usable: Whether it can become a tensor; nulls and lists of different lengths need `fill`, `pad` or `ragged`.
        note: What to do before it can be used, or what is unusual.
        num_nulls: Rows that are null; None if it cannot be read.
        range: Least and greatest number; None if there is none.
        lengths: Least and greatest length of lists in the sample.
        num_distinct: Different values in the sample; None for tensors, lists and columns that cannot be read.
        is_mostly_distinct: Whether the sample has at least 20 values, and most of them occur once.
        examples: Up to three values.
        num_not_finite: Numbers in the sample that are NaN or infinite.
        nulls_from, range_from: What the figures were computed from.
    """

    name: str
    kind: str
    field: Field
    is_usable: bool
    note: str
    num_nulls: int | None
    range: tuple[Any, Any] | None
    lengths: tuple[int, int] | None
    num_distinct: int | None
    is_mostly_distinct: bool
    examples: tuple[Any, ...]
    num_not_finite: int
    nulls_from: Origin
    range_from: Origin


@dataclass(frozen=True)
class Inspection:
    """What `inspect_source` found.

    Attributes:
        source: The source.
        opened: Its metadata.
        columns: The columns, in stored order.
        samples: The samples of the columns.
        num_sampled_rows: Rows that were sampled.
        num_footers: Footers whose statistics were read.
        warnings: What slows down training or needs an option.
    """

    source: Source
    opened: OpenSource
    columns: tuple[Column, ...]
    samples: Mapping[str, ColumnSample]
    num_sampled_rows: int
    num_footers: int
    warnings: tuple[str, ...]

    def column(self, name: str) -> Column:
        """Return a column; raises ColumnError if there is none of this name."""
        self.opened.field(name)
        return next(column for column in self.columns if column.name == name)

    def balance(self, name: str) -> ValueCounts:
        """Count the values of a column.

        Raises:
            ColumnError: If there is no such column, or it has no single value per row.
            SourceError: If the column cannot be read.
        """
        column = self.column(name)
        if not column.is_usable or column.field.kind == "list" or column.field.shape:
            raise ColumnError(
                f"Balance is counted for columns with one number or text per row; {name!r} is {column.kind}."
            )
        return count_values(self.opened, name)


def inspect_source(source: Source) -> Inspection:
    """Inspect a source: its metadata, the statistics in its footers, and a sample of its rows.

    Raises:
        SourceError: If files are missing, unreadable or without rows.
    """
    opened = source.with_all_columns().open()
    footers = footer_statistics(source, opened) if isinstance(source, ParquetSource) else FooterStatistics()
    samples = sample_columns(opened, list(opened.fields))
    columns = tuple(_column(field, opened, footers, samples[field.name]) for field in opened.fields.values())
    num_rows = max((sample.num_rows for sample in samples.values()), default=0)
    warnings = [*storage_warnings(opened, footers.group_nbytes), *_column_warnings(columns)]
    return Inspection(source, opened, columns, samples, num_rows, footers.num_files, tuple(warnings))


def kind_of(field: Field, lengths: tuple[int, int] | None = None) -> str:
    """Return a column's kind in plain words.

    Args:
        field: The column.
        lengths: For lists, the least and the greatest known length.
    """
    dtype = field.dtype.removeprefix("arrow:")
    if dtype != field.dtype:
        return f"not usable: {dtype}"
    if field.kind == "string":
        return "bytes" if dtype == "bytes" else "text"
    if field.kind == "list":
        low, high = lengths or (field.shape or (None,)) * 2
        if low is None:
            return f"lists of {dtype}"
        return f"lists of {low} {dtype}" if low == high else f"lists of {low} to {high} {dtype}"
    if field.shape:
        return f"{_shape_word(field)} {'×'.join(map(str, field.shape))}, {dtype}"
    return {"b": "true or false", "f": f"number, {dtype}"}.get(np.dtype(dtype).kind, f"integer, {dtype}")


def _shape_word(field: Field) -> str:
    if len(field.shape) == 1:
        return "vector"
    has_channels = len(field.shape) == 3 and field.shape[-1] in (1, 3, 4)
    is_image = has_channels or (len(field.shape) == 2 and field.dtype == "uint8")
    return "image" if is_image else "matrix" if len(field.shape) == 2 else "tensor"


def _column(field: Field, opened: OpenSource, footers: FooterStatistics, sample: ColumnSample) -> Column:
    statistics = footers.columns.get(field.name)
    footers_name: Origin = "footers" if footers.is_complete else "some footers"
    is_whole: Origin = "all rows" if sample.num_rows == opened.num_rows else "sample"
    nulls, nulls_from, range_, range_from = sample.num_nulls, is_whole, sample.range, is_whole
    if statistics is not None and statistics.num_nulls is not None:
        nulls, nulls_from = statistics.num_nulls, footers_name
    if statistics is not None and statistics.range is not None:
        range_, range_from = statistics.range, footers_name
    problem = opened.unusable.get(field.name)
    error = str(problem) if isinstance(problem, UnreadableColumn) else sample.error
    is_readable = error is None
    lengths = sample.lengths if field.kind == "list" else None
    is_usable = is_readable and not is_unusable(opened, field.name)
    is_single = is_usable and field.kind != "list" and not field.shape
    return Column(
        name=field.name,
        kind=kind_of(field, lengths) if is_readable else "cannot be read",
        field=field,
        is_usable=is_usable,
        note=error or _note(field, sample, nulls, lengths),
        num_nulls=nulls if is_readable else None,
        range=range_ if is_usable and field.kind != "string" else None,
        lengths=lengths,
        num_distinct=sample.num_distinct if is_single else None,
        is_mostly_distinct=len(sample.values) >= 20 and sample.num_distinct > len(sample.values) / 2,
        examples=tuple(sample.examples),
        num_not_finite=sample.num_not_finite,
        nulls_from=nulls_from,
        range_from=range_from,
    )


def _note(field: Field, sample: ColumnSample, nulls: int, lengths: tuple[int, int] | None) -> str:
    if field.dtype.startswith("arrow:"):
        return f"it is {field.dtype.removeprefix('arrow:')}; convert it when you write the data"
    if nulls and field.kind == "list":
        return "has null lists; write empty lists instead"
    if nulls:
        return "has nulls: pass `fill`"
    if lengths and lengths[0] != lengths[1]:
        return "lengths differ: pass `pad` or `ragged`"
    if sample.num_not_finite:
        return "contains NaN or infinite numbers"
    return ""


def _column_warnings(columns: Sequence[Column]) -> list[str]:
    """Return warnings that are shown once for all columns that they are about."""
    ragged = [c for c in columns if c.is_usable and c.lengths and c.lengths[0] != c.lengths[1]]
    nulls = [c for c in columns if c.is_usable and c.num_nulls and c.field.kind != "list"]
    null_lists = [c for c in columns if c.is_usable and c.num_nulls and c.field.kind == "list"]
    encoded = [c for c in columns if c.is_usable and c.kind == "bytes"]
    not_finite = [c for c in columns if c.num_not_finite]
    unusable = [c for c in columns if not c.is_usable]
    more = [f"{len(unusable) - _MAX_NAMED:,} more columns cannot be used."] if len(unusable) > _MAX_NAMED else []
    return [
        *_about("Lists of different lengths need `pad={column: length}` or `ragged=[column]`", ragged),
        *_about("Nulls need `fill={column: value}`, if these columns are used", nulls),
        *_about("Bytes, such as encoded images, need a `transform` that decodes them", encoded),
        *_about("Null lists cannot be used; write empty lists instead", null_lists),
        *_about(
            "NaN and infinite numbers make the loss NaN; replace them in a transform",
            not_finite,
        ),
        *(f"{column.name!r} cannot be used: {column.note}" for column in unusable[:_MAX_NAMED]),
        *more,
    ]


def _about(text: str, columns: Sequence[Column]) -> list[str]:
    if not columns:
        return []
    more = f" and {len(columns) - _MAX_NAMED:,} more" if len(columns) > _MAX_NAMED else ""
    return [f"{text}: {', '.join(repr(column.name) for column in columns[:_MAX_NAMED])}{more}."]
