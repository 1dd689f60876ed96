"""Train with batches that have fewer rows than there are replicas.

Many layers fail without rows or return NaN: BatchNormalization divides by their number, and TensorFlow's convolutions
on CPUs have no gradient. So a replica without rows computes with a row that it had before, and neither its gradient nor
its metrics count. Synchronized BatchNormalization would include that row in its statistics; a model with such layers
computes without rows.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from raykeras.compat.patch import patched_method
from raykeras.data.batch_spec import BatchSpec
from raykeras.data.elements import num_rows, packed
from raykeras.data.tf_dataset import no_autograph
from raykeras.distribute.weighting import current


def filled(dataset: tf.data.Dataset, batch_spec: BatchSpec, sample: Sequence[Any]) -> tf.data.Dataset:
    """Return a dataset whose elements have a row in place of none, of a global batch of 0 rows.

    Args:
        dataset: Elements `(batch, rows of the global batch)`.
        batch_spec: Spec of the batches.
        sample: Tensors of a few rows, in the order of `batch_spec.tensors`; used before there is another row.
    """
    first, _ = packed(batch_spec.element([tensor[:1] for tensor in sample]), tf.zeros((), tf.int64))

    @no_autograph
    def fill(components: Any, element: Any) -> Any:
        row = tf.nest.pack_sequence_as(first, components, expand_composites=True)
        batch, global_rows = element
        is_empty = num_rows(batch) == 0
        output = _selected(is_empty, row, batch)
        next_row = tf.nest.map_structure(lambda tensor: tensor[:1], output)
        return _components(next_row), (output, tf.where(is_empty, tf.zeros_like(global_rows), global_rows))

    return dataset.scan(_components(first), fill)


def _components(row: Any) -> tuple[tf.Tensor, ...]:
    """Return the tensors of a row, as `scan` has no ragged state."""
    return tuple(tf.nest.flatten(row, expand_composites=True))


def _selected(is_empty: tf.Tensor, row: Any, batch: Any) -> Any:
    """Return a batch, or the row if the batch is empty."""

    def select(row: Any, tensor: Any) -> Any:
        if isinstance(tensor, tf.RaggedTensor):
            return tf.concat([tensor, row[: tf.cast(is_empty, tf.int64)]], 0)
        return tf.cond(is_empty, lambda: row, lambda: tensor)

    return tf.nest.map_structure(select, row, batch)


def uncounted(stack: contextlib.ExitStack, model: Any, mean: type) -> None:
    """Keep the gradient and the metrics of a replica from counting where its share of the batch is zero.

    Args:
        stack: Undoes the patches when it closes.
        model: A compiled model whose metrics have variables.
        mean: The `Mean` class of the model's Keras package. Keras' own means count each replica once if they are given
            a scalar without a weight.
    """
    for metric in model.metrics:
        update = _weighted_update(metric) if type(metric) is mean else _undone_update(metric)
        stack.enter_context(patched_method(metric, "update_state", update))
    stack.enter_context(patched_method(model, "compute_loss", _without_gradient(model.compute_loss)))


def _weighted_update(metric: Any) -> Callable[..., Any]:
    update_state = metric.update_state

    def update(values: Any, sample_weight: Any = None) -> Any:
        if current.share is None or (sample_weight is None and tf.convert_to_tensor(values).shape.rank == 0):
            return update_state(values, sample_weight=sample_weight)
        weight = tf.ones_like(values) if sample_weight is None else tf.convert_to_tensor(sample_weight)
        return update_state(values, sample_weight=tf.where(current.share > 0, weight, tf.zeros_like(weight)))

    return update


def _undone_update(metric: Any) -> Callable[..., Any]:
    update_state = metric.update_state

    def update(*args: Any, **kwargs: Any) -> Any:
        if current.share is None:
            return update_state(*args, **kwargs)
        before = [(variable, tf.identity(variable)) for variable in metric.variables if _is_of_replica(variable)]
        result = update_state(*args, **kwargs)
        for variable, value in before:
            variable.assign(tf.where(current.share > 0, tf.convert_to_tensor(variable), value))
        return result

    return update


def _is_of_replica(variable: Any) -> bool:
    """Return whether each replica has its own value of a metric's variable."""
    tf_variable = variable if isinstance(variable, tf.Variable) else variable.value  # Keras 3 wraps it
    return bool(tf_variable.synchronization == tf.VariableSynchronization.ON_READ)


def _without_gradient(compute_loss: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(compute_loss)
    def compute(*args: Any, **kwargs: Any) -> Any:
        loss = compute_loss(*args, **kwargs)
        if current.share is None or loss is None:
            return loss
        return tf.where(current.share > 0, loss, tf.stop_gradient(loss))

    return compute
