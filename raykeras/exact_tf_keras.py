"""What tf_keras needs to be exact on several replicas; see `raykeras.exactness`."""

from __future__ import annotations

import contextlib
from typing import Any

import tensorflow as tf

from raykeras.keras_api import KerasAPI
from raykeras.patching import Altered, replaced, replaced_method
from raykeras.replica_logs import ReplicaLogs
from raykeras.scalars import Kind, current_record
from raykeras.shares import (
    ScalarLosses,
    as_whole,
    current,
    defined,
    patch_means,
    patch_own_calls,
    scaled,
    unscaled,
    weight_factor,
)


def losses_in_layers() -> contextlib.AbstractContextManager[None]:
    """Lets layers call losses of Keras under a strategy, which tf_keras refuses; `add_loss` weighs them."""
    from tf_keras.src.losses import Loss
    from tf_keras.src.utils.losses_utils import ReductionV2

    def get_reduction(loss: Any) -> Any:
        return ReductionV2.SUM_OVER_BATCH_SIZE if loss.reduction == ReductionV2.AUTO else loss.reduction

    return replaced(Loss, "_get_reduction", get_reduction)


def patch_tf_keras(stack: contextlib.ExitStack, model: Any, losses: ScalarLosses) -> None:
    from tf_keras.src.engine import compile_utils, training
    from tf_keras.src.losses import Loss
    from tf_keras.src.utils import losses_utils

    stack.enter_context(losses_in_layers())
    patch_own_calls(stack, model, Loss, losses, lambda value, kind, loss: part_of(value, kind, loss.reduction))
    original_scale = losses_utils.scale_loss_for_distribution
    original_weighted = losses_utils.compute_weighted_loss
    original_call = compile_utils.LossesContainer.__call__
    api = KerasAPI("tf_keras")
    is_own = api.has_own_steps(model)
    if is_own:
        patch_means(stack, model, api.module.metrics.Mean)

    def scale(value: Any) -> Any:
        return original_scale(value) if current.share is None else scaled(value)

    def weighted(
        values: Any, sample_weight: Any = None, reduction: Any = "sum_over_batch_size", name: Any = None
    ) -> Any:
        values, current.reduced = tf.convert_to_tensor(values), True
        kind = losses.loss(values) if values.shape.rank == 0 else None
        if kind is None:
            return original_weighted(values, sample_weight, reduction, name)
        return part_of(values * weight_factor(sample_weight, None, reduction, values.dtype), kind, reduction)

    def part_of(value: Any, kind: Kind, reduction: str) -> Any:
        if reduction not in ("auto", "sum_over_batch_size"):  # Keras does not scale it
            current.weighed = True
            return scaled(value) if kind == "mean" else value
        return defined(value) if kind == "mean" else unscaled(value)

    def part(self: Any, y_true: Any, y_pred: Any, sample_weight: Any = None, regularization_losses: Any = None) -> Any:
        record, values = current_record(), list(regularization_losses or ())
        if record is not None:
            record.added.extend(values)
        if record is not None or current.share is None:
            return original_call(self, y_true, y_pred, sample_weight, values)
        kinds = losses.added(len(values))
        added = [defined(v) if kind == "mean" else unscaled(v) for v, kind in zip(values, kinds, strict=True)]
        if any(part is not None for part in tf.nest.flatten(y_true)):
            return original_call(self, y_true, y_pred, sample_weight, added)
        mean, replicas = self._total_loss_mean, tf.distribute.get_strategy().num_replicas_in_sync
        update = mean.update_state  # without y it counts each replica as a batch

        def update_state(value: Any, sample_weight: Any = None) -> Any:
            return update(scaled(value) * replicas, sample_weight=sample_weight)

        with replaced_method(mean, "update_state", update_state):
            return original_call(self, y_true, y_pred, sample_weight, added)

    def call(*args: Any, **options: Any) -> Any:
        loss = part(*args, **options)
        return as_whole(loss) if is_own and loss is not None else loss

    def get_strategy() -> Any:
        strategy = tf.distribute.get_strategy()
        if current.share is None:
            return strategy
        # a sum over rows is counted once for each replica, by the replica's rows
        return Altered(strategy, num_replicas_in_sync=unscaled(tf.ones(())))

    def reduce_per_replica(values: Any, strategy: Any, reduction: str) -> Any:
        is_logs = reduction == "auto" and isinstance(values, dict)
        return logs.reduced(values, strategy) if is_logs else original_per_replica(values, strategy, reduction)

    original_per_replica, logs = training.reduce_per_replica, ReplicaLogs(model)
    stack.enter_context(replaced_method(model, "get_metrics_result", logs.get_metrics_result))
    stack.enter_context(replaced(training, "reduce_per_replica", reduce_per_replica))
    stack.enter_context(replaced(losses_utils, "scale_loss_for_distribution", scale))
    stack.enter_context(replaced(losses_utils, "compute_weighted_loss", weighted))
    stack.enter_context(replaced(compile_utils.LossesContainer, "__call__", call))
    proxy = Altered(tf, distribute=Altered(tf.distribute, get_strategy=get_strategy))
    stack.enter_context(replaced(compile_utils, "tf", proxy))
