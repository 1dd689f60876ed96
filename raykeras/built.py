"""What Keras builds in the first step, built before it.

Enters: a model, and the layout of its data. Leaves: the same model, with all its variables, those of its optimizer
and its metrics.
"""

from __future__ import annotations

import contextlib
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
            model._symbolic_build(data_batch=batch)
            return
        x, y = (*batch, None)[:2]
        predicted = model(x, training=False)
        with contextlib.suppress(AttributeError):  # a model with a step of its own has no such containers
            if not model.compiled_loss._built:
                model.compiled_loss.build(predicted)
            if not model.compiled_metrics._built:
                model.compiled_metrics.build(predicted, y)
        api.build_optimizer(model)


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
