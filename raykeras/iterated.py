"""What a Python iterator gives, as a `tf.data.Dataset`.

Enters: a function that makes an iterator over tuples of arrays. Leaves: a dataset of them; each iteration makes an
iterator.

`tf.data.Dataset.from_generator` does this, too. But in TensorFlow 2.21 on Python 3.11 the first such dataset sets
glibc's `M_MMAP_THRESHOLD` to 128 KB for the whole process (`ApplyPython311MemoryPatch`, which is about tensorflow's
issue 65675). From then on every larger tensor, those of the training too, is mapped afresh, page by page, each time:
that halves what a stream delivers. And it leaves an iterator to be finalized by Python, which warns where Python has
ended.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

as_it_is = tf.autograph.experimental.do_not_convert
"""For functions of datasets: AutoGraph looks for half a second for what it could convert in ours, and finds nothing."""


def iterated_dataset(make: Callable[[], Iterator[Sequence[np.ndarray]]], specs: Sequence[tf.TensorSpec]) -> Any:
    """A dataset of what iterators give.

    Args:
        make: Makes an iterator, over sequences of arrays that fit the specs. It is used from one thread at a time, and
            one iteration at a time.
        specs: One for each array.

    Returns:
        A `tf.data.Dataset` of tuples of tensors. After an exception of an iterator every further element fails, of
        later iterations too: to come to an end instead, for another replica that asks, would hide it from Keras. What
        TensorFlow raises then says no more than that; who makes the iterator must keep the exception. A function that
        raised would have TensorFlow print its traceback several times.
    """
    nothing = [np.zeros([size or 0 for size in spec.shape], spec.dtype.as_numpy_dtype) for spec in specs]
    begun: list[Iterator[Any]] = []
    has_failed = False

    def following(number: np.ndarray) -> list[Any]:
        nonlocal has_failed
        arrays = None
        try:
            if not number and not has_failed:
                begun[:] = [make()]
            arrays = None if has_failed else next(begun[0], None)
        except Exception:
            has_failed = True
        return [np.bool_(has_failed), np.bool_(arrays is not None), *(nothing if arrays is None else arrays)]

    @as_it_is
    def element(number: tf.Tensor) -> Any:
        kinds = [tf.bool, tf.bool, *(spec.dtype for spec in specs)]
        is_failed, is_there, *tensors = tf.numpy_function(following, [number], kinds)
        tf.debugging.Assert(tf.logical_not(is_failed), ["The data could not be read."])
        is_there.set_shape(())
        for tensor, spec in zip(tensors, specs, strict=True):
            tensor.set_shape(spec.shape)
        return is_there, tuple(tensors)

    dataset = tf.data.Dataset.counter().map(element).take_while(as_it_is(lambda is_there, tensors: is_there))
    return dataset.map(as_it_is(lambda is_there, tensors: tensors))
