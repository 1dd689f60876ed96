"""Plain values as JSON and arrays, without a pickle.

Enters: numbers, text, arrays, and lists, tuples, sets and dicts of them. Leaves: what `json` writes, the
arrays beside it by name; and, later, the same values.
"""

from __future__ import annotations

import collections
import importlib
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
_PACKAGES = ("keras", "tf_keras", "numpy")


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
    path = f"{getattr(value, '__module__', None)}:{getattr(value, '__name__', None)}"
    if callable(value) and _function(path) is value:
        return {_KIND: "function", "path": path}
    raise NotPlainError(type(value).__name__)


def from_plain(value: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    """The value that `to_plain` was given."""
    if isinstance(value, list):
        return [from_plain(item, arrays) for item in value]
    if not isinstance(value, dict):
        return value
    kind = value[_KIND]
    if kind == "array":
        array = arrays[value["name"]]
        return array[()] if array.ndim == 0 else array
    if kind == "dict":
        return dict(zip(from_plain(value["keys"], arrays), from_plain(value["values"], arrays), strict=True))
    if kind == "function":
        return _function(value["path"])
    return _CONTAINERS[kind](from_plain(value["items"], arrays))


def _function(path: str) -> Any:
    """A function of Keras or NumPy by its module and name; None if it is none."""
    module, _, name = path.partition(":")
    if module.split(".")[0] not in _PACKAGES:
        return None
    return getattr(importlib.import_module(module), name, None)
