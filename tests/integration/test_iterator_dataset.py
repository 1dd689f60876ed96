"""A tf.data.Dataset made from a Python iterator: elements, ends, failures and memory."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from raykeras.data.tf_dataset import from_iterator

SPECS = [tf.TensorSpec((None, 2), tf.float32), tf.TensorSpec((None,), tf.string)]


def arrays_of(size: int) -> list[np.ndarray]:
    return [np.full((size, 2), size, np.float32), np.array([b"a" * size] * size, object)]


def elements(dataset: tf.data.Dataset) -> list[tuple[Any, Any]]:
    return [(x.tolist(), text.tolist()) for x, text in dataset.as_numpy_iterator()]


def test_each_iteration_creates_an_iterator() -> None:
    sizes = iter([[1, 2], [], [3]])
    asked: list[int] = []

    def make() -> Iterator[Sequence[np.ndarray]]:
        for size in next(sizes):
            asked.append(size)
            yield arrays_of(size)

    dataset = from_iterator(make, SPECS)
    assert dataset.element_spec == tuple(SPECS)
    assert elements(dataset) == [([[1.0, 1.0]], [b"a"]), ([[2.0, 2.0]] * 2, [b"aa"] * 2)]
    assert elements(dataset) == []
    assert elements(dataset.prefetch(2)) == [([[3.0, 3.0]] * 3, [b"aaa"] * 3)]
    assert asked == [1, 2, 3]


def test_failure_is_raised_again() -> None:
    def make() -> Iterator[Sequence[np.ndarray]]:
        yield arrays_of(1)
        raise OSError("the disk is gone")

    dataset = from_iterator(make, SPECS)
    for _ in range(2):
        iterator = iter(dataset)
        with pytest.raises(tf.errors.OpError, match="The data could not be read"):
            list(iterator)
        with pytest.raises(tf.errors.OpError, match="The data could not be read"):
            next(iterator)


def test_memory_of_large_tensors_is_reused() -> None:
    """With `GeneratorDataset` on Python 3.11, each 4 MB tensor would be mapped again, with up to 1,024 page faults."""
    script = """
    import resource
    import numpy as np
    import tensorflow as tf
    from raykeras.data.tf_dataset import from_iterator

    def faults():
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

    arrays = [np.ones(1 << 18, np.float32)]
    list(from_iterator(lambda: iter([arrays] * 20), [tf.TensorSpec((None,), tf.float32)]))
    for _ in range(20):
        np.ones(1 << 19)
    before = faults()
    for _ in range(100):
        np.ones(1 << 19)
    print("FAULTS", (faults() - before) // 100)
    """
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    assert int(done.stdout.split()[-1]) < 10
