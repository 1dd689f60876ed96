"""A rank's rows as a `tf.data.Dataset`, pass after pass.

Python handles chunks of several batches; tf.data cuts them into batches, one for each replica of the worker in turn.
An element is Keras' `(x,)`, `(x, y)` or `(x, y, sample_weight)`. With several replicas it is `(batch, rows)`, where
`rows` is the number of rows in the *global* batch (see `raykeras.distribute.strategy`); a replica's batch may be empty.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import tensorflow as tf

from raykeras.data.batch_spec import BatchSpec
from raykeras.data.elements import packed
from raykeras.data.streaming.interleave import RankInput, RowChunk, chunks_of, components
from raykeras.data.tf_dataset import dtype_of, from_iterator, no_autograph

PREFETCHED_CHUNKS = 2  # an execution of many steps may need the end of one chunk and the start of the next

_CLOSE_S = 10.0


class Stream:
    """The batches of a `RankInput`; a `raykeras.data.train_input.TrainInput`."""

    is_epoch_over = False

    def __init__(self, rank_input: RankInput) -> None:
        self.rank_input = rank_input
        self.failure: Exception | None = None
        self._is_closed = False
        self._handed: deque[tuple[int, float, float]] = deque()  # first step, time requested, time received
        self._read = self._observed()
        self._first_chunk: Future[RowChunk | None] | None = None
        self._first_thread: threading.Thread | None = None
        self._chunks = self._ordered_chunks()

    def begin(self) -> None:
        self._first_chunk = Future()
        # A daemon, so that an interrupted program does not wait for it.
        self._first_thread = threading.Thread(
            target=self._read_first, args=(self._first_chunk,), name="raykeras-begin", daemon=True
        )
        self._first_thread.start()

    def close(self) -> None:
        """Stop reading ahead, once a thread that waits for a chunk has received it.

        Otherwise such a thread would block on a Ray that has been shut down, and the interpreter on the thread.
        """
        self._is_closed = True
        deadline = time.monotonic() + _CLOSE_S
        while time.monotonic() < deadline:
            try:
                self._read.close()
                break
            except ValueError:  # a thread is executing the generator
                time.sleep(0.01)
        if self._first_thread is not None:
            self._first_thread.join(max(0.0, deadline - time.monotonic()))

    def sample(self, num_rows: int = 8) -> list[Any]:
        """Return at most `num_rows` of the source's first rows, as tensors in the order of the batch spec."""
        opened, batch_spec = self.rank_input.opened, self.rank_input.batch_spec
        where = str(opened.head_unit)
        columns = batch_spec.decode(opened.head(num_rows, batch_spec.columns), where)
        return as_tensors(batch_spec, batch_spec.assemble(batch_spec.apply_transform(columns, (0,), where), where))

    def waited_s(self, step: int, since: float) -> float:
        waited = 0.0
        while self._handed and self._handed[0][0] <= step:
            _, requested, received = self._handed.popleft()
            waited = max(0.0, received - max(requested, since))
        return waited

    def callbacks(self, api: Any) -> list[Any]:
        return []

    def endless_dataset(self) -> tf.data.Dataset:
        """Return the batches of all passes, for `fit(steps_per_epoch=…)`.

        Its cardinality is infinite, since a distributed iterator would otherwise synchronize all workers at every
        step to ask whether there is another batch.
        """
        dataset = self._dataset(lambda: self._chunks)
        return dataset.apply(tf.data.experimental.assert_cardinality(tf.data.INFINITE_CARDINALITY))

    def pass_dataset(self, num_steps: int | None = None) -> tf.data.Dataset:
        """Return the batches of one pass; each iteration continues with the next pass.

        If the stream starts within a pass, the first iteration is the rest of that pass, and the cardinality of the
        dataset is unknown.

        Args:
            num_steps: Batches in a pass; by default those of the plan.
        """
        num_steps = num_steps or self.rank_input.plan(0).num_steps
        first_step = self.rank_input.first_step % num_steps
        first_pass_steps = [num_steps - first_step]

        def one_pass() -> Iterator[RowChunk]:
            remaining = first_pass_steps.pop() if first_pass_steps else num_steps
            while remaining:
                chunk = next(self._chunks)
                remaining -= len(chunk.global_rows)
                yield chunk

        dataset = self._dataset(one_pass)
        if first_step:
            return dataset
        return dataset.apply(tf.data.experimental.assert_cardinality(num_steps * self.rank_input.local_replicas))

    def ending_dataset(self, num_steps: int) -> tf.data.Dataset:
        return self.pass_dataset()

    def _observed(self) -> Generator[RowChunk]:
        """Yield the chunks; record when they arrive, and the exception, of which tf.data reports only the text."""
        requested = time.perf_counter()
        try:
            for chunk in chunks_of(self.rank_input):
                if self._is_closed:
                    return
                self._handed.append((chunk.first_step, requested, time.perf_counter()))
                yield chunk
                requested = time.perf_counter()
        except Exception as error:
            self.failure = error
            raise

    def _read_first(self, first_chunk: Future[RowChunk | None]) -> None:
        try:
            first_chunk.set_result(next(self._read, None))
        except BaseException as error:  # raised in the thread that waits for the chunk
            first_chunk.set_exception(error)

    def _ordered_chunks(self) -> Iterator[RowChunk]:
        """Yield the chunks in order, the first one from the thread that `begin` started, if it was called."""
        if self._first_chunk is not None:
            first = self._first_chunk.result()
            self._first_chunk = None
            if first is None:
                return
            yield first
            del first
        yield from self._read

    def _dataset(self, chunks: Callable[[], Iterator[RowChunk]]) -> tf.data.Dataset:
        batch_spec, replicas = self.rank_input.batch_spec, self.rank_input.local_replicas
        specs = []
        for tensor in batch_spec.tensors:
            specs.append(tf.TensorSpec((None, *tensor.shape), dtype_of(tensor)))
            if tensor.kind == "ragged":
                specs.append(tf.TensorSpec((None,), tf.int64))
        numbers = tf.TensorSpec((None,), tf.int64)
        dataset = from_iterator(
            lambda: ((*c.arrays, c.cuts, c.global_rows) for c in chunks()), [*specs, numbers, numbers]
        )

        @no_autograph
        def elements(*components: tf.Tensor) -> tf.data.Dataset:
            *arrays, cuts, global_rows = components
            batches = _batches(batch_spec, arrays, cuts)
            if replicas == self.rank_input.num_ranks == 1:
                return batches
            rows = tf.data.Dataset.from_tensor_slices(tf.repeat(global_rows, replicas))
            pairs = tf.data.Dataset.zip((batches, rows))
            return pairs.map(no_autograph(packed)) if batch_spec.has_none else pairs

        options = tf.data.Options()
        options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
        options.deterministic = True
        options.autotune.enabled = False  # there is nothing to tune, and collecting statistics is not free
        # A separate thread, see `raykeras.distribute.executions`; it runs only the functions of this module.
        options.threading.private_threadpool_size = 1
        return dataset.prefetch(PREFETCHED_CHUNKS).flat_map(elements).with_options(options)


