"""A rank's rows as a `tf.data.Dataset`, pass after pass.

Enters: a `Feed`. Leaves: batches, already cut for the replicas of this worker, of a known number. Python handles chunks
only, tf.data cuts them into batches in C++.

The element is Keras' `(x,)`, `(x, y)` or `(x, y, sample_weight)`; with several replicas it is `(that, rows)`, where
`rows` is the number of rows of the *global* batch (see `strategy`). Elements are then one for each replica of the
worker in turn; one may be empty.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import tensorflow as tf

from raykeras.chunks import Chunk, Feed, chunks_of, components
from raykeras.columns import Layout, Tensor
from raykeras.elements import packed
from raykeras.iterated import as_it_is, iterated_dataset

PREFETCHED_CHUNKS = 2  # an execution of many steps begins in one chunk and ends in the next
_CLOSE_S = 10.0


class Stream:
    """The batches of a `Feed`. Not thread-safe; one iteration at a time."""

    def __init__(self, feed: Feed) -> None:
        self.feed = feed
        self.failure: Exception | None = None
        self._is_closed = False
        self._handed: deque[tuple[int, float, float]] = deque()  # first step, asked for, there
        self._read = self._guarded()
        self._begun: Future[Chunk | None] | None = None
        self._beginning: threading.Thread | None = None
        self._chunks = self._following()

    def begin(self) -> None:
        """Begins to read, before the first batch is asked for."""
        self._begun = Future()
        # of a thread that is no daemon an interrupted program would wait for the end
        self._beginning = threading.Thread(
            target=self._read_first, args=(self._begun,), name="raykeras-begin", daemon=True
        )
        self._beginning.start()

    def close(self) -> None:
        """Ends what still reads ahead, once a thread has the chunk that it waits for.

        Such a thread would wait for ever for a Ray that is gone, and Python, at its exit, for the thread.
        """
        self._is_closed = True
        deadline = time.monotonic() + _CLOSE_S
        while time.monotonic() < deadline:
            try:
                self._read.close()
                break
            except ValueError:  # the thread is in it
                time.sleep(0.01)
        if self._beginning is not None:
            self._beginning.join(max(0.0, deadline - time.monotonic()))

    def sample(self, num_rows: int = 8) -> list[Any]:
        """The first rows of the source, at most so many, as tensors in the order of the layout."""
        opened, layout = self.feed.opened, self.feed.layout
        where = str(opened.head_unit)
        columns = layout.decode(opened.head(num_rows, layout.columns), where)
        return as_tensors(layout, layout.assemble(layout.apply_transform(columns, (0,), where), where))

    def waited_s(self, step: int, since: float) -> float:
        """Seconds after `since` for which `step`'s batch was still not there.

        Args:
            step: Number of the batch, counted through all passes.
            since: When the step before it ended, by `time.perf_counter`.
        """
        waited = 0.0
        while self._handed and self._handed[0][0] <= step:
            _, asked, there = self._handed.popleft()
            waited = max(0.0, there - max(asked, since))
        return waited

    def endless_dataset(self) -> tf.data.Dataset:
        """Every batch through all passes, for `fit(steps_per_epoch=…)`.

        It says that it is infinite, since a distributed iterator would otherwise ask all workers at
        every step whether there is another batch.
        """
        dataset = self._dataset(lambda: self._chunks)
        return dataset.apply(tf.data.experimental.assert_cardinality(tf.data.INFINITE_CARDINALITY))

    def pass_dataset(self, num_steps: int | None = None) -> tf.data.Dataset:
        """The batches of one pass; each iteration goes on to the next.

        A stream that begins in the middle of a pass comes to its end first, and then the dataset does not say how
        long it is.

        Args:
            num_steps: Batches in a pass; the plan's by default.
        """
        num_steps = num_steps or self.feed.plan(0).num_steps
        begun = self.feed.first_step % num_steps
        first = [num_steps - begun]

        def one_pass() -> Iterator[Chunk]:
            missing = first.pop() if first else num_steps
            while missing:
                chunk = next(self._chunks)
                missing -= len(chunk.global_rows)
                yield chunk

        dataset = self._dataset(one_pass)
        if begun:
            return dataset
        return dataset.apply(tf.data.experimental.assert_cardinality(num_steps * self.feed.num_replicas))

    def _guarded(self) -> Generator[Chunk]:
        """Keeps what was raised, of which tf.data passes on the text only, and when chunks came."""
        asked = time.perf_counter()
        try:
            for chunk in chunks_of(self.feed):
                if self._is_closed:
                    return
                self._handed.append((chunk.first_step, asked, time.perf_counter()))
                yield chunk
                asked = time.perf_counter()
        except Exception as error:
            self.failure = error
            raise

    def _read_first(self, begun: Future[Chunk | None]) -> None:
        try:
            begun.set_result(next(self._read, None))
        except BaseException as error:  # or one that waits for it would wait for ever
            begun.set_exception(error)

    def _following(self) -> Iterator[Chunk]:
        """The chunks in order; the first may have been begun."""
        if self._begun is not None:
            first = self._begun.result()
            self._begun = None
            if first is None:
                return
            yield first
            del first
        yield from self._read

    def _dataset(self, chunks: Callable[[], Iterator[Chunk]]) -> tf.data.Dataset:
        layout, replicas = self.feed.layout, self.feed.num_replicas
        specs = []
        for tensor in layout.tensors:
            specs.append(tf.TensorSpec((None, *tensor.shape), dtype_of(tensor)))
            if tensor.kind == "ragged":
                specs.append(tf.TensorSpec((None,), tf.int64))
        numbers = tf.TensorSpec((None,), tf.int64)
        dataset = iterated_dataset(
            lambda: ((*c.arrays, c.cuts, c.global_rows) for c in chunks()), [*specs, numbers, numbers]
        )

        @as_it_is
        def elements(*components: tf.Tensor) -> tf.data.Dataset:
            *arrays, cuts, global_rows = components
            batches = _batches(layout, arrays, cuts)
            if replicas == self.feed.num_ranks == 1:
                return batches
            rows = tf.data.Dataset.from_tensor_slices(tf.repeat(global_rows, replicas))
            pairs = tf.data.Dataset.zip((batches, rows))
            return pairs.map(as_it_is(packed)) if layout.has_none else pairs

        options = tf.data.Options()
        options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
        options.deterministic = True
        options.autotune.enabled = False  # there is nothing to tune, and watching costs as much as cutting
        options.threading.private_threadpool_size = 1  # see `raykeras.executions`; it is for functions of ours only
        return dataset.prefetch(PREFETCHED_CHUNKS).flat_map(elements).with_options(options)


def _batches(layout: Layout, arrays: Sequence[Any], cuts: tf.Tensor) -> tf.data.Dataset:
    """A chunk's arrays, cut."""
    if all(tensor.kind != "ragged" for tensor in layout.tensors):
        # a fifth of the time that a function for each batch takes
        return tf.data.Dataset.from_tensors(layout.element(arrays)).rebatch(cuts[1:] - cuts[:-1])

    @as_it_is
    def batch(i: tf.Tensor) -> Any:
        flat, component = [], iter(arrays)
        for tensor in layout.tensors:
            value = next(component)
            if tensor.kind == "ragged":
                value = tf.RaggedTensor.from_row_splits(value, next(component), validate=False)
            flat.append(value[cuts[i] : cuts[i + 1]])
        return layout.element(flat)

    return tf.data.Dataset.range(tf.size(cuts, tf.int64) - 1).map(batch)


def dtype_of(tensor: Tensor) -> tf.DType:
    """TensorFlow's name for a tensor's dtype."""
    return tf.string if tensor.dtype == "string" else tf.as_dtype(tensor.dtype)


def as_tensors(layout: Layout, arrays: Sequence[Any]) -> list[Any]:
    """Arrays in the order of the layout as TensorFlow's tensors."""
    tensors = []
    for tensor, array in zip(layout.tensors, arrays, strict=True):
        values, *row_splits = (tf.constant(component) for component in components(tensor, array))
        tensors.append(tf.RaggedTensor.from_row_splits(values, *row_splits) if row_splits else values)
    return tensors
