"""What `raykeras inspect` prints: a table of the columns, warnings and a suggested source; or all of it as JSON."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping
from typing import Any

import numpy as np
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from raykeras.cli.literals import literal
from raykeras.core.errors import printable_line, redacted
from raykeras.data.inspection import Column, Inspection
from raykeras.data.sources.parquet import ParquetSource
from raykeras.data.suggestion import Suggestion
from raykeras.data.value_counts import ValueCounts

_MAX_COLUMNS, _MAX_VALUES, _MAX_SUGGESTED = 40, 20, 40

_CELL_LENGTH, _BAR_LENGTH = 24, 20


def show_inspection(
    inspection: Inspection, suggestion: Suggestion, balance: ValueCounts | None, data: str, *, all_columns: bool
) -> None:
    """Print an inspection.

    Args:
        inspection: What the source contains.
        suggestion: Suggested arguments of the source.
        balance: The values of a column, if they were counted.
        data: The source as the user named it.
        all_columns: Whether to list more than 40 columns.
    """
    console = Console(highlight=False)
    shown = inspection.columns if all_columns else inspection.columns[:_MAX_COLUMNS]
    console.print(_column_table(shown, inspection))
    if len(shown) < len(inspection.columns):
        console.print(f"and {len(inspection.columns) - len(shown):,} more columns; --all shows them")
    console.print(Text(_rows_line(inspection)))
    console.print(Text(_origins_line(inspection)))
    if balance is not None:
        console.print(Text(f"\nbalance of {_cell(balance.column)}, in {_counted(balance)}:"))
        console.print(_balance_table(balance))
    for warning in [*inspection.warnings, *balance_warnings(balance)]:
        console.print(Text.assemble(("\nwarning: ", "yellow"), printable_line(warning)))
    num_inputs = sum(len(model_input.columns) for model_input in suggestion.inputs.values())
    if 0 < num_inputs <= _MAX_SUGGESTED:
        console.print("\nsuggested source:")
        console.print(Text(f"  {suggested_call(suggestion, data)}"), soft_wrap=True)
    if num_inputs and suggestion.y is not None and isinstance(inspection.source, ParquetSource):
        console.print("\nnext, to write a pipeline that trains on it:")
        command = f"  raykeras new pipeline.py --data {shlex.quote(redacted(data))} --y {shlex.quote(suggestion.y)}"
        console.print(Text(printable_line(command)), soft_wrap=True)


def inspection_json(
    inspection: Inspection, suggestion: Suggestion, balance: ValueCounts | None, data: str
) -> dict[str, Any]:
    """Return an inspection as JSON values."""
    opened = inspection.opened
    rows = opened.unit_rows
    return {
        "data": redacted(data),
        "num_rows": opened.num_rows,
        "num_files": len(set(opened.files)),
        "num_row_groups": len(rows),
        "rows_per_row_group": {"min": int(rows.min()), "median": float(np.median(rows)), "max": int(rows.max())},
        "num_sampled_rows": inspection.num_sampled_rows,
        "columns": [_column_json(column) for column in inspection.columns],
        "balance": None if balance is None else _balance_json(balance),
        "warnings": [*inspection.warnings, *balance_warnings(balance)],
        "suggestion": {**suggestion.arguments(), "left_out": dict(suggestion.left_out)},
    }


def suggested_call(suggestion: Suggestion, data: str) -> str:
    """Return a call of `rk.parquet` as Python code."""
    arguments = [literal(redacted(data)), *(f"{name}={literal(v)}" for name, v in suggestion.arguments().items())]
    return f"rk.parquet({', '.join(arguments)})"


def balance_warnings(balance: ValueCounts | None) -> list[str]:
    """Return what to note about the values of a column."""
    if balance is None:
        return []
    warnings = []
    if balance.is_sorted:
        warnings.append(
            f"The rows are sorted by {balance.column!r}: `validation_split` would take the last values only. Shuffle "
            "the rows when you write them, or pass `validation_data`."
        )
    counts = list(balance.counts.values())
    if 1 < len(counts) <= _MAX_VALUES and counts[0] > 10 * counts[-1]:
        warnings.append(
            f"{balance.column!r} is imbalanced: its most frequent value occurs {counts[0] / counts[-1]:,.0f} times as "
            "often as the rarest. Pass `class_weight`, and metrics such as AUC."
        )
    return warnings


def _column_table(columns: tuple[Column, ...], inspection: Inspection) -> RenderableType:
    table = Table("column", "kind", box=None, pad_edge=False)
    for name in ("nulls", "range", "distinct", "examples"):
        table.add_column(name, justify="right" if name in ("nulls", "distinct") else "left")
    is_whole = inspection.num_sampled_rows == inspection.opened.num_rows
    for column in columns:
        nulls = "" if column.num_nulls is None else f"{column.num_nulls:,}{_mark(column.nulls_from)}"
        range_ = "" if column.range is None else f"{_number(column.range[0])} to {_number(column.range[1])}"
        range_ += _mark(column.range_from) if range_ else ""
        distinct = "" if column.num_distinct is None else f"{column.num_distinct:,}{'' if is_whole else '*'}"
        examples = ", ".join(_cell(value) for value in column.examples if np.ndim(value) == 0)
        cells = (_cell(column.name), printable_line(column.kind), nulls, range_, distinct, _cell(examples))
        table.add_row(*map(Text, cells))
    return table


def _mark(origin: str) -> str:
    return {"sample": "*", "some footers": "†"}.get(origin, "")


def _rows_line(inspection: Inspection) -> str:
    opened = inspection.opened
    units, num_files = opened.unit_rows, len(set(opened.files))
    sizes = " to ".join(f"{size:,}" for size in sorted({int(units.min()), int(units.max())}))
    files = f"{num_files:,} {'file' if num_files == 1 else 'files'}"
    each = " each" if len(units) > 1 else ""
    groups = f"{len(units):,} {_unit_name(inspection, len(units))}"
    cached = f"; {opened.num_cached_footers:,} footers from the cache" if opened.num_cached_footers else ""
    return f"\n{opened.num_rows:,} rows in {files}, {groups} of {sizes} rows{each}{cached}"


def _unit_name(inspection: Inspection, number: int) -> str:
    return ("row group" if inspection.num_footers else "unit") + ("" if number == 1 else "s")


def _origins_line(inspection: Inspection) -> str:
    sampled = f"{inspection.num_sampled_rows:,} sampled rows"
    if inspection.num_sampled_rows == inspection.opened.num_rows:
        sampled = "all rows"
    if not inspection.num_footers:
        return f"* from {sampled}"
    origins = {origin for column in inspection.columns for origin in (column.nulls_from, column.range_from)}
    parts = ["nulls and ranges from Parquet footers", f"* from {sampled}"]
    if "some footers" in origins:
        parts.insert(1, f"† from the first row groups of {inspection.num_footers:,} footers")
    return "; ".join(parts)


def _balance_table(balance: ValueCounts) -> RenderableType:
    table = Table("value", box=None, pad_edge=False)
    for name in ("rows", "share"):
        table.add_column(name, justify="right")
    table.add_column("")
    largest = max(balance.counts.values(), default=1)
    for value, count in list(balance.counts.items())[:_MAX_VALUES]:
        bar = "█" * max(1, round(_BAR_LENGTH * count / largest))
        table.add_row(*map(Text, (_cell(value), f"{count:,}", f"{count / max(1, balance.num_rows):.1%}", bar)))
    if len(balance.counts) > _MAX_VALUES:
        table.add_row(f"{len(balance.counts) - _MAX_VALUES:,} more values")
    if balance.num_nulls:
        table.add_row("null", f"{balance.num_nulls:,}", f"{balance.num_nulls / balance.num_rows:.1%}")
    return table


def _counted(balance: ValueCounts) -> str:
    return f"{'all' if balance.is_complete else 'the first'} {balance.num_rows:,} rows"


def _column_json(column: Column) -> dict[str, Any]:
    return {
        "name": column.name,
        "kind": column.kind,
        "dtype": column.field.dtype.removeprefix("arrow:"),
        "shape": list(column.field.shape),
        "usable": column.is_usable,
        "nulls": column.num_nulls,
        "nulls_from": column.nulls_from,
        "range": None if column.range is None else [_json_value(value) for value in column.range],
        "range_from": column.range_from,
        "lengths": None if column.lengths is None else list(column.lengths),
        "distinct_in_sample": column.num_distinct,
        "not_finite_in_sample": column.num_not_finite,
        "examples": [_json_value(value) for value in column.examples if np.ndim(value) == 0],
        "note": column.note,
    }


def _balance_json(balance: ValueCounts) -> dict[str, Any]:
    return {
        "column": balance.column,
        "values": [[_json_value(value), count] for value, count in balance.counts.items()],
        "nulls": balance.num_nulls,
        "num_rows": balance.num_rows,
        "all_rows": balance.is_complete,
    }


def _json_value(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, bool | int | float) else str(value)


def dumped(values: Mapping[str, Any]) -> str:
    """Return JSON text in which characters that control a terminal are escaped."""
    return json.dumps(values, indent=2, default=str)


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)


def _cell(value: Any) -> str:
    """Return a value as text of one line."""
    text = value if isinstance(value, str) else _number(value) if isinstance(value, int | float) else str(value)
    text = printable_line(text[: _CELL_LENGTH + 1])
    return text if len(text) <= _CELL_LENGTH else f"{text[: _CELL_LENGTH - 1]}…"
