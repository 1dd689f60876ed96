"""What Keras 3 needs to be exact, and to run at all, on several replicas; see `raykeras.exactness`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from raykeras.built import zeros
from raykeras.columns import Layout
from raykeras.errors import ModelError
from raykeras.keras_api import KerasAPI
from raykeras.patching import Altered, replaced, replaced_method
from raykeras.replica_logs import ReplicaLogs
from raykeras.scalars import current_record
from raykeras.shares import (
    ScalarLosses,
    as_whole,
    current,
    patch_means,
    patch_own_calls,
    scaled,
    sum_over_replicas,
    unscaled,
    weight_factor,
)


def patch_keras(
    stack: contextlib.ExitStack,
    model: Any,
    layout: Layout,
    strategy: tf.distribute.Strategy,
    scalar_losses: ScalarLosses,
) -> None:
    from keras.src.backend.tensorflow import trainer
    from keras.src.losses import loss as losses
    from keras.src.trainers import compile_utils

    api = KerasAPI("keras")
    with strategy.scope():
        api.build_symbolically(model, zeros(layout))
    stack.enter_context(replaced_method(model, "_maybe_symbolic_build", lambda iterator=None, data_batch=None: None))
    unscale_output = _unscale_output(losses)
    patch_own_calls(stack, model, losses.Loss, scalar_losses, lambda v, kind, _: scaled(v) if kind == "mean" else v)
    for functions in (_scales(losses), _reductions(losses, scalar_losses)):
        for name, value in functions.items():
            stack.enter_context(replaced(losses, name, value))
    proxy = Altered(losses, unscale_loss_for_distribution=unscale_output)
    stack.enter_context(replaced(compile_utils, "loss_module", proxy))
    original, logs = trainer.reduce_per_replica, ReplicaLogs(model)

    def reduce_per_replica(values: Any, strategy: Any, reduction: str) -> Any:
        is_logs = reduction == "auto" and isinstance(values, dict)
        return logs.reduced(values, strategy) if is_logs else original(values, strategy, reduction)

    stack.enter_context(replaced_method(model, "get_metrics_result", logs.get_metrics_result))
    stack.enter_context(replaced(trainer, "reduce_per_replica", reduce_per_replica))
    stack.enter_context(replaced_method(model, "_aggregate_additional_loss", _weigh_added(model, scalar_losses)))
    _patch_optimizer(stack, model)
    if api.has_own_steps(model):
        base = trainer.base_trainer.Trainer
        compute_loss = base.compute_loss

        def whole_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
            return as_whole(compute_loss(self, *args, **kwargs))

        stack.enter_context(replaced(base, "compute_loss", whole_loss))
        patch_means(stack, model, api.module.metrics.Mean)
        logs.note_results(stack)


def _scales(losses: Any) -> dict[str, Callable[..., Any]]:
    """A mean over a replica's rows counts by its share of the global batch, not by 1 / replicas."""
    original_scale, original_unscale = losses.scale_loss_for_distribution, losses.unscale_loss_for_distribution

    def scale(value: Any) -> Any:
        return original_scale(value) if current.share is None else scaled(value)

    def unscale(value: Any) -> Any:
        if current.share is None:
            return original_unscale(value)
        return value if current.whole else unscaled(value)

    return {"scale_loss_for_distribution": scale, "unscale_loss_for_distribution": unscale}


def _unscale_output(losses: Any) -> Callable[[Any], Any]:
    original = losses.unscale_loss_for_distribution

    def unscale_output(value: Any) -> Any:
        # A traced batch has no static size, so this metric counts replicas, each as one batch.
        if current.share is None or tf.inside_function():
            return original(value)
        return unscaled(value)

    return unscale_output


def _reductions(losses: Any, scalar_losses: ScalarLosses) -> dict[str, Callable[..., Any]]:
    """Weights and masks count by what they are over all replicas, and scalars as the probe found."""
    original_reduce, original_mask = losses.reduce_values, losses.apply_mask
    original_weighted = losses.reduce_weighted_values

    def reduce_values(values: Any, sample_weight: Any = None, reduction: Any = "sum_over_batch_size") -> Any:
        if reduction == "sum":
            current.weighed = True
        if current.share is None or reduction != "mean_with_sample_weight" or sample_weight is None:
            return original_reduce(values, sample_weight, reduction)
        current.weighed = True
        weights = sum_over_replicas(tf.cast(tf.reduce_sum(sample_weight), values.dtype))
        return tf.math.divide_no_nan(tf.reduce_sum(values), weights)

    def reduce_weighted_values(
        values: Any,
        sample_weight: Any = None,
        mask: Any = None,
        reduction: Any = "sum_over_batch_size",
        dtype: Any = None,
    ) -> Any:
        kind, current.reduced = None, True
        if len(values.shape) == 0:
            values = tf.cast(values, dtype or values.dtype)
            kind = scalar_losses.loss(values)
        if kind is None:
            return original_weighted(values, sample_weight, mask, reduction, dtype)
        current.weighed = True
        value = values * weight_factor(sample_weight, mask, reduction, values.dtype)
        return scaled(value) if kind == "mean" else value

    def apply_mask(sample_weight: Any, mask: Any, dtype: Any, reduction: Any) -> Any:
        share = current.share
        if mask is None or share is None or reduction not in ("mean", "sum_over_batch_size"):
            return original_mask(sample_weight, mask, dtype, reduction)
        weight = original_mask(sample_weight, mask, dtype, reduction)
        here = tf.reduce_sum(tf.cast(mask, weight.dtype))
        everywhere = sum_over_replicas(here)
        return weight * tf.math.divide_no_nan(here, everywhere * tf.cast(share, weight.dtype))

    return {
        "reduce_values": reduce_values,
        "reduce_weighted_values": reduce_weighted_values,
        "apply_mask": apply_mask,
    }


def _weigh_added(model: Any, scalar_losses: ScalarLosses) -> Callable[[Any], Any]:
    """Each loss of `add_loss` counts as the mean or the sum that the probe found it to be."""
    original = model._aggregate_additional_loss

    def add(loss: Any) -> Any:
        record, value = current_record(), tf.reduce_sum(loss)
        if record is not None:
            record.added.append(value)
        if record is not None or current.share is None:
            return original(loss)
        kinds = scalar_losses.added(len(model.losses))
        kind = kinds[current.num_added % len(kinds)]
        current.num_added += 1
        current.weighed = True
        return scaled(value) if kind == "mean" else value

    return add


def _patch_optimizer(stack: contextlib.ExitStack, model: Any) -> None:
    """Adds the replicas' gradients before they are clipped; clipping each comes out differently."""
    optimizer = getattr(model, "optimizer", None)
    if optimizer is None:
        return
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)  # of a LossScaleOptimizer
    if optimizer.gradient_accumulation_steps:
        raise ModelError(
            "On several replicas Keras accumulates gradients for each replica alone; got "
            f"`gradient_accumulation_steps={optimizer.gradient_accumulation_steps}`. Raise `batch_size` instead: it "
            "is the global batch."
        )
    if not (optimizer.clipnorm or optimizer.global_clipnorm or optimizer.clipvalue):
        return
    original = optimizer._clip_gradients

    def clip(gradients: Sequence[Any]) -> list[Any]:
        replicas = tf.distribute.get_strategy().num_replicas_in_sync
        whole = [None if g is None else sum_over_replicas(tf.convert_to_tensor(g)) for g in gradients]
        return [None if g is None else g / replicas for g in original(whole)]  # they are added once more

    stack.enter_context(replaced_method(optimizer, "_clip_gradients", clip))
