"""Patch tf_keras to be exact on several replicas; see `raykeras.distribute.exact`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from raykeras.compat import tf_keras
from raykeras.compat.keras_api import KerasAPI
from raykeras.compat.patch import Proxy, patched, patched_method
from raykeras.compat.tf_keras import LossFunctions
from raykeras.data.batch_spec import BatchSpec
from raykeras.distribute.loss_probe import Kind, current_record
from raykeras.distribute.replica_logs import ReplicaLogs
from raykeras.distribute.weighting import (
    ScalarLosses,
    as_global_loss,
    current,
    outside_step,
    patch_means,
    patch_own_calls,
    scaled,
    unscaled,
    weight_factor,
    zero_without_rows,
)


def patch_tf_keras(
    stack: contextlib.ExitStack,
    model: Any,
    batch_spec: BatchSpec,
    strategy: tf.distribute.Strategy,
    losses: ScalarLosses,
) -> bool:
    """Weight losses and merge metrics over all replicas; as `raykeras.distribute.exact_keras.patch_keras`.

    Returns:
        False: the losses in a custom `compute_loss` are weighted, and not its result.
    """
    api, logs = KerasAPI("tf_keras"), ReplicaLogs(model)
    has_own_steps = api.has_own_steps(model)
    stack.enter_context(tf_keras.losses_in_layers())
    patch_own_calls(
        stack, model, api.module.losses.Loss, losses, lambda value, kind, loss: _part_of(value, kind, loss.reduction)
    )
    add_metric = api.module.layers.Layer.add_metric
    stack.enter_context(patched(api.module.layers.Layer, "add_metric", _exact_add_metric(add_metric, losses)))
    if has_own_steps:
        patch_means(stack, model, api.module.metrics.Mean)
    stack.enter_context(patched_method(model, "get_metrics_result", logs.get_metrics_result))
    stack.enter_context(api.logs_reduced_by(logs.reduced))
    stack.enter_context(
        tf_keras.loss_functions_replaced(lambda original: _WeightedLosses(original, losses, has_own_steps).functions())
    )
    return False


class _WeightedLosses:
    """Weights losses by the replica's share instead of by 1 / num_replicas.

    Args:
        original: tf_keras' functions.
        losses: Kinds of the scalar losses.
        is_whole: Whether the model's own steps get the loss of the global batch.
    """

    def __init__(self, original: LossFunctions, losses: ScalarLosses, is_whole: bool) -> None:
        self._original, self._losses, self._is_whole = original, losses, is_whole

    def functions(self) -> LossFunctions:
        """Return the functions that replace tf_keras' functions."""
        return LossFunctions(
            scale=self._scale,
            compute_weighted_loss=self._compute_weighted_loss,
            compute_total_loss=self._compute_total_loss,
            get_strategy=self._get_strategy,
        )

    def _scale(self, value: Any) -> Any:
        return self._original.scale(value) if current.share is None else scaled(value)

    def _compute_weighted_loss(
        self, values: Any, sample_weight: Any = None, reduction: Any = "sum_over_batch_size", name: Any = None
    ) -> Any:
        values, current.reduced = tf.convert_to_tensor(values), True
        kind = self._losses.loss(values) if values.shape.rank == 0 else None
        if kind is None:
            return self._original.compute_weighted_loss(values, sample_weight, reduction, name)
        return _part_of(values * weight_factor(sample_weight, None, reduction, values.dtype), kind, reduction)

    def _compute_total_loss(
        self,
        container: Any,
        y_true: Any,
        y_pred: Any,
        sample_weight: Any = None,
        regularization_losses: Sequence[Any] | None = None,
    ) -> Any:
        added = list(regularization_losses or ())
        record = current_record()
        if record is not None:
            record.added.extend(added)
        elif current.share is not None:
            kinds = self._losses.added(len(added))
            added = [
                zero_without_rows(v) if kind == "mean" else unscaled(v) for v, kind in zip(added, kinds, strict=True)
            ]
        has_targets = any(target is not None for target in tf.nest.flatten(y_true))
        counts_replicas = record is None and current.share is not None and not has_targets
        with _rows_counted(container, y_pred) if counts_replicas else contextlib.nullcontext():
            loss = self._original.compute_total_loss(container, y_true, y_pred, sample_weight, added)
        return as_global_loss(loss) if self._is_whole and loss is not None else loss

    def _get_strategy(self) -> Any:
        strategy = self._original.get_strategy()
        if current.share is None:
            return strategy
        # tf_keras multiplies a sum over rows by this number for its metric; 1 / share also suits unequal replicas
        return Proxy(strategy, num_replicas_in_sync=unscaled(tf.ones(())))


def _exact_add_metric(original: Callable[..., None], losses: ScalarLosses) -> Callable[..., None]:
    """Return tf_keras' `add_metric` with each scalar as this replica's part of the batch's value.

    tf_keras averages the scalars of replicas and batches, so the parts are multiplied by the number of replicas.
    """

    def add_metric(layer: Any, value: Any, name: str | None = None, **kwargs: Any) -> None:
        kind = losses.metric(f"{layer.name}/{name}", value)
        if kind is None:
            return original(layer, value, name=name, **kwargs)
        share = tf.cast(current.share, value.dtype)
        part = tf.math.multiply_no_nan(value, share) if kind == "mean" else zero_without_rows(value)
        part *= tf.cast(tf.distribute.get_strategy().num_replicas_in_sync, value.dtype)
        with outside_step():  # else the patched `Mean` of a model with its own steps weights it again
            return original(layer, part, name=name, **kwargs)

    return add_metric


def _part_of(value: Any, kind: Kind, reduction: str) -> Any:
    """Return the part of a scalar loss from which tf_keras' reduction makes this replica's part of the batch's loss."""
    if reduction not in ("auto", "sum_over_batch_size"):  # Keras does not scale it
        current.has_weighted_loss = True
        return scaled(value) if kind == "mean" else value
    return zero_without_rows(value) if kind == "mean" else unscaled(value)


def _rows_counted(container: Any, y_pred: Any) -> contextlib.AbstractContextManager[None]:
    """Let the metric of a total loss without targets count rows in a context; it counts each replica as one batch.

    Args:
        container: The model's container of losses.
        y_pred: The predictions.
    """
    if not container.built:
        container.build(y_pred)
    mean, num_replicas = container.metrics[0], tf.distribute.get_strategy().num_replicas_in_sync
    update_mean = mean.update_state

    def update_state(value: Any, sample_weight: Any = None) -> Any:
        part = scaled(value) * num_replicas
        with outside_step():  # else the patched `Mean` of a model with its own steps weights it again
            return update_mean(part, sample_weight=sample_weight)

    return patched_method(mean, "update_state", update_state)
