"""What makes several replicas give the numbers of one: each is weighed by what it holds.

Enters: a compiled model under a strategy whose batches come as `(batch, rows of the global batch)`.
Leaves: the same model, with a `train_step` and `test_step` that take such batches apart, and Keras'
losses weighed by rows instead of by one over the number of replicas.

Keras averages per-replica means, which is wrong as soon as replicas hold different numbers of rows.
Here a replica's *share* is its rows over those of the global batch, both known to the plan, so that
nothing need be asked of other workers:

    mean over rows           times the share
    mean over valid entries  (a mask) divided by the valid entries of all replicas
    mean_with_sample_weight  divided by the weights of all replicas
    sum over rows            as it is

Keras 3 on several workers needs two things more (keras-team/keras#20585): `_maybe_symbolic_build`,
which reduces a batch across workers to learn its shapes, and `reduce_per_replica`, which cannot
reduce scalars. The first is done here from the layout's shapes. The second returns the metrics'
results, merged over all replicas, so that the logs of each step are exact as well.

All of it is active within `exact(...)` only, and only for the versions that it was tested with.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

from raykeras.columns import Layout
from raykeras.errors import ModelError
from raykeras.keras_api import KerasAPI
from raykeras.strategy import replaced

TESTED_KERAS = ("3.12", "3.15")
TESTED_TF_KERAS = ("2.21",)

_share = threading.local()  # per thread, since a strategy traces each replica in a thread of its own


@contextlib.contextmanager
def exact(model: Any, api: KerasAPI, layout: Layout, strategy: tf.distribute.Strategy | None) -> Iterator[None]:
    """Makes `model.fit` and `model.evaluate` exact under a strategy; does nothing without one.

    Raises:
        ModelError: If this Keras was not tested.
    """
    if strategy is None:
        yield
        return
    tested = TESTED_TF_KERAS if api.is_legacy else TESTED_KERAS
    if not api.version.startswith(tuple(f"{v}." for v in tested)):
        raise ModelError(
            f"Several replicas need a version of {api.name} that raykeras was tested with: {', '.join(tested)}; got "
            f"{api.version}. Install `{api.name}=={tested[-1]}.*`, or train on one replica."
        )
    with contextlib.ExitStack() as stack:
        for name in ("train_step", "test_step"):
            step = getattr(model, name)
            stack.callback(model.__dict__.pop, name, None)
            model.__dict__[name] = _sharing(step)
        if api.is_legacy:
            _patch_tf_keras(stack)
        else:
            _patch_keras(stack, model, layout, strategy)
        yield


def _sharing(step: Any) -> Any:
    """A step that takes the global batch's rows off its data, and knows this replica's share."""

    def share_step(data: Any) -> Any:
        batch, global_rows = data
        rows = tf.shape(tf.nest.flatten(batch[0])[0])[0]
        _share.value = tf.cast(rows, tf.float32) / tf.cast(global_rows, tf.float32)
        try:
            return step(batch if len(batch) > 1 else batch[0])
        finally:
            _share.value = None

    return share_step


def _current_share() -> tf.Tensor | None:
    """This replica's share of the global batch, float32 (); None outside of a step."""
    return getattr(_share, "value", None)


def _scaled(value: Any) -> Any:
    share = _current_share()
    return value if share is None else value * tf.cast(share, value.dtype)


def _unscaled(value: Any) -> Any:
    share = _current_share()
    return value if share is None else tf.math.divide_no_nan(value, tf.cast(share, value.dtype))


def _sum_over_replicas(value: Any) -> Any:
    return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, value)


def _patch_tf_keras(stack: contextlib.ExitStack) -> None:
    from tf_keras.src.utils import losses_utils

    original = losses_utils.scale_loss_for_distribution

    def scale(value: Any) -> Any:
        return original(value) if _current_share() is None else _scaled(value)

    stack.enter_context(replaced(losses_utils, "scale_loss_for_distribution", scale))


