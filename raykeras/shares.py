"""A replica's share of the global batch, and what its losses are worth by it.

Enters: the step that a thread computes. Leaves: the losses of a replica as its part of the global
batch's. `raykeras.exactness` says why.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from raykeras.errors import ModelError
from raykeras.patching import replaced, replaced_method
from raykeras.scalars import Kind, Scalars, current_record


class Step(threading.local):
    """The step that a thread computes; a strategy runs each replica in a thread of its own.

    Attributes:
        share: This replica's rows over those of the global batch, float32 (); None outside of a step.
        num_losses, num_added: Scalars of user code met so far.
        weighed: Whether any loss was weighed.
        reduced: Whether Keras reduced the loss that is being computed.
        whole: Whether code of the user's was given the loss of the global batch.
    """

    share: tf.Tensor | None = None
    num_losses = 0
    num_added = 0
    weighed = False
    reduced = False
    whole = False


current = Step()


def scaled(value: Any) -> Any:
    """A mean over this replica's rows as its part of the mean over the global batch."""
    if current.share is None:
        return value
    current.weighed = True
    return tf.math.multiply_no_nan(value, tf.cast(current.share, value.dtype))


def defined(mean: Any) -> Any:
    """A mean over this replica's rows; zero where it has none, as of a batch of fewer rows than replicas."""
    return mean if current.share is None else tf.where(current.share > 0, mean, tf.zeros_like(mean))


def unscaled(value: Any) -> Any:
    return value if current.share is None else tf.math.divide_no_nan(value, tf.cast(current.share, value.dtype))


def sum_over_replicas(value: Any) -> Any:
    return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, value)


def as_whole(part: Any) -> Any:
    """The loss of the global batch, with the gradient of this replica's part, for code that gives it to metrics."""
    if current.share is None or current_record() is not None:
        return part
    current.whole = True
    return part + tf.stop_gradient(sum_over_replicas(part) - part)


class ScalarLosses:
    """Weighs the scalars that user code returns, by their kinds."""

    scalars = Scalars()

    def loss(self, value: Any) -> Kind | None:
        """The kind of the next compiled loss that is a scalar; None outside of a step."""
        record = current_record()
        if record is not None:
            record.losses.append(value)
        if record is not None or current.share is None:
            return None
        kinds = self.scalars.losses
        current.num_losses += 1
        if not kinds:
            raise ModelError(
                "On several replicas a loss must return a scalar for every batch or for none; this one did for a "
                "batch of training, and not for the first rows. Return one value for each row."
            )
        return kinds[(current.num_losses - 1) % len(kinds)]

    def added(self, number: int) -> Sequence[Kind]:
        """The kinds of the `number` losses that `add_loss` added in this step."""
        kinds = self.scalars.added
        if number != len(kinds):
            raise ModelError(
                "On several replicas a layer must call `add_loss` as often in training as in inference; here "
                f"{number} losses are added in this step and {len(kinds)} were in inference. Call `add_loss` "
                "whatever `training` is, or train on one replica."
            )
        return kinds


def patch_own_calls(
    stack: contextlib.ExitStack,
    model: Any,
    base: type,
    losses: ScalarLosses,
    part_of: Callable[[Any, Kind, Any], Any],
) -> None:
    """Weigh what those compiled losses return that override `__call__`, where Keras weighs.

    Args:
        stack: Until it is closed.
        model: Its losses.
        base: The package's `Loss`.
        losses: Their kinds.
        part_of: Value, kind and loss to this replica's part of the batch's loss.
    """
    own = {type(loss) for loss in tf.nest.flatten(getattr(model, "loss", None)) if isinstance(loss, base)}
    for cls in own:
        if cls.__call__ is not base.__call__:
            stack.enter_context(replaced(cls, "__call__", _weighing(cls.__call__, losses, part_of)))


def patch_means(stack: contextlib.ExitStack, model: Any, mean: Any) -> None:
    """Let metrics weigh a number of a step by the replica's share, and count a batch once.

    Args:
        stack: Until it is closed.
        model: Its metrics.
        mean: The package's `Mean`.
    """

    def once(update_state: Callable[..., Any]) -> Callable[..., Any]:
        def update(values: Any, sample_weight: Any = None) -> Any:
            if current.share is not None and sample_weight is None and tf.convert_to_tensor(values).shape.rank == 0:
                values, sample_weight = defined(values), current.share
            return update_state(values, sample_weight=sample_weight)

        return update

    for metric in model.metrics:
        if type(metric) is mean:
            stack.enter_context(replaced_method(metric, "update_state", once(metric.update_state)))


def _weighing(original: Callable[..., Any], losses: ScalarLosses, part_of: Callable[..., Any]) -> Callable[..., Any]:
    def call(loss: Any, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        current.reduced = False
        value = tf.convert_to_tensor(original(loss, y_true, y_pred, sample_weight))
        kind = losses.loss(value) if value.shape.rank == 0 else None
        if kind is None:
            return value
        if sample_weight is not None and not current.reduced:
            raise ModelError(
                "On several replicas weights and class weights need a loss whose `call` returns a value for each row; "
                f"got {type(loss).__name__}, which overrides `__call__`. Override `call`, or train on one replica."
            )
        current.weighed = True
        return part_of(value, kind, loss)

    return call


def weight_factor(weights: Any, mask: Any, reduction: str, dtype: Any) -> Any:
    """What Keras makes of a scalar loss when it multiplies it with the weights of the global batch and reduces."""
    if weights is None or reduction in ("mean_with_sample_weight", "none", None):
        return tf.ones((), dtype)
    weights = tf.cast(weights, dtype)
    count = tf.cast(tf.size(weights), dtype)
    if mask is not None:
        weights *= tf.cast(mask, dtype)
        count = tf.reduce_sum(tf.cast(mask, dtype))
    total = sum_over_replicas(tf.reduce_sum(weights))
    return total if reduction == "sum" else tf.math.divide_no_nan(total, sum_over_replicas(count))
