"""Keras' logs as plain values.

Enters: logs as a callback gets them. Leaves: metric to a float, or to an array where a metric has several values, such
as `F1Score` with one for each class.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

Logs = dict[str, Any]
"""Metric to a float, or to an array of numbers."""


def plain_logs(logs: Mapping[str, Any] | None) -> Logs:
    """Return logs as floats and arrays; what is no number is left out."""
    plain: Logs = {}
    for name, value in (logs or {}).items():
        if isinstance(value, Mapping):  # which Keras flattens, too
            plain |= plain_logs(value)
        elif (number := plain_number(value)) is not None:
            plain[str(name)] = number
    return plain


def plain_number(value: Any) -> Any:
    """Return a float, or an array where there are several values; None if it is no number."""
    try:
        array = np.asarray(value)
    except (TypeError, ValueError):
        return None
    if array.dtype.kind not in "biuf" and array.dtype.name != "bfloat16":
        return None
    return float(array.item()) if array.size == 1 else array


def as_json(logs: Mapping[str, Any]) -> dict[str, Any]:
    """Return plain logs with lists in place of arrays."""
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in logs.items()}
