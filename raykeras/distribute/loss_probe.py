"""Classify scalar losses as means or sums over the rows of a batch.

A scalar from user code does not show which it is, but it can be probed: over the same rows twice, a mean is unchanged
and a sum doubles, and both follow from their values over two halves of the rows, unlike a loss over pairs of rows. On
several replicas, a mean is weighted by the replica's share of the rows, and a sum is not weighted.

A Keras loss that a layer calls is already weighted by the share: its value halves when the same rows are declared to be
half of a batch. A scalar that is zero at first, such as the divergence of a variational model whose last layers start
at zero, is probed again with perturbed weights and rows.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import tensorflow as tf

from raykeras.compat.quiet import without_eager_strategy_warning
from raykeras.core.errors import ModelError

Kind = Literal["mean", "sum", "part"]
"""A mean or a sum over a replica's rows, or a mean that Keras has already weighted by the replica's share."""

Answer = tuple[float, float, float, float, float]
"""A scalar over some rows, over the rows twice, over the rows as half of a batch, and over each of their halves."""

_TOLERANCE = 1e-3  # relative; for float32 over a few rows
_LOW_PRECISION_TOLERANCE = 0.05  # for float16 and bfloat16
_ZERO = 1e-12  # absolute; smaller values count as zero
_NOISE_STDDEV = 0.1


@dataclass(frozen=True)
class Scalars:
    """The kinds of the scalar losses of a step.

    Attributes:
        losses: Kinds of the compiled losses that return a scalar, in the order of the outputs.
        added: Kinds of the losses of `add_loss` and of regularizers, in the order of `model.losses`.
        total: Kind of the result of a custom `compute_loss`; None if there is none.
        metrics: Kinds of the scalars that layers pass to `add_metric`, by name; those that are neither are left out.
    """

    losses: tuple[Kind, ...] = ()
    added: tuple[Kind, ...] = ()
    total: Kind | None = None
    metrics: Mapping[str, Kind] = field(default_factory=dict)


@dataclass
class Record:
    """The scalars that a step computes, in order.

    Attributes:
        losses, added: As for `Scalars`.
        totals: The result of `compute_loss`.
        metrics: The scalars that layers passed to `add_metric`, by name.
        is_precise: Whether all of them are float32 or wider.
    """

    losses: list[Any] = field(default_factory=list)
    added: list[Any] = field(default_factory=list)
    totals: list[Any] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)
    is_precise: bool = True


@dataclass(frozen=True)
class _Answers:
    losses: list[Answer]
    added: list[Answer]
    totals: list[Answer]
    metrics: dict[str, Answer]
    tolerance: float

    def kinds_of_metrics(self) -> dict[str, Kind]:
        kinds = {name: _kind(values, self.tolerance) for name, values in self.metrics.items()}
        return {name: kind for name, kind in kinds.items() if kind is not None}


_current = threading.local()  # a strategy runs each replica in a separate thread


def current_record() -> Record | None:
    """Return the record for the scalars of this thread's step; None outside a probe."""
    return getattr(_current, "record", None)


