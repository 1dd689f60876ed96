"""Weight a replica's losses by its share of the global batch; see `raykeras.distribute.exact`."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tensorflow as tf

from raykeras.compat.patch import patched, patched_method
from raykeras.core.errors import ModelError
from raykeras.distribute.loss_probe import Kind, Scalars, current_record


class Step(threading.local):
    """The step that a thread computes; a strategy runs each replica in a separate thread.

    Attributes:
        share: This replica's rows divided by those of the global batch, float32 (), 0 to 1; None outside a step.
        num_losses, num_added: Number of compiled and of added scalar losses seen so far.
        has_weighted_loss: Whether any loss was weighted.
        reduced: Whether Keras reduced the loss that is being computed.
        gave_global_loss: Whether user code was given the loss of the global batch.
        is_raw: Whether losses stay unweighted, because the result of a custom `compute_loss` is weighted instead.
    """

    share: tf.Tensor | None = None
    num_losses = 0
    num_added = 0
    has_weighted_loss = False
    reduced = False
    gave_global_loss = False
    is_raw = False

    @property
    def weights_losses(self) -> bool:
        """Whether each loss is weighted by the share where it is computed."""
        return self.share is not None and not self.is_raw


current = Step()


class ScalarLosses:
    """Returns the kinds of the scalar losses that user code computes, in order.

    Attributes:
        scalars: The kinds that the probe found.
    """

    scalars = Scalars()

    def loss(self, value: Any) -> Kind | None:
        """Return the kind of the next scalar from a compiled loss; None outside a step.

        Args:
            value: The scalar, which is recorded if a probe runs.

        Raises:
            ModelError: If the compiled losses returned no scalar in the probe.
        """
        record = current_record()
        if record is not None and not current.is_raw:
            record.losses.append(value)
        if record is not None or not current.weights_losses:
            return None
        kinds = self.scalars.losses
        current.num_losses += 1
        if not kinds:
            raise ModelError(
                "With several replicas, a loss must return a scalar for every batch or for none; this one returned a "
                "scalar for a training batch but not for the first rows. Return one value per row."
            )
        return kinds[(current.num_losses - 1) % len(kinds)]

    def added(self, number: int) -> Sequence[Kind]:
        """Return the kinds of the losses that `add_loss` added in this step.

        Args:
            number: How many were added.

        Raises:
            ModelError: If the probe, in inference, found another number.
        """
        kinds = self.scalars.added
        if number != len(kinds):
            raise ModelError(
                "With several replicas, a layer must call `add_loss` equally often in training and in inference; this "
                f"step added {number} losses, and inference {len(kinds)}. Call `add_loss` regardless of `training`, or "
                "train on one replica."
            )
        return kinds

    def metric(self, name: str, value: Any) -> Kind | None:
        """Return the kind of a scalar that a layer passes to `add_metric`; None for others and outside a step.

        Args:
            name: Names of the layer and the metric.
            value: The scalar, which is recorded if a probe runs.
        """
        if not tf.is_tensor(value) or value.shape.rank != 0 or not value.dtype.is_floating:
            return None
        record = current_record()
        if record is not None:
            record.metrics.setdefault(name, value)
            return None
        return None if current.share is None else self.scalars.metrics.get(name)


@contextlib.contextmanager
def outside_step() -> Iterator[None]:
    """Have this thread compute without weights while the block runs."""
    share, current.share = current.share, None
    try:
        yield
    finally:
        current.share = share


def scaled(value: Any) -> Any:
    """Return a mean over this replica's rows as its part of the mean over the global batch."""
    if not current.weights_losses:
        return value
    current.has_weighted_loss = True
    return tf.math.multiply_no_nan(value, tf.cast(current.share, value.dtype))


def unscaled(value: Any) -> Any:
    """Return a part of the mean over the global batch as the mean over this replica's rows."""
    return tf.math.divide_no_nan(value, tf.cast(current.share, value.dtype)) if current.weights_losses else value


