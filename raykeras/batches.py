"""Batches that the user makes: `tf.data.Dataset`, a generator, a Keras `PyDataset` or `Sequence`.

Enters: what was passed as x. Leaves: global batches, pass after pass, and their layout; cut for the
replicas of a worker, or into the parts of all workers.

    tf.data      iterated anew each epoch, as Keras does
    Sequence     in an order of its own for each (seed, epoch) if shuffled; `on_epoch_end` is called
    generator    iterated once
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from raykeras.columns import ROLES, Layout, Role, Tensor
from raykeras.errors import OptionError
from raykeras.plan import replica_cuts

Kind = Literal["dataset", "sequence", "generator"]
Part = tuple[tuple[Any, ...], int]
"""A worker's part of a batch, and the rows of the whole batch."""


@dataclass
class Batches:
    """Batches as the user makes them.

    Attributes:
        data: What was passed.
        kind: What it is.
        num_batches: In a pass; None where it is not known.
        layout: Of a batch; unknown dimensions of a row are None.
        taken: Batches that were taken from a generator to learn its layout, and come first.
    """

    data: Any
    kind: Kind
    num_batches: int | None
    layout: Layout
    taken: tuple[Any, ...] = ()

    def passes(self, *, shuffle: bool, seed: int) -> Iterator[Iterator[tuple[Any, ...]]]:
        """Passes without end (one, of a generator), each of (x,), (x, y) or (x, y, sample_weight) of arrays."""
        if self.kind == "generator":
            yield self._generated()
            return
        epoch = 0
        while True:
            yield self._sequence(epoch, shuffle, seed) if self.kind == "sequence" else self._dataset()
            epoch += 1

    def order(self, epoch: int, shuffle: bool, seed: int) -> np.ndarray:
        """The numbers of a Sequence's batches in the order of an epoch: int64 (batches,)."""
        order = np.arange(len(self.data))
        if shuffle:
            np.random.Generator(np.random.PCG64(np.random.SeedSequence([3, seed, epoch]))).shuffle(order)
        return order

    def _generated(self) -> Iterator[tuple[Any, ...]]:
        for batch in itertools.chain(self.taken, self.data):
            yield as_tuple(batch)

    def _dataset(self) -> Iterator[tuple[Any, ...]]:
        for batch in self.data.as_numpy_iterator():
            yield as_tuple(batch)

    def _sequence(self, epoch: int, shuffle: bool, seed: int) -> Iterator[tuple[Any, ...]]:
        for index in self.order(epoch, shuffle, seed):
            yield as_tuple(self.data[int(index)])
        if hasattr(self.data, "on_epoch_end"):
            self.data.on_epoch_end()


def as_batches(data: Any, floatx: str) -> Batches | None:
    """What was passed as x, if it makes batches itself; else None.

    Raises:
        OptionError: If it makes none.
    """
    if hasattr(data, "element_spec") and hasattr(data, "cardinality"):
        cardinality = int(data.cardinality())
        layout = _layout(as_tuple(data.element_spec), lambda part: (part.dtype.name, tuple(part.shape)[1:]))
        return Batches(data, "dataset", cardinality if cardinality > 0 else None, layout)
    if {"PyDataset", "Sequence"} & {cls.__name__ for cls in type(data).__mro__} and hasattr(data, "__getitem__"):
        if not len(data):
            raise OptionError("A Sequence must have at least one batch; this one has none.")
        return Batches(data, "sequence", len(data), _layout_of([data[0], data[len(data) - 1]], floatx))
    if inspect.isgenerator(data):
        taken = tuple(itertools.islice(data, 2))
        if not taken:
            raise OptionError("A generator must yield at least one batch; this one yielded none.")
        return Batches(data, "generator", None, _layout_of(taken, floatx), taken)
    return None


def cut(batch: Sequence[Any], num_parts: int) -> list[Part]:
    """A batch of arrays as the parts of several workers, and the rows of the whole."""
    rows = len(_flat(batch[0])[0])
    cuts = replica_cuts(rows, num_parts)
    return [(_mapped(tuple(batch), slice(a, b)), rows) for a, b in zip(cuts, cuts[1:], strict=False)]


def _layout_of(batches: Sequence[Any], floatx: str) -> Layout:
    """The layout of batches of arrays; where their rows' shapes differ, a dimension is unknown."""

    def spec(array: Any) -> tuple[str, tuple[int | None, ...]]:
        array = np.asarray(array)
        dtype = {"O": "string", "S": "string", "U": "string", "f": floatx}.get(array.dtype.kind, array.dtype.name)
        return dtype, array.shape[1:]

    first, *others = (_layout(as_tuple(batch), spec) for batch in batches)
    tensors = list(first.tensors)
    for other in others:
        for i, (a, b) in enumerate(zip(tensors, other.tensors, strict=True)):
            shape = tuple(m if m == n else None for m, n in zip(a.shape, b.shape, strict=True))
            tensors[i] = dataclasses.replace(a, shape=shape)
    return dataclasses.replace(first, tensors=tuple(tensors))


def _layout(batch: tuple[Any, ...], spec: Any) -> Layout:
    tensors: list[Tensor] = []
    sequences: list[Role] = []
    for role, part in zip(ROLES, batch, strict=False):
        if part is None:
            continue
        if isinstance(part, list | tuple):
            sequences.append(role)
        for name, value in _named(part):
            dtype, shape = spec(value)
            tensors.append(Tensor(role, name, (), "string" if dtype == "string" else "dense", dtype, shape))
    return Layout(tuple(tensors), (), {}, (), {}, None, tuple(sequences))


def _named(part: Any) -> list[tuple[str | None, Any]]:
    if isinstance(part, Mapping):
        return [(str(name), value) for name, value in part.items()]
    if isinstance(part, list | tuple):
        return [(str(i), value) for i, value in enumerate(part)]
    return [(None, part)]


def _flat(part: Any) -> list[Any]:
    return [value for _, value in _named(part)]


def _mapped(value: Any, rows: slice) -> Any:
    if isinstance(value, Mapping):
        return {name: _mapped(part, rows) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return tuple(_mapped(part, rows) for part in value)
    return None if value is None else np.asarray(value)[rows]


def as_tuple(batch: Any) -> tuple[Any, ...]:
    """(x,), (x, y) or (x, y, sample_weight); what is no tuple is x alone, as in Keras."""
    if not isinstance(batch, tuple):
        return (batch,)
    while len(batch) > 1 and batch[-1] is None:
        batch = batch[:-1]
    if len(batch) > 3:
        raise OptionError(f"A batch must be (x,), (x, y) or (x, y, sample_weight); got a tuple of {len(batch)}.")
    return batch
