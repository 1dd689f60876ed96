"""Whether a scalar loss is a mean or a sum over the rows of a batch.

Enters: a compiled model under its strategy, and some rows. Leaves: `Scalars`, the kind of every loss
that user code hands over as one number, in the order in which a step computes them.

Such a number does not say what it is, but it can be asked: over the same rows twice, a mean stays
and a sum doubles; and both follow from those of two halves of the rows, which a loss over pairs of rows
does not. On several replicas a mean counts by the replica's share of the rows, a sum by one. A
loss of Keras' own that a layer calls has been weighed by the share already, which shows where the same
rows are said to be half of a batch. One that is nothing at first, as the divergence of a variational
model whose last layers start at zero, is asked again with weights and rows that are not.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import tensorflow as tf

from raykeras.errors import ModelError

Kind = Literal["mean", "sum", "part"]
"""A mean or a sum over a replica's rows; or a mean that Keras has weighed by the replica's share already."""

_TOLERANCE = 1e-3  # relative; float32 over a few rows
_NOTHING = 1e-12
_NOISE = 0.1

Answer = tuple[float, float, float, float, float]
"""A scalar over some rows, the same rows twice, them as half of a batch, their first half, and their second half."""


@dataclass(frozen=True)
class Scalars:
    """The kinds of the scalar losses of a step.

    Attributes:
        losses: Of the compiled losses that return a scalar, in the order of the outputs.
        added: Of those added by `add_loss` and of regularizers, in the order of `model.losses`.
    """

    losses: tuple[Kind, ...] = ()
    added: tuple[Kind, ...] = ()


@dataclass
class Record:
    """Scalars as a step computes them."""

    losses: list[Any] = field(default_factory=list)
    added: list[Any] = field(default_factory=list)


_current = threading.local()  # per thread, since a strategy runs each replica in a thread of its own


def current_record() -> Record | None:
    """Where this thread's step should note its scalars; None outside of `ask`."""
    return getattr(_current, "record", None)


def ask(
    model: Any,
    sample: Sequence[Any],
    structure: Callable[[Sequence[Any]], Any],
    strategy: Any,
    set_share: Callable[[float | None], None],
) -> Scalars:
    """Computes the losses of a few rows, of the same rows twice, of them as half of a batch, and of their halves.

    Args:
        model: A built and compiled model.
        sample: Tensors of a few rows, in the order of the layout.
        structure: Makes Keras' (x, y, sample_weight) of them.
        strategy: Whose scope the model was built in.
        set_share: Says, for the replica that calls it, which share of a batch its rows are.

    Raises:
        ModelError: If a scalar is neither a mean nor a sum.
    """
    answers = functools.partial(_answers, model, structure=structure, strategy=strategy, set_share=set_share)
    losses, added = answers(sample)
    if any(abs(once) <= _NOTHING for once, *_ in (*losses, *added)):
        rng = np.random.default_rng(0)
        with _shaken(model, strategy, rng):
            shaken = answers([_shake(tensor, rng) for tensor in sample])
        losses, added = (
            [b if abs(a[0]) <= _NOTHING and np.isfinite(b).all() else a for a, b in zip(first, second, strict=True)]
            for first, second in zip((losses, added), shaken, strict=True)
        )
    return Scalars(
        tuple(_kind(values, "compiled loss", i) for i, values in enumerate(losses)),
        tuple(_kind(values, "`add_loss`", i) for i, values in enumerate(added)),
    )


def _answers(
    model: Any, sample: Sequence[Any], *, structure: Any, strategy: Any, set_share: Any
) -> tuple[list[Answer], list[Answer]]:
    """The answers of the compiled losses, and of the added ones."""
    middle = int(sample[0].shape[0]) // 2
    if not middle:  # a single row
        sample, middle = [tf.concat([t, t], 0) for t in sample], 1
    sample = [t[: 2 * middle] for t in sample]
    doubled = [tf.concat([t, t], 0) for t in sample]
    first, second = [t[:middle] for t in sample], [t[middle:] for t in sample]
    asked = ((sample, 1.0), (doubled, 1.0), (sample, 0.5), (first, 1.0), (second, 1.0))
    records = [_compute(model, structure(rows), strategy, share, set_share) for rows, share in asked]
    return (
        list(zip(*(record.losses for record in records), strict=True)),
        list(zip(*(record.added for record in records), strict=True)),
    )


@contextlib.contextmanager
def _shaken(model: Any, strategy: Any, rng: np.random.Generator) -> Iterator[None]:
    """A little noise on the weights."""
    with strategy.scope():
        kept = [(weight, weight.numpy()) for weight in model.trainable_weights]
        try:
            for weight, value in kept:
                weight.assign(value + rng.normal(0, _NOISE, value.shape).astype(value.dtype))
            yield
        finally:
            for weight, value in kept:
                weight.assign(value)


def _shake(tensor: Any, rng: np.random.Generator) -> Any:
    """A little noise on what is no class, text or index."""
    flat = tensor.flat_values if isinstance(tensor, tf.RaggedTensor) else tensor
    if not flat.dtype.is_floating:
        return tensor
    noisy = flat + tf.cast(rng.normal(0, _NOISE, flat.shape), flat.dtype)
    return tensor.with_flat_values(noisy) if isinstance(tensor, tf.RaggedTensor) else noisy


def _compute(
    model: Any, batch: tuple[Any, ...], strategy: Any, share: float, set_share: Callable[[float | None], None]
) -> Record:
    """The scalars of a batch, on one replica; the others of this worker compute the same."""
    x, y = batch[0], batch[1] if len(batch) > 1 else None

    def step() -> tuple[list[Any], list[Any]]:
        set_share(share)
        try:
            with _recording() as record:
                model.compute_loss(x, y, model(x, training=False), None)
        finally:
            set_share(None)
        return record.losses, record.added

    losses, added = strategy.experimental_local_results(strategy.run(step))[0]
    return Record([np.asarray(v) for v in losses], [np.asarray(v) for v in added])


@contextlib.contextmanager
def _recording() -> Iterator[Record]:
    _current.record = Record()
    try:
        yield _current.record
    finally:
        _current.record = None


def _kind(answer: Answer, what: str, index: int) -> Kind:
    once, twice, half, first, second = answer
    if abs(once) > _NOTHING and np.isclose(once, 2 * half, rtol=_TOLERANCE):
        return "part"
    allowed = _TOLERANCE * max(abs(first), abs(second)) + _NOTHING
    if np.isclose(once, twice, rtol=_TOLERANCE, atol=_NOTHING) and abs(once - (first + second) / 2) <= allowed:
        return "mean"
    if np.isclose(2 * once, twice, rtol=_TOLERANCE, atol=_NOTHING) and abs(once - first - second) <= allowed:
        return "sum"
    raise ModelError(
        "On several replicas a loss that is a scalar must be a mean or a sum over the rows of a batch, so that the "
        f"parts of a batch can be put together; number {index} of those from {what} is {once:g} over some rows, "
        f"{twice:g} over the same rows twice, and {first:g} and {second:g} over their halves. Return one value for "
        "each row, or train on one replica."
    )
