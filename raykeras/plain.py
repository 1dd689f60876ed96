"""Plain values as JSON and arrays, without a pickle.

Enters: numbers, text, arrays, and lists, tuples, sets and dicts of them. Leaves: what `json` writes, the
arrays beside it by name; and, later, the same values.
"""

from __future__ import annotations

import collections
import itertools
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

_KIND = "raykeras"  # the key that marks a value which JSON has no form for
_CONTAINERS: Mapping[str, Callable[[Any], Any]] = {
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "deque": collections.deque,
}
_COMPARISONS = ("less", "less_equal", "greater", "greater_equal")
"""Functions of NumPy and `keras.ops`, one of which a callback that monitors a metric keeps."""


class NotPlainError(TypeError):
    """A value is not plain."""


def to_plain(value: Any, arrays: dict[str, np.ndarray], name: str) -> Any:
    """A value as JSON takes it.

    Args:
        value: The value.
        arrays: Takes the arrays in it, under names that begin with `name`.
        name: Of the value; unique.

    Raises:
        NotPlainError: If it, or something in it, is not plain.
    """
    if value is None or isinstance(value, bool | str) or type(value) in (int, float):
        return value
    if isinstance(value, np.generic):
        value = np.asarray(value)
    elif type(value).__module__.startswith("tensorflow") and hasattr(value, "numpy") and not hasattr(value, "assign"):
        value = np.asarray(value.numpy())
    if isinstance(value, np.ndarray):
        if value.dtype == object:
            raise NotPlainError("an array of objects")
        arrays[name] = np.array(value)
        return {_KIND: "array", "name": name}
    if isinstance(value, list):
        return [to_plain(item, arrays, f"{name}.{i}") for i, item in enumerate(value)]
    for kind, container in _CONTAINERS.items():
        if type(value) is container:
            return {_KIND: kind, "items": to_plain(list(value), arrays, name)}
    if type(value) is dict:
        keys, values = list(value), list(value.values())
        return {_KIND: "dict", "keys": to_plain(keys, arrays, f"{name}/k"), "values": to_plain(values, arrays, name)}
    if callable(value):
        for package, name in itertools.product(("numpy", "keras"), _COMPARISONS):
            if value is _comparison(package, name):
                return {_KIND: "comparison", "package": package, "name": name}
    raise NotPlainError(type(value).__name__)


def from_plain(value: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    """Return the value that `to_plain` was given.

    Raises:
        ValueError: `to_plain` did not write it.
    """
    try:
        return _from_plain(value, arrays)
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"It is no plain value: {type(error).__name__}: {error}.") from None


def _from_plain(value: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    if isinstance(value, list):
        return [_from_plain(item, arrays) for item in value]
    if not isinstance(value, dict):
        return value
    kind = value[_KIND]
    if kind == "array":
        array = arrays[value["name"]]
        return array[()] if array.ndim == 0 else array
    if kind == "dict":
        return dict(zip(_from_plain(value["keys"], arrays), _from_plain(value["values"], arrays), strict=True))
    if kind == "comparison":
        if value["package"] not in ("numpy", "keras") or value["name"] not in _COMPARISONS:
            raise KeyError(value["name"])
        return _comparison(value["package"], value["name"])
    return _CONTAINERS[kind](_from_plain(value["items"], arrays))


def _comparison(package: str, name: str) -> Any:
    """Return a function of NumPy or of `keras.ops`; None where Keras is not loaded."""
    if package == "numpy":
        return getattr(np, name)
    return getattr(getattr(sys.modules.get("keras"), "ops", None), name, None)
