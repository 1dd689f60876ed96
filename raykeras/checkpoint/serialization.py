"""Serialise Python values as JSON and NumPy arrays, without pickle.

Supported are None, numbers, strings, arrays, comparison functions, and lists, tuples, sets, deques and dicts of these.
"""

from __future__ import annotations

import collections
import itertools
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

_KIND = "raykeras"  # the key of a JSON object that stands for a value without a JSON form

_CONTAINERS: Mapping[str, Callable[[Any], Any]] = {
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "deque": collections.deque,
}

_COMPARISONS = ("less", "less_equal", "greater", "greater_equal")
"""Functions of NumPy and `keras.ops` that callbacks with a monitored metric store as attributes."""


class NotSerializableError(TypeError):
    """A value cannot be serialised as JSON and arrays."""


def to_json(value: Any, arrays: dict[str, np.ndarray], name: str) -> Any:
    """Convert a value to JSON-compatible values and arrays.

    Args:
        value: The value.
        arrays: Receives the arrays in the value, under names that begin with `name`.
        name: A unique name for the value.

    Returns:
        Values that `json` can write.

    Raises:
        NotSerializableError: The value, or something in it, is not supported.
    """
    if value is None or isinstance(value, bool | str) or type(value) in (int, float):
        return value
    if isinstance(value, np.generic):
        value = np.asarray(value)
    elif type(value).__module__.startswith("tensorflow") and hasattr(value, "numpy") and not hasattr(value, "assign"):
        value = np.asarray(value.numpy())
    if isinstance(value, np.ndarray):
        if value.dtype == object:
            raise NotSerializableError("an array of objects")
        arrays[name] = np.array(value)
        return {_KIND: "array", "name": name}
    if isinstance(value, list):
        return [to_json(item, arrays, f"{name}.{i}") for i, item in enumerate(value)]
    for kind, container in _CONTAINERS.items():
        if type(value) is container:
            return {_KIND: kind, "items": to_json(list(value), arrays, name)}
    if type(value) is dict:
        keys, values = list(value), list(value.values())
        return {_KIND: "dict", "keys": to_json(keys, arrays, f"{name}/k"), "values": to_json(values, arrays, name)}
    if callable(value):
        for package, name in itertools.product(("numpy", "keras"), _COMPARISONS):
            if value is _comparison(package, name):
                return {_KIND: "comparison", "package": package, "name": name}
    raise NotSerializableError(type(value).__name__)


def from_json(value: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    """Convert the results of `to_json` back to the original value.

    Args:
        value: What `to_json` returned.
        arrays: The arrays that it stored.

    Raises:
        ValueError: The value is not a result of `to_json`.
    """
    try:
        return _from_json(value, arrays)
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"It is not a serialised value: {type(error).__name__}: {error}.") from None


def _from_json(value: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    if isinstance(value, list):
        return [_from_json(item, arrays) for item in value]
    if not isinstance(value, dict):
        return value
    kind = value[_KIND]
    if kind == "array":
        array = arrays[value["name"]]
        return array[()] if array.ndim == 0 else array
    if kind == "dict":
        return dict(zip(_from_json(value["keys"], arrays), _from_json(value["values"], arrays), strict=True))
    if kind == "comparison":
        if value["package"] not in ("numpy", "keras") or value["name"] not in _COMPARISONS:
            raise KeyError(value["name"])
        return _comparison(value["package"], value["name"])
    return _CONTAINERS[kind](_from_json(value["items"], arrays))


def _comparison(package: str, name: str) -> Any:
    """Return a function of NumPy or `keras.ops`; None if Keras is not loaded."""
    if package == "numpy":
        return getattr(np, name)
    return getattr(getattr(sys.modules.get("keras"), "ops", None), name, None)
