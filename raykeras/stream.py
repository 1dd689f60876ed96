"""A rank's rows as a `tf.data.Dataset`, pass after pass.

Enters: an open source with its layout, the plan of each pass, the rank. Leaves: batches, already cut
for the replicas of this worker, of a known number.

Blocks of single lanes are woven into *chunks* of several batches by one strided copy each; Python
handles chunks only, tf.data slices them into batches in C++. A source in memory needs neither Ray
Data nor blocks: a chunk is gathered by row number.

The element is Keras' `(x,)`, `(x, y)` or `(x, y, sample_weight)`; with several replicas it is
`(that, rows)`, where `rows` is the number of rows of the *global* batch (see `strategy`). Elements
are then one for each replica of the worker in turn; one may be empty.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import tensorflow as tf

from raykeras.blocks import Block, gather_tasks, local_blocks, ray_blocks
from raykeras.columns import Layout, Tensor
from raykeras.errors import ColumnError
from raykeras.plan import PassPlan, Window, replica_cuts
from raykeras.reads import Reading
from raykeras.sources import Columns, OpenSource

CHUNK_NBYTES = 4 << 20
MAX_CHUNK_BATCHES = 512
PREFETCHED_BATCHES = 4


@dataclass(frozen=True)
class Feed:
    """Rows to be handed to one rank, pass after pass.

    Attributes:
        opened, layout: The source and its tensors.
        plan: Pass number to its plan. All have the same number of steps.
        rank, num_ranks: Whose rows.
        num_replicas: Replicas of this worker, between which its part of a batch is cut.
        num_steps: Steps over all passes after which the feed ends; None for no end.
        first_step: Step, counted through all passes, at which it begins.
        reading: Limits for Ray Data; None where the source is in memory.
    """

    opened: OpenSource
    layout: Layout
    plan: Callable[[int], PassPlan]
    rank: int
    num_ranks: int
    num_replicas: int
    num_steps: int | None = None
    first_step: int = 0
    reading: Reading | None = None

    def passes(self) -> Iterator[tuple[int, PassPlan, int, int]]:
        """Number, plan, first and past-the-last step of each pass."""
        step = self.first_step
        plan = self.plan(0)
        while self.num_steps is None or step < self.num_steps:
            index, first = divmod(step, plan.num_steps)
            if plan.epoch != index:
                plan = self.plan(index)
            last = plan.num_steps
            if self.num_steps is not None:
                last = min(last, self.num_steps - index * plan.num_steps)
            yield index, plan, first, last
            step += last - first


@dataclass(frozen=True)
class Chunk:
    """Consecutive batches of a rank.

    Attributes:
        first_step: Number of the first batch, counted through all passes.
        arrays: One array for each tensor; two, values and row splits, for a ragged one.
        cuts: Where the slices of the replicas begin and end: int64 (batches * replicas + 1,).
        global_rows: Rows of the global batches: int64 (batches,).
    """

    first_step: int
    arrays: tuple[np.ndarray, ...]
    cuts: np.ndarray
    global_rows: np.ndarray


class Stream:
    """The batches of a `Feed`. Not thread-safe; one iteration at a time."""

    def __init__(self, feed: Feed) -> None:
        self.feed = feed
        self.failure: Exception | None = None
        self._handed: deque[tuple[int, float, float]] = deque()  # first step, asked for, there
        self._chunks = self._guarded(_indexed_chunks if _by_index(feed) else _woven_chunks)

    def close(self) -> None:
        """Ends what still reads ahead."""
        self._chunks.close()

    def sample(self, num_rows: int = 8) -> list[Any]:
        """The first rows of the source, at most so many, as tensors in the order of the layout."""
        opened, layout = self.feed.opened, self.feed.layout
        columns = layout.decode(opened.head(num_rows, layout.columns), "the first rows")
        return as_tensors(layout, layout.assemble(layout.apply_transform(columns, (0,)), "the first rows"))

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

    def _guarded(self, chunks: Callable[[Feed], Iterator[Chunk]]) -> Generator[Chunk]:
        """Keeps what was raised, of which tf.data passes on the text only, and when chunks came."""
        asked = time.perf_counter()
        try:
            for chunk in chunks(self.feed):
                self._handed.append((chunk.first_step, asked, time.perf_counter()))
                yield chunk
                asked = time.perf_counter()
        except Exception as error:
            self.failure = error
            raise

    def _dataset(self, chunks: Callable[[], Iterator[Chunk]]) -> tf.data.Dataset:
        layout, replicas = self.feed.layout, self.feed.num_replicas
        signature = []
        for tensor in layout.tensors:
            dtype = tf.string if tensor.dtype == "string" else tf.as_dtype(tensor.dtype)
            signature.append(tf.TensorSpec((None, *tensor.shape), dtype))
            if tensor.kind == "ragged":
                signature.append(tf.TensorSpec((None,), tf.int64))
        cuts = tf.TensorSpec((None,), tf.int64)

        def elements(arrays: Any, cuts: tf.Tensor, global_rows: tf.Tensor) -> tf.data.Dataset:
            def element(i: tf.Tensor) -> Any:
                flat, component = [], iter(arrays)
                for tensor in layout.tensors:
                    value = next(component)
                    if tensor.kind == "ragged":
                        value = tf.RaggedTensor.from_row_splits(value, next(component), validate=False)
                    flat.append(value[cuts[i] : cuts[i + 1]])
                batch = layout.structure(flat)
                return batch if replicas == self.feed.num_ranks == 1 else (batch, global_rows[i // replicas])

            count = tf.size(cuts, tf.int64) - 1
            return tf.data.Dataset.range(count).map(element)

        dataset = tf.data.Dataset.from_generator(
            lambda: ((c.arrays, c.cuts, c.global_rows) for c in chunks()),
            output_signature=(tuple(signature), cuts, cuts),
        )
        options = tf.data.Options()
        options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
        options.deterministic = True
        return dataset.flat_map(elements).prefetch(PREFETCHED_BATCHES * replicas).with_options(options)


def as_tensors(layout: Layout, arrays: Sequence[Any]) -> list[Any]:
    """Arrays in the order of the layout as TensorFlow's tensors."""
    tensors = []
    for tensor, array in zip(layout.tensors, arrays, strict=True):
        values, *row_splits = (tf.constant(component) for component in _components(tensor, array))
        tensors.append(tf.RaggedTensor.from_row_splits(values, *row_splits) if row_splits else values)
    return tensors


