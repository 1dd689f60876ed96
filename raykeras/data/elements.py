"""Dataset elements for several replicas: a replica's batch with the number of rows of the global batch."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

_NONE_DTYPE = tf.complex64  # not used by any column


def packed(batch: Any, global_rows: tf.Tensor) -> tuple[Any, tf.Tensor]:
    """Return an element with empty tensors in place of None, which TensorFlow cannot distribute."""
    none = tf.zeros((0,), _NONE_DTYPE)
    return tf.nest.map_structure(lambda value: none if value is None else value, batch), global_rows


def num_rows(batch: Any) -> tf.Tensor:
    """Return the number of rows of a packed batch, int32 ()."""
    return tf.shape(next(value for value in tf.nest.flatten(batch) if value.dtype != _NONE_DTYPE))[0]


def unpacked(element: tuple[Any, tf.Tensor]) -> tuple[Any, tf.Tensor]:
    """Return the batch of a packed element, with None restored, and the rows of the global batch."""
    batch, global_rows = element
    return tf.nest.map_structure(lambda value: None if value.dtype == _NONE_DTYPE else value, batch), global_rows
