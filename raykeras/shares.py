"""A replica's share of the global batch, and what its losses are worth by it.

Enters: the step that a thread computes. Leaves: the losses of a replica as its part of the global
batch's. `raykeras.exactness` says why.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from raykeras.errors import ModelError
from raykeras.scalars import Kind, Scalars, current_record


class Step(threading.local):
    """The step that a thread computes; a strategy runs each replica in a thread of its own.

    Attributes:
        share: This replica's rows over those of the global batch, float32 (); None outside of a step.
        num_losses, num_added: Scalars of user code met so far.
        weighed: Whether any loss was weighed.
        loss: What `compute_loss` returned: this replica's part of the batch's loss.
    """

    share: tf.Tensor | None = None
    num_losses = 0
    num_added = 0
    weighed = False
    loss: tf.Tensor | None = None


current = Step()


def scaled(value: Any) -> Any:
    """A mean over this replica's rows as its part of the mean over the global batch."""
    if current.share is None:
        return value
    current.weighed = True
    return value * tf.cast(current.share, value.dtype)


def unscaled(value: Any) -> Any:
    return value if current.share is None else tf.math.divide_no_nan(value, tf.cast(current.share, value.dtype))


def sum_over_replicas(value: Any) -> Any:
    return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, value)


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
