"""How a new pipeline predicts a column: the last layer of its model, the loss and the classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from raykeras.core.errors import ColumnError
from raykeras.data.inspection import Column, Inspection
from raykeras.data.value_counts import ValueCounts

_MAX_CLASSES = 100  # of integers; more different values are predicted as numbers

_MAX_TEXT_CLASSES = 1000


@dataclass(frozen=True)
class Target:
    """The column that a model predicts.

    Attributes:
        column: Its name.
        kind: "binary" (0 or 1), "classes" (0 to num_classes - 1) or "number".
        shape: Shape of a row of numbers.
        num_classes: Number of classes.
        classes: The stored values of the classes, if they are not the integers from 0.
        mean, deviation: Of numbers, in the sample.
        is_sorted: Whether the rows are sorted by the column.
    """

    column: str
    kind: Literal["binary", "classes", "number"]
    shape: tuple[int, ...] = ()
    num_classes: int = 0
    classes: tuple[Any, ...] = ()
    mean: float = 0.0
    deviation: float = 1.0
    is_sorted: bool = False

    @property
    def loss(self) -> str:
        """The name of the loss."""
        return {
            "binary": "binary_crossentropy",
            "classes": "sparse_categorical_crossentropy",
            "number": "mean_squared_error",
        }[self.kind]

    @property
    def metric(self) -> str:
        """The name of the metric."""
        return "mean_absolute_error" if self.kind == "number" else "accuracy"


def target_of(inspection: Inspection, name: str) -> Target:
    """Return how to predict a column: few different integers and text as classes, other numbers by their value.

    Raises:
        ColumnError: If the column cannot be predicted.
    """
    column = inspection.column(name)
    _require_predictable(column)
    if column.field.shape:
        return Target(name, "number", shape=column.field.shape)
    sample = inspection.samples[name]
    if column.field.kind == "dense" and np.dtype(column.field.dtype).kind == "f":
        finite = np.array([value for value in sample.values if np.isfinite(value)])
        if set(finite.tolist()) == {0.0, 1.0} and column.range == (0.0, 1.0):
            return Target(name, "binary")
        return Target(name, "number", mean=float(finite.mean()), deviation=float(finite.std()) or 1.0)
    counts = inspection.balance(name)
    if column.field.kind == "string":
        return _text_target(column, counts)
    values = set(counts.counts)
    low, high = column.range or (min(values), max(values))
    if values <= {0, 1} and counts.is_complete:
        return Target(name, "binary", is_sorted=counts.is_sorted)
    if len(values) <= _MAX_CLASSES and low >= 0 and high < 2 * len(values):
        return Target(name, "classes", num_classes=int(high) + 1, is_sorted=counts.is_sorted)
    if len(values) <= 20 and counts.is_complete:
        ordered = tuple(sorted(values))
        return Target(name, "classes", num_classes=len(values), classes=ordered, is_sorted=counts.is_sorted)
    numbers = np.array(sample.values, float)
    mean, deviation = float(numbers.mean()), float(numbers.std()) or 1.0
    return Target(name, "number", mean=mean, deviation=deviation, is_sorted=counts.is_sorted)


def _text_target(column: Column, counts: ValueCounts) -> Target:
    if len(counts.counts) > _MAX_TEXT_CLASSES:
        raise ColumnError(
            f"A text to predict must have at most {_MAX_TEXT_CLASSES:,} different values; {column.name!r} has more. "
            "Choose another column with `--y`."
        )
    classes = tuple(sorted(counts.counts))
    return Target(column.name, "classes", num_classes=len(classes), classes=classes, is_sorted=counts.is_sorted)


def _require_predictable(column: Column) -> None:
    problem = ""
    if not column.is_usable:
        problem = f"cannot be used: {column.note}"
    elif column.num_nulls:
        problem = f"has {column.num_nulls:,} nulls; drop those rows when you write the data"
    elif column.field.kind == "list" or column.kind == "bytes":
        problem = f"contains {column.kind}"
    elif column.num_not_finite:
        problem = "contains NaN or infinite numbers; drop those rows when you write the data"
    elif not column.examples:
        problem = "has no values in the sample"
    if problem:
        raise ColumnError(f"The column to predict must have a value in every row; {column.name!r} {problem}.")
