"""Elements of a dataset for several replicas: a replica's batch, and the rows of the global one."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

_NONE_DTYPE = tf.complex64  # which no column has


def packed(batch: Any, global_rows: tf.Tensor) -> tuple[Any, tf.Tensor]:
    """Return an element. TensorFlow cannot distribute None (it asks for its shape); an empty tensor stands for it."""
    none = tf.zeros((0,), _NONE_DTYPE)
    return tf.nest.map_structure(lambda value: none if value is None else value, batch), global_rows


def unpacked(element: tuple[Any, tf.Tensor]) -> tuple[Any, tf.Tensor]:
    """Return the batch of an element, with None again, and the rows of the global batch."""
    batch, global_rows = element
    return tf.nest.map_structure(lambda value: None if value.dtype == _NONE_DTYPE else value, batch), global_rows
