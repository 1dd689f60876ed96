"""Suggest which columns of a source are x, y and sample_weight, and the options that they need."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from raykeras.core.errors import ColumnError
from raykeras.data.inspection import Column, Inspection

InputKind = Literal["numbers", "categories", "text", "tensor"]
"""Stacked numbers; integers that are categories; text of few different values; an image, a vector or another tensor."""

_Y_NAMES = ("label", "labels", "target", "y", "class", "outcome", "output", "response")

_WEIGHT_NAMES = ("sample_weight", "weight", "weights")

_MAX_TEXT_VALUES = 1000

_MAX_PADDED = 1024


@dataclass(frozen=True)
class Input:
    """An input of a model.

    Attributes:
        kind: What its columns contain.
        columns: Its columns; several are stacked.
    """

    kind: InputKind
    columns: tuple[str, ...]


@dataclass(frozen=True)
class Suggestion:
    """The suggested arguments of a source.

    Attributes:
        inputs: The inputs by name.
        y: The column to predict; None if there is none.
        sample_weight: The column of weights; None if there is none.
        pad, fill: Options of the source.
        left_out: The reason for each column that is not used.
    """

    inputs: Mapping[str, Input]
    y: str | None
    sample_weight: str | None
    pad: Mapping[str, int]
    fill: Mapping[str, Any]
    left_out: Mapping[str, str]

    @property
    def x(self) -> Any:
        """The argument `x`: a column, a list of columns, or a dict of them by input."""
        specs = {name: self.spec_of(name) for name in self.inputs}
        return next(iter(specs.values())) if len(specs) == 1 else specs

    def spec_of(self, name: str) -> str | list[str]:
        """Return the columns of an input as an argument."""
        columns = self.inputs[name].columns
        return list(columns) if self.inputs[name].kind == "numbers" else columns[0]

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of `raykeras.parquet`."""
        named = {"x": self.x, "y": self.y, "sample_weight": self.sample_weight, "pad": self.pad, "fill": self.fill}
        return {name: value for name, value in named.items() if value}


def suggest(
    inspection: Inspection, *, x: Collection[str] = (), y: str | None = None, categories: Collection[str] = ()
) -> Suggestion:
    """Suggest arguments of a source.

    Args:
        inspection: What the source contains.
        x: The columns to use as inputs; all that are suitable, if there are none.
        y: The column to predict; by default the one whose name says so, or else the last with one value per row.
        categories: Columns of integers that are categories instead of numbers.

    Raises:
        ColumnError: If a column does not exist or cannot be used as requested.
    """
    for name in (*x, *categories, *([] if y is None else [y])):
        inspection.column(name)
    if y in x:
        raise ColumnError(f"y must not be an input as well; got {y!r} for both.")
    y = _y(inspection.columns) if y is None else y
    weight = next((c.name for c in inspection.columns if c.name in _WEIGHT_NAMES and _is_number(c)), None)
    weight = None if weight in (*x, y) else weight
    considered = [c for c in inspection.columns if (c.name in x if x else c.name not in (y, weight))]
    reasons = {c.name: _reason_against(c, is_chosen=c.name in x, is_category=c.name in categories) for c in considered}
    for name in x:
        if reasons[name]:
            raise ColumnError(f"The columns of x must be usable; {name!r} is not: {reasons[name]}.")
    used = [column for column in considered if not reasons[column.name]]
    return Suggestion(
        inputs=_inputs(used, categories),
        y=y,
        sample_weight=weight,
        pad={c.name: max(1, c.lengths[1]) for c in used if c.lengths and c.lengths[0] != c.lengths[1]},
        fill={c.name: fill_value(c, inspection.samples[c.name].values) for c in used if c.num_nulls},
        left_out={name: reason for name, reason in reasons.items() if reason},
    )


def fill_value(column: Column, values: Sequence[Any]) -> Any:
    """Return a value to replace nulls with: the median of the sampled values of numbers, an empty text, or zero."""
    if column.field.kind == "string":
        return ""
    if column.field.shape or not values:
        return 0
    numbers = np.array(values, float)
    median = float(np.median(numbers[np.isfinite(numbers)])) if np.isfinite(numbers).any() else 0.0
    kind = np.dtype(column.field.dtype).kind
    return False if kind == "b" else round(median, 4) if kind == "f" else int(median)


def _y(columns: Sequence[Column]) -> str | None:
    candidates = [c for c in columns if c.name not in _WEIGHT_NAMES and c.num_nulls == 0 and _is_single(c)]
    named = [c.name for wanted in _Y_NAMES for c in candidates if c.name.lower() == wanted]
    others = [c.name for c in candidates if not _reason_against(c, is_chosen=False, is_category=False)]
    return named[0] if named else others[-1] if others and len(columns) > 1 else None


def _is_single(column: Column) -> bool:
    return column.is_usable and column.field.kind != "list" and not column.field.shape and column.kind != "bytes"


def _is_number(column: Column) -> bool:
    return _is_single(column) and column.field.kind == "dense"


def _reason_against(column: Column, *, is_chosen: bool, is_category: bool) -> str:
    """Return why a column cannot be an input, or should not unless it was chosen; empty if nothing is against it."""
    if not column.is_usable:
        return column.note
    if column.kind == "bytes":
        return "bytes; decode them in a transform"
    if column.field.kind == "list":
        if column.num_nulls:
            return "null lists"
        if column.lengths and column.lengths[1] > _MAX_PADDED:
            return f"lists of up to {column.lengths[1]:,} values"
        return "" if column.lengths and column.lengths[1] else "empty lists"
    if is_category and not (_is_single(column) and np.dtype(column.field.dtype).kind in "iub"):
        return "not a column of integers"
    if column.field.kind == "string" and (column.num_distinct or 0) > _MAX_TEXT_VALUES:
        return f"text with more than {_MAX_TEXT_VALUES:,} different values"
    if not column.examples:
        return "nothing but nulls in the sample"
    if is_chosen:
        return ""
    if column.field.kind == "string" and column.is_mostly_distinct:
        return "text that differs in most rows"
    if re.search(r"(^|_)(id|index|key)$|^__index_level", column.name.lower()) and column.is_mostly_distinct:
        return "looks like a row's number"
    return ""


def _inputs(columns: Sequence[Column], categories: Collection[str]) -> dict[str, Input]:
    numbers = tuple(c.name for c in columns if _is_number(c) and c.name not in categories)
    inputs: dict[str, Input] = {"numbers": Input("numbers", numbers)} if numbers else {}
    for column in columns:
        if column.name not in numbers:
            kind: InputKind = (
                "text" if column.field.kind == "string" else "categories" if column.name in categories else "tensor"
            )
            inputs[_input_name(column.name, inputs)] = Input(kind, (column.name,))
    return inputs


def _input_name(column: str, taken: Collection[str]) -> str:
    """Return a name for an input that Keras accepts and that is not taken."""
    name = re.sub(r"\W+", "_", column, flags=re.ASCII).strip("_").lower() or "input"
    name = f"input_{name}" if name[0].isdigit() else name
    return name if name not in taken else next(n for i in range(2, len(taken) + 3) if (n := f"{name}_{i}") not in taken)