def zero_without_rows(value: Any) -> Any:
    """Return a value of this replica's rows, or zero if a small batch leaves it without rows."""
    return value if current.share is None else tf.where(current.share > 0, value, tf.zeros_like(value))


def sum_over_replicas(value: Any) -> Any:
    """Return the sum of a value over all replicas of all workers that have rows."""
    own = zero_without_rows(value)
    return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, own)


def as_global_loss(part: Any) -> Any:
    """Return the loss of the global batch with the gradient of this replica's part, for code that logs it."""
    if not current.weights_losses or current_record() is not None:
        return part
    current.gave_global_loss = True
    return part + tf.stop_gradient(sum_over_replicas(part) - part)


def weight_factor(weights: Any, mask: Any, reduction: str, dtype: Any) -> Any:
    """Return the factor that Keras' reduction applies to a scalar loss, given the weights of the global batch.

    Args:
        weights: Sample weights of this replica's rows, or None.
        mask: Mask of the same shape, or None.
        reduction: The loss's reduction.
        dtype: Dtype of the result.

    Returns:
        A scalar of `dtype`.
    """
    if weights is None or reduction in ("mean_with_sample_weight", "none", None):
        return tf.ones((), dtype)
    weights = tf.cast(weights, dtype)
    count = tf.cast(tf.size(weights), dtype)
    if mask is not None:
        weights *= tf.cast(mask, dtype)
        count = tf.reduce_sum(tf.cast(mask, dtype))
    total = sum_over_replicas(tf.reduce_sum(weights))
    return total if reduction == "sum" else tf.math.divide_no_nan(total, sum_over_replicas(count))


def patch_own_calls(
    stack: contextlib.ExitStack,
    model: Any,
    base: type,
    losses: ScalarLosses,
    part_of: Callable[[Any, Kind, Any], Any],
) -> None:
    """Weight compiled losses that override `__call__`, in which Keras would weight them.

    Args:
        stack: Undoes the patches when it closes.
        model: The compiled model.
        base: The `Loss` class of the model's Keras package.
        losses: Kinds of the scalar losses.
        part_of: Maps value, kind and loss object to this replica's part of the batch's loss.
    """
    loss_types = {type(loss) for loss in tf.nest.flatten(getattr(model, "loss", None)) if isinstance(loss, base)}
    for cls in loss_types:
        if cls.__call__ is not base.__call__:
            stack.enter_context(patched(cls, "__call__", _weighted_call(cls.__call__, losses, part_of)))


def patch_means(stack: contextlib.ExitStack, model: Any, mean: Any) -> None:
    """Let `Mean` metrics weight a scalar by the replica's share, so that a batch counts once.

    Args:
        stack: Undoes the patches when it closes.
        model: The compiled model.
        mean: The `Mean` class of the model's Keras package.
    """

    def with_share(update_state: Callable[..., Any]) -> Callable[..., Any]:
        def update(values: Any, sample_weight: Any = None) -> Any:
            if current.share is not None and sample_weight is None and tf.convert_to_tensor(values).shape.rank == 0:
                values, sample_weight = zero_without_rows(values), current.share
            return update_state(values, sample_weight=sample_weight)

        return update

    for metric in model.metrics:
        if type(metric) is mean:
            stack.enter_context(patched_method(metric, "update_state", with_share(metric.update_state)))


def _weighted_call(
    original: Callable[..., Any], losses: ScalarLosses, part_of: Callable[..., Any]
) -> Callable[..., Any]:
    def call(loss: Any, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        current.reduced = False
        value = tf.convert_to_tensor(original(loss, y_true, y_pred, sample_weight))
        kind = losses.loss(value) if value.shape.rank == 0 else None
        if kind is None:
            return value
        if sample_weight is not None and not current.reduced:
            raise ModelError(
                "With several replicas, sample weights and class weights need a loss whose `call` returns one value "
                f"per row; got {type(loss).__name__}, which overrides `__call__`. Override `call`, or train on one "
                "replica."
            )
        current.has_weighted_loss = True
        return part_of(value, kind, loss)

    return call
