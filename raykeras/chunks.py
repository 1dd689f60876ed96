"""A rank's rows as chunks of several batches, pass after pass.

Enters: an open source with its layout, the plan of each pass, the rank. Leaves: chunks, in the order in which they are
needed, with the places at which they are cut into batches, and those into parts for the replicas of this worker.

Blocks of single lanes are woven into a chunk by one strided copy each. A source in memory needs neither Ray Data nor
blocks of rows: what is woven are the rows' numbers, and a chunk is gathered by them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from raykeras.blocks import Block, gather_tasks, local_blocks, ray_blocks
from raykeras.columns import Layout, Tensor
from raykeras.errors import ColumnError
from raykeras.plan import PassPlan, Window, replica_cuts
from raykeras.reads import Reading
from raykeras.sources import Columns, OpenSource

CHUNK_NBYTES = 1 << 20
MAX_CHUNK_BATCHES = 512


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


def chunks_of(feed: Feed) -> Iterator[Chunk]:
    """The rank's chunks, in order."""
    return (_indexed_chunks if _by_index(feed) else _woven_chunks)(feed)


def _by_index(feed: Feed) -> bool:
    return feed.opened.reader.in_memory and feed.layout.transform is None


def _indexed_chunks(feed: Feed) -> Iterator[Chunk]:
    """Chunks of a source in memory, each gathered by its rows' numbers.

    Only what is gathered is converted, so that arrays in shared memory stay the only whole copy.
    """
    opened, layout = feed.opened, feed.layout
    unit = opened.unit(0)
    columns = opened.reader.read(unit, 0, _memory_rows(opened), layout.columns)
    blocks = _row_blocks(feed)
    for index, plan, first, last in feed.passes():
        loom = _Loom(feed, plan, first, blocks, lambda num_rows: [np.empty(num_rows, np.int64)])
        for a, b in _chunk_steps(feed, plan, first, last):
            (rows,) = loom.weave(*_rank_range(feed, plan, a, b))
            yield _chunk(feed, plan, index, a, b, _gathered(layout, columns, rows, unit.start))


def _row_blocks(feed: Feed) -> Iterator[Block]:
    """The numbers of the rows of each window."""
    for index, plan, window in _windows(feed):
        yield Block(index, window.lane, window.start, window.num_rows, [plan.source_rows(window)])


def _gathered(layout: Layout, columns: Columns, rows: np.ndarray, first_row: int) -> list[Any]:
    """Rows of columns in memory, which begin with the source's `first_row`, as tensors."""

    def tensors(rows: np.ndarray, where: str) -> list[Any]:
        chosen = {name: _taken(column, rows) for name, column in columns.items()}
        return layout.assemble(layout.decode(chosen, where), where)

    try:
        return tensors(rows, "the arrays")
    except ColumnError:
        for row in rows:  # one by one, to name the row that is wrong
            tensors(np.array([row]), f"row {first_row + row}")
        raise


def _taken(column: Any, rows: np.ndarray) -> Any:
    return column[rows] if isinstance(column, np.ndarray) else column.take(pa.array(rows))


def _memory_rows(opened: OpenSource) -> int:
    """Rows from the first unit's start to the last unit's end; sliced sources begin later."""
    return int(opened.unit_start[-1] + opened.unit_rows[-1] - opened.unit_start[0])


def _woven_chunks(feed: Feed) -> Iterator[Chunk]:
    """Chunks of a source that is read in blocks."""

    windows = ((index, window) for index, _, window in _windows(feed))
    tasks = gather_tasks(windows, feed.opened, feed.layout.row_nbytes)
    reader = feed.opened.reader
    if feed.reading is None:
        blocks = local_blocks(reader, feed.layout, tasks)
    else:
        blocks = ray_blocks(reader, feed.layout, tasks, feed.reading)
    try:
        for index, plan, first, last in feed.passes():
            loom = _Loom(feed, plan, first, blocks, feed.layout.empty)
            for a, b in _chunk_steps(feed, plan, first, last):
                yield _chunk(feed, plan, index, a, b, loom.weave(*_rank_range(feed, plan, a, b)))
    finally:
        blocks.close()


def _windows(feed: Feed) -> Iterator[tuple[int, PassPlan, Window]]:
    """The windows that are needed, in order, through all passes."""
    for index, plan, first, last in feed.passes():
        lanes = plan.num_lanes(feed.rank, feed.num_ranks)
        end = _rank_range(feed, plan, first, last)[1]
        for window in plan.windows(feed.rank, feed.num_ranks, first):
            if window.start < plan.lane_offset(window.lane, end, lanes):
                yield index, plan, window


class _Loom:
    """Weaves the lanes of one pass into the rank's rows.

    Args:
        feed, plan, first_step: Whose rows, and where they begin.
        blocks: The lanes' rows.
        empty: Makes uninitialised arrays for so many rows; None for what is no NumPy array.
    """

    def __init__(
        self,
        feed: Feed,
        plan: PassPlan,
        first_step: int,
        blocks: Iterator[Block],
        empty: Callable[[int], list[np.ndarray | None]],
    ) -> None:
        self._plan, self._blocks, self._empty = plan, blocks, empty
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
        taken = [self._take(lane, wanted) for lane, wanted in enumerate(until)]
        if lanes == 1 and len(taken[0]) == 1:
            return taken[0][0]
        result: list[Any] = self._empty(stop - start)
        others: list[list[Any]] = [[] for _ in result]
        places: list[slice] = []
        for lane, pieces in enumerate(taken):
            at = (lane - start) % lanes  # position, among the rows wanted, of the lane's first
            for tensors in pieces:
                place = slice(at, at + len(tensors[0]) * lanes, lanes)
                places.append(place)
                for target, other, tensor in zip(result, others, tensors, strict=True):
                    if target is None:
                        other.append(tensor)
                    else:
                        target[place] = tensor
                at = place.stop
        if any(target is None for target in result):
            order = [np.arange(place.start, place.stop, place.step) for place in places]
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
    batches = plan.batch_cuts(first, last, feed.rank, feed.num_ranks)
    parts = np.stack(replica_cuts(np.diff(batches), feed.num_replicas)[:-1], axis=1)
    cuts = np.append(batches[:-1, None] + parts, batches[-1]) - batches[0]
    arrays: list[np.ndarray] = []
    for tensor, value in zip(feed.layout.tensors, tensors, strict=True):
        arrays += components(tensor, value)
    rows = np.diff(plan.batch_cuts(first, last, 0, 1))  # of a single rank's batches
    return Chunk(index * plan.num_steps + first, tuple(arrays), cuts, rows)


def components(tensor: Tensor, value: Any) -> list[np.ndarray]:
    """A tensor as NumPy arrays: two, values and row splits, for a ragged one."""
    if tensor.kind == "ragged":
        offsets = value.offsets.to_numpy() if len(value) else np.zeros(1, np.int64)
        values = value.flatten().to_numpy(zero_copy_only=False).astype(tensor.dtype)
        return [values, offsets.astype(np.int64) - offsets[0]]
    return [value.to_numpy(zero_copy_only=False).astype(object) if isinstance(value, pa.Array) else value]