def _components(tensor: Tensor, value: Any) -> list[np.ndarray]:
    """A tensor as NumPy arrays: two, values and row splits, for a ragged one."""
    if tensor.kind == "ragged":
        offsets = value.offsets.to_numpy() if len(value) else np.zeros(1, np.int64)
        values = value.flatten().to_numpy(zero_copy_only=False).astype(tensor.dtype)
        return [values, offsets.astype(np.int64) - offsets[0]]
    return [value.to_numpy(zero_copy_only=False).astype(object) if isinstance(value, pa.Array) else value]


def _by_index(feed: Feed) -> bool:
    return feed.opened.reader.in_memory and feed.layout.transform is None


def _indexed_chunks(feed: Feed) -> Iterator[Chunk]:
    """Chunks of a source in memory, each gathered by its rows' numbers.

    Only what is gathered is converted, so that arrays in shared memory stay the only whole copy.
    """
    opened, layout = feed.opened, feed.layout
    unit = opened.unit(0)
    columns = opened.reader.read(unit, 0, _memory_rows(opened), layout.columns)
    first_row = 0
    for index, plan, first, last in feed.passes():
        rows = plan.rank_rows(feed.rank, feed.num_ranks, first)
        first_row = plan.batch_range(first, feed.rank, feed.num_ranks)[0]
        for a, b in _chunk_steps(feed, plan, first, last):
            start, stop = _rank_range(feed, plan, a, b)
            wanted = rows[start - first_row : stop - first_row]
            yield _chunk(feed, plan, index, a, b, _gathered(layout, columns, wanted, unit.start))


def _gathered(layout: Layout, columns: Columns, rows: np.ndarray, first_row: int) -> list[Any]:
    """Rows of columns in memory, which begin with the source's `first_row`, as tensors."""

    def tensors(rows: np.ndarray, where: str) -> list[Any]:
        chosen = {name: column[rows] for name, column in columns.items()}
        return layout.assemble(layout.decode(chosen, where), where)

    try:
        return tensors(rows, "the arrays")
    except ColumnError:
        for row in rows:  # one by one, to name the row that is wrong
            tensors(np.array([row]), f"rows from {first_row + row}")
        raise


def _memory_rows(opened: OpenSource) -> int:
    """Rows from the first unit's start to the last unit's end; sliced sources begin later."""
    return int(opened.unit_start[-1] + opened.unit_rows[-1] - opened.unit_start[0])


def _woven_chunks(feed: Feed) -> Iterator[Chunk]:
    """Chunks of a source that is read in blocks."""

    def windows() -> Iterator[tuple[int, Window]]:
        for index, plan, first, last in feed.passes():
            lanes = plan.num_lanes(feed.rank, feed.num_ranks)
            end = _rank_range(feed, plan, first, last)[1]
            for window in plan.windows(feed.rank, feed.num_ranks, first):
                if window.start < plan.lane_offset(window.lane, end, lanes):
                    yield index, window

    tasks = gather_tasks(windows(), feed.opened, feed.layout.row_nbytes)
    reader = feed.opened.reader
    if feed.reading is None:
        blocks = local_blocks(reader, feed.layout, tasks)
    else:
        blocks = ray_blocks(reader, feed.layout, tasks, feed.reading)
    try:
        for index, plan, first, last in feed.passes():
            loom = _Loom(feed, plan, index, first, blocks)
            for a, b in _chunk_steps(feed, plan, first, last):
                yield _chunk(feed, plan, index, a, b, loom.weave(*_rank_range(feed, plan, a, b)))
    finally:
        blocks.close()


