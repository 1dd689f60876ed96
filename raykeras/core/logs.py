"""Convert the logs that Keras passes to callbacks to numbers and arrays.

Metrics with several values, such as `F1Score` with one per class, become arrays.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

Logs = dict[str, Any]
"""Metric name to a number or an array of numbers."""


def plain_logs(logs: Mapping[str, Any] | None) -> Logs:
    """Return logs as numbers and arrays; values that are not numbers are dropped."""
    plain: Logs = {}
    for name, value in (logs or {}).items():
        if isinstance(value, Mapping):  # Keras flattens these as well.
            plain |= plain_logs(value)
        elif (number := plain_number(value)) is not None:
            plain[str(name)] = number
    return plain


def plain_number(value: Any) -> Any:
    """Return a value as a number, or as an array if it holds several; None if it is not numeric."""
    try:
        array = np.asarray(value)
    except (TypeError, ValueError):
        return None
    if array.dtype.kind not in "biuf" and array.dtype.name != "bfloat16":
        return None
    if array.size != 1:
        return array
    return array.item() if array.dtype.kind in "iu" else float(array.item())


def as_json(logs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the logs of `plain_logs` with lists in place of arrays."""
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in logs.items()}


def scalars(logs: Mapping[str, Any]) -> dict[str, float]:
    """Return the values of `plain_logs` as numbers; those of an array with their index, such as `f1/0`."""
    numbers: dict[str, float] = {}
    for name, value in logs.items():
        if isinstance(value, np.ndarray):
            numbers |= {f"{name}/{index}": float(number) for index, number in enumerate(value.flat)}
        else:
            numbers[name] = float(value)
    return numbers
