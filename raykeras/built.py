"""What Keras builds in the first step, built before it.

Enters: a model, and the layout of its data. Leaves: the same model, with all its variables, those of its optimizer
and its metrics.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

from raykeras.columns import Layout
from raykeras.keras_api import KerasAPI
from raykeras.strategy import scope
from raykeras.stream import dtype_of

_UNKNOWN = 32  # of a dimension that differs from batch to batch; enough for a convolution


def make_variables(model: Any, api: KerasAPI, layout: Layout, strategy: tf.distribute.Strategy | None) -> None:
    """Builds all that `fit` would build."""
    batch: tuple[Any, ...] = zeros(layout)
    with scope(strategy):
        if not api.is_legacy:
            api.build_symbolically(model, batch)
            return
        if not api.has_call(model):
            api.build_optimizer(model)
            return
        x, y = (*batch, None)[:2]
        predicted = model(x, training=False)
        with contextlib.suppress(AttributeError):  # a model with a step of its own has no such containers
            if not model.compiled_loss._built:
                model.compiled_loss.build(predicted)
            if not model.compiled_metrics._built:
                model.compiled_metrics.build(predicted, y)
            outputs = zip(tf.nest.flatten(y), tf.nest.flatten(predicted), strict=False)
            for metrics, (true, output) in zip(_by_output(model.compiled_metrics), outputs, strict=False):
                for metric in metrics:
                    if not metric.variables and len(inspect.signature(metric.build).parameters) == 2:  # as of F1Score
                        metric.build(true.shape, output.shape)
        api.build_optimizer(model)


def _by_output(compiled: Any) -> Iterator[list[Any]]:
    """Yield the metrics of tf_keras' container, output by output."""
    for pair in zip(compiled._metrics, compiled._weighted_metrics, strict=True):
        yield [metric for metric in tf.nest.flatten(pair) if metric is not None]


def zeros(layout: Layout) -> Any:
    """A batch of one row of zeros, of the shapes and dtypes that the data has."""
    flat = []
    for tensor in layout.tensors:
        shape = [_UNKNOWN if size is None else size for size in tensor.shape]
        dtype = dtype_of(tensor)
        if tensor.kind == "ragged":
            values = tf.zeros((1,), dtype)
            flat.append(tf.RaggedTensor.from_row_splits(values, tf.constant([0, 1], tf.int64)))
        elif dtype == tf.string:
            flat.append(tf.fill((1, *shape), ""))
        else:
            flat.append(tf.zeros((1, *shape), dtype))
    return layout.structure(flat)