class _Loom:
    """Weaves the lanes of one pass into the rank's rows."""

    def __init__(self, feed: Feed, plan: PassPlan, index: int, first_step: int, blocks: Iterator[Block]) -> None:
        self._layout, self._plan, self._index, self._blocks = feed.layout, plan, index, blocks
        self._num_lanes = plan.num_lanes(feed.rank, feed.num_ranks)
        offset = plan.batch_range(first_step, feed.rank, feed.num_ranks)[0]
        self._at = [plan.lane_offset(lane, offset, self._num_lanes) for lane in range(self._num_lanes)]
        self._end = [0] * self._num_lanes
        self._held: list[deque[Block]] = [deque() for _ in range(self._num_lanes)]

    def weave(self, start: int, stop: int) -> list[Any]:
        """The rank's rows `start` to `stop`, as tensors."""
        lanes = self._num_lanes
        until = [self._plan.lane_offset(lane, stop, lanes) for lane in range(lanes)]
        while any(end < wanted for end, wanted, at in zip(self._end, until, self._at, strict=True) if wanted > at):
            block = next(self._blocks)
            self._held[block.lane].append(block)
            self._end[block.lane] = block.start + block.num_rows
        if lanes == 1:
            pieces = self._take(0, until[0])
            if len(pieces) == 1:
                return pieces[0]
        result = self._layout.empty(stop - start)
        others: list[list[Any]] = [[] for _ in result]
        order: list[np.ndarray] = []
        for lane in range(lanes):
            at = (lane - start) % lanes  # position, among the rows wanted, of the lane's first
            for tensors in self._take(lane, until[lane]):
                size = len(tensors[0])
                order.append(np.arange(at, at + size * lanes, lanes))
                for target, other, tensor in zip(result, others, tensors, strict=True):
                    if target is None:
                        other.append(tensor)
                    else:
                        target[at : at + size * lanes : lanes] = tensor
                at += size * lanes
        if any(target is None for target in result):
            back = pa.array(np.argsort(np.concatenate(order)) if order else np.zeros(0, np.int64))
            for i, target in enumerate(result):
                if target is None:
                    result[i] = pa.concat_arrays(others[i]).take(back) if others[i] else pa.array([], pa.large_binary())
        return result

    def _take(self, lane: int, until: int) -> list[list[Any]]:
        """The rows of a lane up to `until` that were not taken yet."""
        taken, held = [], self._held[lane]
        while self._at[lane] < until:
            block = held[0]
            a, b = self._at[lane] - block.start, min(until - block.start, block.num_rows)
            if b > a:
                taken.append([tensor[a:b] for tensor in block.tensors])
                self._at[lane] += b - a
            if b == block.num_rows:
                held.popleft()
        return taken


def _chunk_steps(feed: Feed, plan: PassPlan, first: int, last: int) -> Iterator[tuple[int, int]]:
    """First and past-the-last step of each chunk."""
    rank_batch_nbytes = feed.layout.row_nbytes * plan.global_batch_size // feed.num_ranks
    size = min(MAX_CHUNK_BATCHES, max(1, CHUNK_NBYTES // max(1, rank_batch_nbytes)))
    for step in range(first, last, size):
        yield step, min(step + size, last)


def _rank_range(feed: Feed, plan: PassPlan, first: int, last: int) -> tuple[int, int]:
    """The rank's rows that belong to the steps `first` to `last`."""
    return (
        plan.batch_range(first, feed.rank, feed.num_ranks)[0],
        plan.batch_range(last - 1, feed.rank, feed.num_ranks)[1],
    )


def _chunk(feed: Feed, plan: PassPlan, index: int, first: int, last: int, tensors: list[Any]) -> Chunk:
    base = _rank_range(feed, plan, first, last)[0]
    cuts = [0]
    for step in range(first, last):
        start, stop = plan.batch_range(step, feed.rank, feed.num_ranks)
        cuts += [start - base + cut for cut in replica_cuts(stop - start, feed.num_replicas)[1:]]
    arrays: list[np.ndarray] = []
    for tensor, value in zip(feed.layout.tensors, tensors, strict=True):
        arrays += _components(tensor, value)
    rows = [plan.batch_num_rows(step) for step in range(first, last)]
    return Chunk(index * plan.num_steps + first, tuple(arrays), np.array(cuts, np.int64), np.array(rows, np.int64))
