"""Batches read in the calling thread equal those that `next` reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from raykeras.compat.tensorflow import has_private_threadpool, next_in_calling_thread
from raykeras.data.streaming.dataset import Stream
from raykeras.data.streaming.interleave import RankInput
from tests.support.sources import small_source


def datasets() -> dict[str, tf.data.Dataset]:
    x = np.arange(12.0, dtype=np.float32).reshape(6, 2)
    ragged = tf.ragged.constant([[1, 2], [], [3], [4, 5, 6], [7], [8, 9]])
    return {
        "tuple": tf.data.Dataset.from_tensor_slices((x, x[:, 0])).batch(2),
        "dict": tf.data.Dataset.from_tensor_slices(({"a": x, "b": x + 1}, x[:, 0], x[:, 1])).batch(2),
        "text": tf.data.Dataset.from_tensor_slices((x[:, 0].astype(str),)).batch(2),
        "ragged": tf.data.Dataset.from_tensor_slices((ragged, x)).batch(2),
    }


@pytest.mark.parametrize("kind", ["tuple", "dict", "text", "ragged"])
def test_elements_are_independent_of_thread(kind: str) -> None:
    iterator, other = iter(datasets()[kind]), iter(datasets()[kind])

    @tf.function  # type: ignore[untyped-decorator]
    def both() -> Any:
        return next(iterator), next_in_calling_thread(other)

    for _ in range(3):
        expected, element = both()
        tf.nest.assert_same_structure(expected, element, expand_composites=True)
        flat = (tf.nest.flatten(element, expand_composites=True) for element in (expected, element))
        for a, b in zip(*flat, strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)
    with pytest.raises(tf.errors.OutOfRangeError, match="End of sequence"):
        tf.function(lambda: next_in_calling_thread(other))()


def test_only_datasets_with_own_threads_are_read_inline(tmp_path: Path) -> None:
    """A dataset that runs Python, such as one that a callback trains on, would deadlock with the waiting thread."""
    assert not has_private_threadpool(iter(datasets()["tuple"]))
    stream = Stream(RankInput(*small_source(tmp_path), 0, 1, 1))
    assert has_private_threadpool(iter(stream.endless_dataset()))
    assert has_private_threadpool(iter(stream.pass_dataset()))
    stream.close()