class Probe:
    """Classifies the scalar losses of a model by computing them over different sets of rows.

    Args:
        model: A built and compiled model.
        structure: Arranges tensors in the order of the batch spec as Keras' (x, y, sample_weight).
        strategy: The strategy whose scope the model was built in.
        set_share: Sets the share of the batch, 0 to 1, that the calling replica's rows are, and whether losses stay
            unweighted; None after the step.
        training: Whether the model will be trained; passed to a `compute_loss` that takes it.
        has_custom_loss: Whether the model overrides `compute_loss`.
    """

    def __init__(
        self,
        model: Any,
        structure: Callable[[Sequence[Any]], Any],
        strategy: Any,
        set_share: Callable[..., None],
        training: bool,
        has_custom_loss: bool,
    ) -> None:
        self._model, self._structure, self._strategy, self._set_share = model, structure, strategy, set_share
        self._has_custom_loss = has_custom_loss
        takes_training = "training" in inspect.signature(model.compute_loss).parameters
        self._options = {"training": training} if takes_training else {}

    def scalars(self, sample: Sequence[Any]) -> Scalars:
        """Return the kinds of the model's scalar losses.

        Args:
            sample: Tensors of a few rows, in the order of the batch spec.

        Raises:
            ModelError: If a scalar is neither a mean nor a sum.
        """
        with without_eager_strategy_warning(), state_kept(self._model, self._strategy):
            answers = self._answers(sample, is_raw=False)
            total: Kind | None = None
            if self._has_custom_loss:
                total = "part" if _is_part(answers.totals[0], answers.tolerance) else None
            if self._has_custom_loss and total is None:
                raw = self._answers(sample, is_raw=True)
                total = _required_kind(raw.totals[0], raw.tolerance, "`compute_loss`", 0)
                return Scalars(total=total, metrics=answers.kinds_of_metrics())
        return Scalars(
            tuple(_required_kind(v, answers.tolerance, "compiled loss", i) for i, v in enumerate(answers.losses)),
            tuple(_required_kind(v, answers.tolerance, "`add_loss`", i) for i, v in enumerate(answers.added)),
            total,
            answers.kinds_of_metrics(),
        )

    def _answers(self, sample: Sequence[Any], is_raw: bool) -> _Answers:
        """Return the scalars over the probed rows; those that are zero, over perturbed rows with perturbed weights."""
        first = self._computed(sample, is_raw)
        values = [*first.losses, *first.added, *(first.totals if is_raw else ()), *first.metrics.values()]
        if not any(abs(once) <= _ZERO for once, *_ in values):
            return first
        rng = np.random.default_rng(0)
        with _perturbed(self._model, self._strategy, rng):
            second = self._computed([_perturb(tensor, rng) for tensor in sample], is_raw)
        losses, added, totals = (
            [_unless_zero(a, b) for a, b in zip(one, other, strict=True)]
            for one, other in zip(
                (first.losses, first.added, first.totals), (second.losses, second.added, second.totals), strict=True
            )
        )
        metrics = {name: _unless_zero(first.metrics[name], value) for name, value in second.metrics.items()}
        return _Answers(losses, added, totals, metrics, first.tolerance)

    def _computed(self, sample: Sequence[Any], is_raw: bool) -> _Answers:
        middle = int(sample[0].shape[0]) // 2
        if not middle:  # a single row
            sample, middle = [tf.concat([t, t], 0) for t in sample], 1
        sample = [t[: 2 * middle] for t in sample]
        doubled = [tf.concat([t, t], 0) for t in sample]
        first, second = [t[:middle] for t in sample], [t[middle:] for t in sample]
        probes = ((sample, 1.0), (doubled, 1.0), (sample, 0.5), (first, 1.0), (second, 1.0))
        records = [self._record(self._structure(rows), share, is_raw) for rows, share in probes]
        return _Answers(
            list(zip(*(record.losses for record in records), strict=True)),
            list(zip(*(record.added for record in records), strict=True)),
            list(zip(*(record.totals for record in records), strict=True)),
            {name: tuple(record.metrics[name] for record in records) for name in records[0].metrics},
            _TOLERANCE if all(record.is_precise for record in records) else _LOW_PRECISION_TOLERANCE,
        )

    def _record(self, batch: tuple[Any, ...], share: float, is_raw: bool) -> Record:
        """Return the scalars of a batch from one replica; the others of this worker compute the same."""
        x, y = batch[0], batch[1] if len(batch) > 1 else None
        # custom code may need the weights, and a mean that it divides by their sum cannot be combined
        weights = batch[2] if self._has_custom_loss and len(batch) > 2 else None

        def step() -> tuple[list[Any], list[Any], dict[str, Any], Any]:
            self._set_share(share, is_raw)
            try:
                with _recording() as record:
                    total = self._model.compute_loss(x, y, self._model(x, training=False), weights, **self._options)
            finally:
                self._set_share(None)
            return record.losses, record.added, record.metrics, total

        losses, added, metrics, total = self._strategy.experimental_local_results(self._strategy.run(step))[0]
        totals = [] if total is None else [tf.reduce_sum(total)]
        is_precise = all(v.dtype.size >= 4 for v in (*losses, *added, *totals, *metrics.values()))
        metrics = dict(zip(metrics, _as_arrays(metrics.values()), strict=True))
        return Record(_as_arrays(losses), _as_arrays(added), _as_arrays(totals), metrics, is_precise)


