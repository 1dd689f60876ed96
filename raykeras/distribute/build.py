"""Create the variables of a model, its optimizer and its metrics before the first step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from raykeras.compat.keras_api import KerasAPI
from raykeras.data.batch_spec import BatchSpec
from raykeras.data.tf_dataset import dtype_of
from raykeras.distribute.model_checks import check_model
from raykeras.distribute.strategy import scope

_UNKNOWN_SIZE = 32  # of a dimension that varies between batches; large enough for a convolution


def make_variables(model: Any, api: KerasAPI, batch_spec: BatchSpec, strategy: tf.distribute.Strategy | None) -> None:
    """Create the variables that Keras would create in the first step of `fit`.

    Args:
        model: A compiled model.
        api: The model's Keras package.
        batch_spec: Spec of the training batches.
        strategy: Strategy to create the variables under; None for a single replica.
    """
    batch = zeros(batch_spec)
    with scope(strategy):
        api.build(model, batch)


def zeros(batch_spec: BatchSpec) -> tuple[Any, ...]:
    """Return a batch of one row of zeros with the shapes and dtypes of a spec."""
    flat = []
    for tensor in batch_spec.tensors:
        shape = [_UNKNOWN_SIZE if size is None else size for size in tensor.shape]
        dtype = dtype_of(tensor)
        if tensor.kind == "ragged":
            values = tf.zeros((1,), dtype)
            flat.append(tf.RaggedTensor.from_row_splits(values, tf.constant([0, 1], tf.int64)))
        elif dtype == tf.string:
            flat.append(tf.fill((1, *shape), ""))
        else:
            flat.append(tf.zeros((1, *shape), dtype))
    return batch_spec.structure(flat)


def load_variables(
    model: Any, api: KerasAPI, named_values: Sequence[tuple[str, np.ndarray]], batch_spec: BatchSpec
) -> None:
    """Assign trained values to the variables of the user's model.

    Args:
        model: The model; its variables are created first if it is not built.
        api: The model's Keras package.
        named_values: Path and value of each variable of a copy of the model and its optimizer, in the order of
            `KerasAPI.variables`. That order can differ in the model, for example if its layers were quantized after
            they were built. The paths can differ too, if Keras numbers layers of a subclass. So values are assigned
            by path if all paths are equal, and by order otherwise.
        batch_spec: Spec of the batches that the values were trained on.
    """
    if not model.built:
        make_variables(model, api, check_model(model, api, batch_spec), None)
    api.build_optimizer(model)
    variables, by_path = api.variables(model), dict(named_values)
    paths = [api.path_of(variable) for variable in variables]
    if len(by_path) == len(named_values) and sorted(paths) == sorted(by_path):
        values = [by_path[path] for path in paths]
    else:
        values = [value for _, value in named_values]
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)
