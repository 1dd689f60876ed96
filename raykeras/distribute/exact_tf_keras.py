"""Patch tf_keras to be exact on several replicas; see `raykeras.distribute.exact`."""

from __future__ import annotations

import contextlib
from typing import Any

import tensorflow as tf

from raykeras.compat.keras_api import KerasAPI
from raykeras.compat.patch import Proxy, patched, patched_method
from raykeras.distribute.loss_probe import Kind, current_record
from raykeras.distribute.replica_logs import ReplicaLogs
from raykeras.distribute.weighting import (
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
    """Allow layers to call Keras losses under a strategy while the block runs.

    tf_keras refuses such calls. Their results are weighted in `add_loss`.
    """
    from tf_keras.src.losses import Loss
    from tf_keras.src.utils.losses_utils import ReductionV2

    def get_reduction(loss: Any) -> Any:
        return ReductionV2.SUM_OVER_BATCH_SIZE if loss.reduction == ReductionV2.AUTO else loss.reduction

    return patched(Loss, "_get_reduction", get_reduction)


def patch_tf_keras(stack: contextlib.ExitStack, model: Any, losses: ScalarLosses) -> None:
    """Weight losses and merge metrics over all replicas.

    Args:
        stack: Undoes the patches when it closes.
        model: A compiled model, created under a strategy.
        losses: Kinds of the scalar losses; set after the probe.
    """
    from tf_keras.src.engine import compile_utils, training
    from tf_keras.src.losses import Loss
    from tf_keras.src.utils import losses_utils

    stack.enter_context(losses_in_layers())
    patch_own_calls(stack, model, Loss, losses, lambda value, kind, loss: weight_by_kind(value, kind, loss.reduction))
    original_scale = losses_utils.scale_loss_for_distribution
    original_weighted = losses_utils.compute_weighted_loss
    original_call = compile_utils.LossesContainer.__call__
    api = KerasAPI("tf_keras")
    has_custom_steps = api.has_own_steps(model)
    if has_custom_steps:
        patch_means(stack, model, api.module.metrics.Mean)

    def scale(value: Any) -> Any:
        return original_scale(value) if current.share is None else scaled(value)

    def compute_weighted_loss(
        values: Any, sample_weight: Any = None, reduction: Any = "sum_over_batch_size", name: Any = None
    ) -> Any:
        values, current.reduced = tf.convert_to_tensor(values), True
        kind = losses.loss(values) if values.shape.rank == 0 else None
        if kind is None:
            return original_weighted(values, sample_weight, reduction, name)
        return weight_by_kind(values * weight_factor(sample_weight, None, reduction, values.dtype), kind, reduction)

    def weight_by_kind(value: Any, kind: Kind, reduction: str) -> Any:
        if reduction not in ("auto", "sum_over_batch_size"):  # Keras does not scale it
            current.weighed = True
            return scaled(value) if kind == "mean" else value
        return defined(value) if kind == "mean" else unscaled(value)

    def replica_loss(
        self: Any, y_true: Any, y_pred: Any, sample_weight: Any = None, regularization_losses: Any = None
    ) -> Any:
        record, values = current_record(), list(regularization_losses or ())
        if record is not None:
            record.added.extend(values)
        if record is not None or current.share is None:
            return original_call(self, y_true, y_pred, sample_weight, values)
        kinds = losses.added(len(values))
        added = [defined(v) if kind == "mean" else unscaled(v) for v, kind in zip(values, kinds, strict=True)]
        if any(target is not None for target in tf.nest.flatten(y_true)):
            return original_call(self, y_true, y_pred, sample_weight, added)
        mean, num_replicas = self._total_loss_mean, tf.distribute.get_strategy().num_replicas_in_sync
        original_update = mean.update_state  # without y it counts each replica as one batch

        def update_state(value: Any, sample_weight: Any = None) -> Any:
            return original_update(scaled(value) * num_replicas, sample_weight=sample_weight)

        with patched_method(mean, "update_state", update_state):
            return original_call(self, y_true, y_pred, sample_weight, added)

    def call(*args: Any, **kwargs: Any) -> Any:
        loss = replica_loss(*args, **kwargs)
        return as_whole(loss) if has_custom_steps and loss is not None else loss

    def get_strategy() -> Any:
        strategy = tf.distribute.get_strategy()
        if current.share is None:
            return strategy
        # tf_keras multiplies a sum over rows by this number for its metric; 1 / share also suits unequal replicas
        return Proxy(strategy, num_replicas_in_sync=unscaled(tf.ones(())))

    def reduce_per_replica(values: Any, strategy: Any, reduction: str) -> Any:
        is_logs = reduction == "auto" and isinstance(values, dict)
        return logs.reduced(values, strategy) if is_logs else original_per_replica(values, strategy, reduction)

    original_per_replica, logs = training.reduce_per_replica, ReplicaLogs(model)
    stack.enter_context(patched_method(model, "get_metrics_result", logs.get_metrics_result))
    stack.enter_context(patched(training, "reduce_per_replica", reduce_per_replica))
    stack.enter_context(patched(losses_utils, "scale_loss_for_distribution", scale))
    stack.enter_context(patched(losses_utils, "compute_weighted_loss", compute_weighted_loss))
    stack.enter_context(patched(compile_utils.LossesContainer, "__call__", call))
    proxy = Proxy(tf, distribute=Proxy(tf.distribute, get_strategy=get_strategy))
    stack.enter_context(patched(compile_utils, "tf", proxy))
