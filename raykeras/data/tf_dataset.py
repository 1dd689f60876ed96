"""Create a `tf.data.Dataset` from a Python iterator.

`tf.data.Dataset.from_generator` is not used, since it lowers glibc's `M_MMAP_THRESHOLD` for the whole process
(TensorFlow 2.21 on Python 3.11, tensorflow issue 65675), so that every large tensor is mapped again. It also leaves
iterators to be finalized by Python, which warns at interpreter exit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from raykeras.data.batch_spec import ElementSpec

no_autograph = tf.autograph.experimental.do_not_convert
"""Decorator for functions of datasets: there is nothing for AutoGraph to convert in them, and looking takes time."""


def from_iterator(make: Callable[[], Iterator[Sequence[np.ndarray]]], specs: Sequence[tf.TensorSpec]) -> Any:
    """Return a dataset of the elements of an iterator.

    Once an iterator has raised, every further element fails, also in later iterations: if the dataset ended instead,
    another replica would see a regular end, and Keras would not notice the error. TensorFlow's error does not contain
    the exception, so the iterator must keep it. It is not raised to TensorFlow, which would print it several times.

    Args:
        make: Returns an iterator over sequences of arrays that match `specs`; called for each iteration of the dataset.
            Iterators are used by one thread at a time, and one at a time.
        specs: Shape and dtype of each array.

    Returns:
        A `tf.data.Dataset` of tuples of tensors.
    """
    placeholders = [np.zeros([size or 0 for size in spec.shape], spec.dtype.as_numpy_dtype) for spec in specs]
    current: list[Iterator[Any]] = []
    has_failed = False

    def next_arrays(index: np.ndarray) -> list[Any]:
        nonlocal has_failed
        arrays = None
        try:
            if not index and not has_failed:
                current[:] = [make()]
            arrays = None if has_failed else next(current[0], None)
        except Exception:
            has_failed = True
        return [np.bool_(has_failed), np.bool_(arrays is not None), *(placeholders if arrays is None else arrays)]

    @no_autograph
    def element(index: tf.Tensor) -> Any:
        dtypes = [tf.bool, tf.bool, *(spec.dtype for spec in specs)]
        is_failed, has_element, *tensors = tf.numpy_function(next_arrays, [index], dtypes)
        tf.debugging.Assert(tf.logical_not(is_failed), ["The data could not be read."])
        has_element.set_shape(())
        for tensor, spec in zip(tensors, specs, strict=True):
            tensor.set_shape(spec.shape)
        return has_element, tuple(tensors)

    dataset = tf.data.Dataset.counter().map(element).take_while(no_autograph(lambda has_element, tensors: has_element))
    return dataset.map(no_autograph(lambda has_element, tensors: tensors))


def dtype_of(tensor: ElementSpec) -> tf.DType:
    """Return the TensorFlow dtype of a tensor."""
    return tf.string if tensor.dtype == "string" else tf.as_dtype(tensor.dtype)