def _batches(batch_spec: BatchSpec, arrays: Sequence[Any], cuts: tf.Tensor) -> tf.data.Dataset:
    """Cut the arrays of a chunk into batches."""
    if all(tensor.kind != "ragged" for tensor in batch_spec.tensors):
        # `rebatch` is faster than a function that is called for each batch.
        return tf.data.Dataset.from_tensors(batch_spec.element(arrays)).rebatch(cuts[1:] - cuts[:-1])

    @no_autograph
    def batch(i: tf.Tensor) -> Any:
        flat, component = [], iter(arrays)
        for tensor in batch_spec.tensors:
            value = next(component)
            if tensor.kind == "ragged":
                value = tf.RaggedTensor.from_row_splits(value, next(component), validate=False)
            flat.append(value[cuts[i] : cuts[i + 1]])
        return batch_spec.element(flat)

    return tf.data.Dataset.range(tf.size(cuts, tf.int64) - 1).map(batch)


def as_tensors(batch_spec: BatchSpec, arrays: Sequence[Any]) -> list[Any]:
    """Return arrays in the order of the batch spec as TensorFlow tensors."""
    tensors = []
    for tensor, array in zip(batch_spec.tensors, arrays, strict=True):
        values, *row_splits = (tf.constant(component) for component in components(tensor, array))
        tensors.append(tf.RaggedTensor.from_row_splits(values, *row_splits) if row_splits else values)
    return tensors
