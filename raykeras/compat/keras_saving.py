"""Copy the weights that Keras saves into memory, and write the copies to a file later."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from raykeras.compat.keras_api import KerasAPI


class Buffers:
    """A pool of arrays for copies, since allocating new pages takes longer than copying.

    For a model of M bytes, including its optimizer, the pool grows to M bytes; to 2M if a snapshot is taken while the
    previous one is being written.
    """

    def __init__(self) -> None:
        self._free: dict[tuple[Any, ...], list[np.ndarray]] = {}

    def copy(self, array: np.ndarray) -> np.ndarray:
        """Return a copy, which the caller returns to the pool with `release`."""
        free = self._free.get((array.shape, array.dtype.str))
        if not free:
            return np.array(array)
        buffer = free.pop()
        np.copyto(buffer, array)
        return buffer

    def release(self, arrays: Iterable[np.ndarray]) -> None:
        """Return copies to the pool."""
        for array in arrays:
            self._free.setdefault((array.shape, array.dtype.str), []).append(array)


class VariableGroup(dict[str, np.ndarray]):
    """An in-memory stand-in for a group of Keras' weights file, which copies the arrays assigned to it."""

    def __init__(self, path: str, metadata: Any, buffers: Buffers) -> None:
        self.path, self.metadata, self._buffers = path, metadata, buffers

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, self._buffers.copy(_viewed(value)))


def _viewed(value: Any) -> np.ndarray:
    """Return a variable's values without a copy where possible; `numpy()` would copy them."""
    import tensorflow as tf

    if isinstance(value, np.ndarray):
        return value
    try:
        return np.asarray(memoryview(tf.convert_to_tensor(getattr(value, "value", value))))
    except (TypeError, ValueError):  # The buffer protocol has no bfloat16.
        return np.asarray(value)


@dataclass(frozen=True)
class CopiedWeights:
    """Copies of the weights that Keras saved.

    Attributes:
        store: The class of Keras that writes weights to a file.
        buffers: Pool of memory for the copies.
        groups: The copies, by the groups of the file.
    """

    store: Any
    buffers: Buffers
    groups: list[VariableGroup] = field(default_factory=list)

    def write(self, path: str) -> None:
        """Write the weights to a new HDF5 file."""
        store = self.store(path, mode="w")
        for group in self.groups:
            stored_group = store.make(group.path, **({"metadata": group.metadata} if group.metadata else {}))
            for name, value in group.items():
                stored_group[name] = value
        store.close()

    def release(self) -> None:
        """Return the memory to the pool; nothing is left to write."""
        for group in self.groups:
            self.buffers.release(group.values())
        self.groups.clear()


@contextlib.contextmanager
def weights_copied(api: KerasAPI, buffers: Buffers) -> Iterator[CopiedWeights | None]:
    """Have Keras copy the weights that it saves instead of writing them to a file while the block runs.

    Yields:
        The copies; None if this version of Keras writes them to a file.
    """
    store = api.names.H5_STORE.find()
    if store is None:
        yield None
        return
    copied = CopiedWeights(store, buffers)
    with api.names.H5_STORE.replaced(_copying_store(copied)):
        yield copied


def _copying_store(copied: CopiedWeights) -> type:
    """Return a replacement for Keras' `H5IOStore` that copies weights instead of writing a file."""

    class CopyingStore:
        archive: Any = None

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            """Open nothing."""

        def make(self, path: str, metadata: Any = None) -> VariableGroup:
            copied.groups.append(VariableGroup(path, metadata, copied.buffers))
            return copied.groups[-1]

        def close(self) -> None:
            """Close nothing."""

    return CopyingStore
