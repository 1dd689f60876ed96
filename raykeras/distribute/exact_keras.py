"""Patch Keras 3 to be exact, and to run at all, on several replicas; see `raykeras.distribute.exact`."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from raykeras.compat import keras3
from raykeras.compat.keras3 import LossFunctions
from raykeras.compat.keras_api import KerasAPI
from raykeras.compat.patch import patched, patched_method
from raykeras.core.errors import ModelError
from raykeras.data.batch_spec import BatchSpec
from raykeras.distribute.loss_probe import current_record
from raykeras.distribute.replica_logs import ReplicaLogs
from raykeras.distribute.weighting import (
    ScalarLosses,
    as_global_loss,
    current,
    patch_means,
    patch_own_calls,
    scaled,
    sum_over_replicas,
    unscaled,
    weight_factor,
    zero_without_rows,
)


def patch_keras(
    stack: contextlib.ExitStack,
    model: Any,
    batch_spec: BatchSpec,
    strategy: tf.distribute.Strategy,
    scalar_losses: ScalarLosses,
) -> bool:
    """Weight losses, merge metrics and clip gradients over all replicas.

    Args:
        stack: Undoes the patches when it closes.
        model: A compiled model whose variables belong to `strategy`.
        batch_spec: Spec of the batches.
        strategy: Strategy over several replicas.
        scalar_losses: Kinds of the scalar losses; set after the probe.

    Returns:
        Whether the result of a custom `compute_loss` is weighted.
    """
    api, logs = KerasAPI("keras"), ReplicaLogs(model)
    stack.enter_context(keras3.fit_without_building(model))
    patch_own_calls(
        stack, model, api.module.losses.Loss, scalar_losses, lambda v, kind, _: scaled(v) if kind == "mean" else v
    )
    stack.enter_context(
        keras3.loss_functions_replaced(lambda original: _WeightedLosses(original, scalar_losses).functions())
    )
    stack.enter_context(patched_method(model, "get_metrics_result", logs.get_metrics_result))
    stack.enter_context(api.logs_reduced_by(logs.reduced))
    stack.enter_context(
        keras3.added_loss_replaced(model, lambda original: _weight_added_loss(original, model, scalar_losses))
    )
    _patch_optimizer(stack, model)
    has_custom_loss = not api.inherits(model, "compute_loss")
    if api.has_own_steps(model):
        _patch_compute_loss(stack, api.defining_class(model, "compute_loss"))
        if has_custom_loss:
            stack.enter_context(patched_method(model, "compute_loss", _weight_total(model, scalar_losses)))
        patch_means(stack, model, api.module.metrics.Mean)
        logs.record_results(stack)
    return has_custom_loss


def _patch_compute_loss(stack: contextlib.ExitStack, base: Any) -> None:
    """Let Keras' `compute_loss` return the loss of the global batch."""
    compute_loss = base.compute_loss

    def global_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
        return as_global_loss(compute_loss(self, *args, **kwargs))

    stack.enter_context(patched(base, "compute_loss", global_loss))


def _weight_total(model: Any, scalar_losses: ScalarLosses) -> Callable[..., Any]:
    """Return a custom `compute_loss` whose result is weighted, if it does not weight its losses itself."""
    compute_loss = model.compute_loss

    @functools.wraps(compute_loss)
    def compute(*args: Any, **kwargs: Any) -> Any:
        kind = scalar_losses.scalars.total
        if current.share is None or kind in (None, "part"):
            return compute_loss(*args, **kwargs)
        current.is_raw = True
        try:
            loss = compute_loss(*args, **kwargs)
        finally:
            current.is_raw = False
        current.has_weighted_loss = True
        return scaled(loss) if kind == "mean" else loss

    return compute