@contextlib.contextmanager
def state_kept(model: Any, strategy: Any) -> Iterator[None]:
    """Undo what the block does to variables that are not trained, such as those of layers that count their calls."""
    original: list[tuple[Any, np.ndarray]] = []

    def create(create_next: Callable[..., Any], **options: Any) -> Any:
        variable = create_next(**options)
        if tf.executing_eagerly() and not variable.trainable:
            original.append((variable, variable.numpy()))
        return variable

    with strategy.scope():
        with contextlib.suppress(ValueError):  # tf_keras: the model is not built
            original += [(variable, variable.numpy()) for variable in model.non_trainable_variables]
        try:
            with tf.variable_creator_scope(create):
                yield
        finally:
            for variable, value in original:
                variable.assign(value)


@contextlib.contextmanager
def _perturbed(model: Any, strategy: Any, rng: np.random.Generator) -> Iterator[None]:
    """Keep a little noise on the weights while the block runs."""
    with strategy.scope():
        original = [(weight, weight.numpy()) for weight in model.trainable_weights]
        try:
            for weight, value in original:
                weight.assign(value + rng.normal(0, _NOISE_STDDEV, value.shape).astype(value.dtype))
            yield
        finally:
            for weight, value in original:
                weight.assign(value)


def _perturb(tensor: Any, rng: np.random.Generator) -> Any:
    """Return a float tensor with a little noise; others, such as classes or text, unchanged."""
    flat = tensor.flat_values if isinstance(tensor, tf.RaggedTensor) else tensor
    if not flat.dtype.is_floating:
        return tensor
    noisy = flat + tf.cast(rng.normal(0, _NOISE_STDDEV, flat.shape), flat.dtype)
    return tensor.with_flat_values(noisy) if isinstance(tensor, tf.RaggedTensor) else noisy


def _as_arrays(values: Iterable[Any]) -> list[np.ndarray]:
    return [tf.cast(value, tf.float64).numpy() for value in values]  # NumPy has no bfloat16


@contextlib.contextmanager
def _recording() -> Iterator[Record]:
    _current.record = Record()
    try:
        yield _current.record
    finally:
        _current.record = None


def _is_part(values: Answer, tolerance: float) -> bool:
    once, _, half, _, _ = values
    return abs(once) > _ZERO and bool(np.isclose(once, 2 * half, rtol=tolerance))


def _unless_zero(answer: Answer, other: Answer) -> Answer:
    """Return an answer, or another one if it is zero."""
    return other if abs(answer[0]) <= _ZERO and np.isfinite(other).all() else answer


def _kind(values: Answer, tolerance: float) -> Kind | None:
    """Return the kind of a scalar; None if it is neither a mean nor a sum."""
    once, twice, _, first, second = values
    if _is_part(values, tolerance):
        return "part"
    largest_error = tolerance * max(abs(first), abs(second)) + _ZERO
    if np.isclose(once, twice, rtol=tolerance, atol=_ZERO) and abs(once - (first + second) / 2) <= largest_error:
        return "mean"
    if np.isclose(2 * once, twice, rtol=tolerance, atol=_ZERO) and abs(once - first - second) <= largest_error:
        return "sum"
    return None


def _required_kind(values: Answer, tolerance: float, source: str, index: int) -> Kind:
    kind = _kind(values, tolerance)
    if kind is not None:
        return kind
    once, twice, _, first, second = values
    raise ModelError(
        "With several replicas, a scalar loss must be a mean or a sum over the rows of a batch, so that the replicas' "
        f"losses can be combined; scalar {index} from {source} is {once:g} over some rows, {twice:g} over the same "
        f"rows twice, and {first:g} and {second:g} over their halves. Return one value per row, or train on one "
        "replica."
    )