def _patch_keras(stack: contextlib.ExitStack, model: Any, layout: Layout, strategy: tf.distribute.Strategy) -> None:
    from keras.src.backend.tensorflow import trainer
    from keras.src.losses import loss as losses
    from keras.src.trainers import compile_utils

    def patch(target: Any, name: str, value: Any) -> None:
        stack.enter_context(replaced(target, name, value))

    with strategy.scope():
        model._symbolic_build(data_batch=_zeros(layout))
    stack.callback(model.__dict__.pop, "_maybe_symbolic_build", None)
    model.__dict__["_maybe_symbolic_build"] = lambda iterator=None, data_batch=None: None

    original_reduce, original_mask = losses.reduce_values, losses.apply_mask
    original_scale = losses.scale_loss_for_distribution
    original_unscale = losses.unscale_loss_for_distribution

    def scale(value: Any) -> Any:
        return original_scale(value) if _current_share() is None else _scaled(value)

    def unscale(value: Any) -> Any:
        return original_unscale(value) if _current_share() is None else _unscaled(value)

    def unscale_output(value: Any) -> Any:
        # A traced batch has no static size, so this metric counts replicas, each as one batch.
        if _current_share() is None or tf.inside_function():
            return original_unscale(value)
        return _unscaled(value)

    def reduce_values(values: Any, sample_weight: Any = None, reduction: Any = "sum_over_batch_size") -> Any:
        if _current_share() is None or reduction != "mean_with_sample_weight" or sample_weight is None:
            return original_reduce(values, sample_weight, reduction)
        weights = _sum_over_replicas(tf.cast(tf.reduce_sum(sample_weight), values.dtype))
        return tf.math.divide_no_nan(tf.reduce_sum(values), weights)

    def apply_mask(sample_weight: Any, mask: Any, dtype: Any, reduction: Any) -> Any:
        share = _current_share()
        if mask is None or share is None or reduction not in ("mean", "sum_over_batch_size"):
            return original_mask(sample_weight, mask, dtype, reduction)
        weight = original_mask(sample_weight, mask, dtype, reduction)
        here = tf.reduce_sum(tf.cast(mask, weight.dtype))
        everywhere = _sum_over_replicas(here)
        return weight * tf.math.divide_no_nan(here, everywhere * tf.cast(share, weight.dtype))

    def reduce_per_replica(values: Any, strategy: Any, reduction: str) -> Any:
        if reduction == "auto" and isinstance(values, dict):
            metrics = model.get_metrics_result()
            if set(metrics) == set(values):
                return metrics
            return {name: strategy.reduce("MEAN", value, axis=None) for name, value in values.items()}
        return original_per_replica(values, strategy, reduction)

    original_per_replica = trainer.reduce_per_replica
    patch(losses, "scale_loss_for_distribution", scale)
    patch(losses, "unscale_loss_for_distribution", unscale)
    patch(losses, "reduce_values", reduce_values)
    patch(losses, "apply_mask", apply_mask)
    patch(compile_utils, "loss_module", _Module(losses, unscale_loss_for_distribution=unscale_output))
    patch(trainer, "reduce_per_replica", reduce_per_replica)


class _Module:
    """A module with some of its names replaced."""

    def __init__(self, module: Any, **names: Any) -> None:
        self._module = module
        self.__dict__.update(names)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _zeros(layout: Layout) -> Any:
    """A batch of one row of zeros, of the shapes and dtypes that the data has."""
    flat = []
    for tensor in layout.tensors:
        dtype = tf.string if tensor.dtype == "string" else tf.as_dtype(tensor.dtype)
        if tensor.kind == "ragged":
            values = tf.zeros((1,), dtype)
            flat.append(tf.RaggedTensor.from_row_splits(values, tf.constant([0, 1], tf.int64)))
        elif dtype == tf.string:
            flat.append(tf.fill((1, *tensor.shape), ""))
        else:
            flat.append(tf.zeros((1, *tensor.shape), dtype))
    return layout.structure(flat)
