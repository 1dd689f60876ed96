"""Patch Keras 3 to be exact, and to run at all, on several replicas; see `raykeras.distribute.exact`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from raykeras.compat.keras_api import KerasAPI
from raykeras.compat.patch import Proxy, patched, patched_method
from raykeras.core.errors import ModelError
from raykeras.data.batch_spec import BatchSpec
from raykeras.distribute.build import zeros
from raykeras.distribute.loss_probe import current_record
from raykeras.distribute.replica_logs import ReplicaLogs
from raykeras.distribute.weighting import (
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
    batch_spec: BatchSpec,
    strategy: tf.distribute.Strategy,
    scalar_losses: ScalarLosses,
) -> None:
    """Weight losses, merge metrics and clip gradients over all replicas.

    Args:
        stack: Undoes the patches when it closes.
        model: A compiled model whose variables belong to `strategy`.
        batch_spec: Spec of the batches.
        strategy: Strategy over several replicas.
        scalar_losses: Kinds of the scalar losses; set after the probe.
    """
    from keras.src.backend.tensorflow import trainer
    from keras.src.losses import loss as loss_module
    from keras.src.trainers import compile_utils

    api = KerasAPI("keras")
    with strategy.scope():
        api.build_symbolically(model, zeros(batch_spec))
    stack.enter_context(patched_method(model, "_maybe_symbolic_build", lambda iterator=None, data_batch=None: None))
    unscale_output = _unscale_output(loss_module)
    patch_own_calls(
        stack, model, loss_module.Loss, scalar_losses, lambda v, kind, _: scaled(v) if kind == "mean" else v
    )
    for functions in (_scaling_functions(loss_module), _reduction_functions(loss_module, scalar_losses)):
        for name, value in functions.items():
            stack.enter_context(patched(loss_module, name, value))
    proxy = Proxy(loss_module, unscale_loss_for_distribution=unscale_output)
    stack.enter_context(patched(compile_utils, "loss_module", proxy))
    original, logs = trainer.reduce_per_replica, ReplicaLogs(model)

    def reduce_per_replica(values: Any, strategy: Any, reduction: str) -> Any:
        is_logs = reduction == "auto" and isinstance(values, dict)
        return logs.reduced(values, strategy) if is_logs else original(values, strategy, reduction)

    stack.enter_context(patched_method(model, "get_metrics_result", logs.get_metrics_result))
    stack.enter_context(patched(trainer, "reduce_per_replica", reduce_per_replica))
    stack.enter_context(patched_method(model, "_aggregate_additional_loss", _weight_added_loss(model, scalar_losses)))
    _patch_optimizer(stack, model)
    if api.has_own_steps(model):
        base = trainer.base_trainer.Trainer
        compute_loss = base.compute_loss

        def global_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
            return as_whole(compute_loss(self, *args, **kwargs))

        stack.enter_context(patched(base, "compute_loss", global_loss))
        patch_means(stack, model, api.module.metrics.Mean)
        logs.note_results(stack)


def _scaling_functions(loss_module: Any) -> dict[str, Callable[..., Any]]:
    """Return functions that weight a mean by the replica's share instead of by 1 / num_replicas."""
    original_scale = loss_module.scale_loss_for_distribution
    original_unscale = loss_module.unscale_loss_for_distribution

    def scale(value: Any) -> Any:
        return original_scale(value) if current.share is None else scaled(value)

    def unscale(value: Any) -> Any:
        if current.share is None:
            return original_unscale(value)
        return value if current.whole else unscaled(value)

    return {"scale_loss_for_distribution": scale, "unscale_loss_for_distribution": unscale}


def _unscale_output(loss_module: Any) -> Callable[[Any], Any]:
    """Return the function that unscales the loss of one output for its metric."""
    original = loss_module.unscale_loss_for_distribution

    def unscale_output(value: Any) -> Any:
        # a traced batch has no static size, so Keras' metric counts each replica as one batch
        if current.share is None or tf.inside_function():
            return original(value)
        return unscaled(value)

    return unscale_output


def _reduction_functions(loss_module: Any, scalar_losses: ScalarLosses) -> dict[str, Callable[..., Any]]:
    """Return functions that total weights and masks over all replicas, and weight scalars by their kind."""
    original_reduce, original_mask = loss_module.reduce_values, loss_module.apply_mask
    original_weighted = loss_module.reduce_weighted_values

    def reduce_values(values: Any, sample_weight: Any = None, reduction: Any = "sum_over_batch_size") -> Any:
        if reduction == "sum":
            current.weighed = True
        if current.share is None or reduction != "mean_with_sample_weight" or sample_weight is None:
            return original_reduce(values, sample_weight, reduction)
        current.weighed = True
        total_weight = sum_over_replicas(tf.cast(tf.reduce_sum(sample_weight), values.dtype))
        return tf.math.divide_no_nan(tf.reduce_sum(values), total_weight)

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
        local_count = tf.reduce_sum(tf.cast(mask, weight.dtype))
        total_count = sum_over_replicas(local_count)
        return weight * tf.math.divide_no_nan(local_count, total_count * tf.cast(share, weight.dtype))

    return {
        "reduce_values": reduce_values,
        "reduce_weighted_values": reduce_weighted_values,
        "apply_mask": apply_mask,
    }


def _weight_added_loss(model: Any, scalar_losses: ScalarLosses) -> Callable[[Any], Any]:
    """Return a function that weights each loss of `add_loss` as the mean or sum that the probe found."""
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
    """Sum the replicas' gradients before they are clipped, as clipping each replica's gives another result."""
    optimizer = getattr(model, "optimizer", None)
    if optimizer is None:
        return
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)  # of a LossScaleOptimizer
    if optimizer.gradient_accumulation_steps:
        raise ModelError(
            "With several replicas, Keras accumulates gradients on each replica separately; got "
            f"`gradient_accumulation_steps={optimizer.gradient_accumulation_steps}`. Increase `batch_size` instead: it "
            "is the global batch size."
        )
    if not (optimizer.clipnorm or optimizer.global_clipnorm or optimizer.clipvalue):
        return
    original = optimizer._clip_gradients

    def clip(gradients: Sequence[Any]) -> list[Any]:
        num_replicas = tf.distribute.get_strategy().num_replicas_in_sync
        totals = [None if g is None else sum_over_replicas(tf.convert_to_tensor(g)) for g in gradients]
        # Keras sums the returned gradients over the replicas again
        return [None if g is None else g / num_replicas for g in original(totals)]

    stack.enter_context(patched_method(optimizer, "_clip_gradients", clip))