class _WeightedLosses:
    """Weights losses by the replica's share instead of by 1 / num_replicas.

    Args:
        original: Keras' functions.
        scalar_losses: Kinds of the scalar losses.
    """

    def __init__(self, original: LossFunctions, scalar_losses: ScalarLosses) -> None:
        self._original, self._scalar_losses = original, scalar_losses

    def functions(self) -> LossFunctions:
        """Return the functions that replace Keras' functions."""
        return LossFunctions(
            reduce_values=self._reduce_values,
            reduce_weighted_values=self._reduce_weighted_values,
            apply_mask=self._apply_mask,
            scale=self._scale,
            unscale=self._unscale,
            unscale_output=self._unscale_output,
        )

    def _scale(self, value: Any) -> Any:
        return self._original.scale(value) if current.share is None else scaled(value)

    def _unscale(self, value: Any) -> Any:
        if current.share is None:
            return self._original.unscale(value)
        return value if current.gave_global_loss else unscaled(value)

    def _unscale_output(self, value: Any) -> Any:
        # a traced batch has no static size, so Keras' metric counts each replica as one batch
        if current.share is None or (tf.inside_function() and not current.is_raw):
            return self._original.unscale_output(zero_without_rows(value))
        return unscaled(value)

    def _reduce_values(self, values: Any, sample_weight: Any = None, reduction: Any = "sum_over_batch_size") -> Any:
        if reduction == "sum":
            current.has_weighted_loss = True
        if current.weights_losses and values.shape.num_elements() == 0 and reduction not in (None, "none"):
            # a replica without rows, in eager execution: Keras would not reduce the values
            current.has_weighted_loss = True
            return tf.reduce_sum(values)
        if not current.weights_losses or reduction != "mean_with_sample_weight" or sample_weight is None:
            return self._original.reduce_values(values, sample_weight, reduction)
        current.has_weighted_loss = True
        total_weight = sum_over_replicas(tf.cast(tf.reduce_sum(sample_weight), values.dtype))
        return tf.math.divide_no_nan(tf.reduce_sum(values), total_weight)

    def _reduce_weighted_values(
        self,
        values: Any,
        sample_weight: Any = None,
        mask: Any = None,
        reduction: Any = "sum_over_batch_size",
        dtype: Any = None,
    ) -> Any:
        kind, current.reduced = None, True
        if len(values.shape) == 0:
            values = tf.cast(values, dtype or values.dtype)
            kind = self._scalar_losses.loss(values)
        if kind is None:
            return self._original.reduce_weighted_values(values, sample_weight, mask, reduction, dtype)
        current.has_weighted_loss = True
        value = values * weight_factor(sample_weight, mask, reduction, values.dtype)
        return scaled(value) if kind == "mean" else value

    def _apply_mask(self, sample_weight: Any, mask: Any, dtype: Any, reduction: Any) -> Any:
        share = current.share
        if mask is None or not current.weights_losses or reduction not in ("mean", "sum_over_batch_size"):
            return self._original.apply_mask(sample_weight, mask, dtype, reduction)
        weight = self._original.apply_mask(sample_weight, mask, dtype, reduction)
        local_count = tf.reduce_sum(tf.cast(mask, weight.dtype))
        total_count = sum_over_replicas(local_count)
        return weight * tf.math.divide_no_nan(local_count, total_count * tf.cast(share, weight.dtype))


def _weight_added_loss(original: Callable[[Any], Any], model: Any, scalar_losses: ScalarLosses) -> Callable[[Any], Any]:
    """Return a function that weights each loss of `add_loss` as the mean or sum that the probe found."""

    def add(loss: Any) -> Any:
        record, value = current_record(), tf.reduce_sum(loss)
        if record is not None and not current.is_raw:
            record.added.append(value)
        if record is not None or not current.weights_losses:
            return original(loss)
        kinds = scalar_losses.added(len(model.losses))
        kind = kinds[current.num_added % len(kinds)]
        current.num_added += 1
        current.has_weighted_loss = True
        return scaled(value) if kind == "mean" else value

    return add


def _patch_optimizer(stack: contextlib.ExitStack, model: Any) -> None:
    """Clip and check the gradients of all replicas together; Keras clips each replica's, and checks those of one."""
    optimizer = getattr(model, "optimizer", None)
    if optimizer is None:
        return
    if hasattr(optimizer, "check_finite"):  # a LossScaleOptimizer
        stack.enter_context(patched(optimizer, "check_finite", _check_all(optimizer.check_finite)))
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    if optimizer.gradient_accumulation_steps:
        raise ModelError(
            "With several replicas, Keras accumulates gradients on each replica separately; got "
            f"`gradient_accumulation_steps={optimizer.gradient_accumulation_steps}`. Increase `batch_size` instead: it "
            "is the global batch size."
        )
    if not (optimizer.clipnorm or optimizer.global_clipnorm or optimizer.clipvalue):
        return
    stack.enter_context(keras3.clipping_replaced(optimizer, _clip_sums))


def _check_all(original: Callable[[Sequence[Any]], Any]) -> Callable[[Sequence[Any]], Any]:
    """Return a function that returns whether the gradients of all replicas are finite."""

    def check_finite(gradients: Sequence[Any]) -> Any:
        num_infinite = sum_over_replicas(1.0 - tf.cast(original(gradients), tf.float32))
        return tf.equal(num_infinite, 0.0)

    return check_finite


def _clip_sums(original: Callable[[Sequence[Any]], Sequence[Any]]) -> Callable[[Sequence[Any]], list[Any]]:
    """Return a function that clips the sums of the replicas' gradients with Keras' function."""

    def clip(gradients: Sequence[Any]) -> list[Any]:
        num_replicas = tf.distribute.get_strategy().num_replicas_in_sync
        totals = [None if g is None else sum_over_replicas(tf.convert_to_tensor(g)) for g in gradients]
        # Keras sums the returned gradients over the replicas again
        return [None if g is None else g / num_replicas for g in original(totals)]

    return clip
