"""Collect the weights that Keras saves in memory instead of a file."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np


class Buffers:
    """A pool of arrays for copies, since allocating new pages takes longer than copying.

    For a model of M bytes, including its optimizer, the pool grows to M bytes; to 2M if a snapshot is taken while the
    previous one is being written.
    """

    def __init__(self) -> None:
        self._free: dict[tuple[Any, ...], list[np.ndarray]] = {}

    def copy(self, array: np.ndarray) -> np.ndarray:
        """Return a copy, which the caller returns to the pool with `give_back`."""
        free = self._free.get((array.shape, array.dtype.str))
        if not free:
            return np.array(array)
        buffer = free.pop()
        np.copyto(buffer, array)
        return buffer

    def give_back(self, arrays: Iterable[np.ndarray]) -> None:
        """Return copies to the pool."""
        for array in arrays:
            self._free.setdefault((array.shape, array.dtype.str), []).append(array)


class VariableGroup(dict[str, np.ndarray]):
    """An in-memory stand-in for a group of Keras' weights file, which copies the arrays assigned to it."""

    def __init__(self, path: str, metadata: Any, buffers: Buffers) -> None:
        self.path, self.metadata, self._buffers = path, metadata, buffers

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, self._buffers.copy(viewed(value)))


def viewed(value: Any) -> np.ndarray:
    """Return a variable's values without a copy where possible; `numpy()` would copy them."""
    import tensorflow as tf

    if isinstance(value, np.ndarray):
        return value
    try:
        return np.asarray(memoryview(tf.convert_to_tensor(getattr(value, "value", value))))
    except (TypeError, ValueError):  # The buffer protocol has no bfloat16.
        return np.asarray(value)


def collecting_store(groups: list[VariableGroup], buffers: Buffers) -> type:
    """Return a replacement for Keras' `H5IOStore` that appends to `groups` instead of writing a file."""

    class CollectingStore:
        archive: Any = None

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            """Open nothing."""

        def make(self, path: str, metadata: Any = None) -> VariableGroup:
            groups.append(VariableGroup(path, metadata, buffers))
            return groups[-1]

        def close(self) -> None:
            """Close nothing."""

    return CollectingStore
