"""A rank's rows as chunks of several batches, pass after pass.

The rows of a rank are those of its lanes in turn. Each block, which holds rows of a single lane, is copied into its
chunk by one strided assignment. For a source in memory row indices are interleaved instead of rows, and each chunk is
taken from the arrays by its indices, without Ray Data.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from raykeras.compat.ray_data import ReadLimits
from raykeras.core.errors import ColumnError
from raykeras.data.batch_spec import BatchSpec, ElementSpec
from raykeras.data.plan import PassPlan, Window, replica_cuts
from raykeras.data.sources.base import Columns, OpenSource
from raykeras.data.streaming.reader import Block, gather_tasks, local_blocks, ray_blocks

CHUNK_NBYTES = 1 << 20
MAX_CHUNK_BATCHES = 512


@dataclass(frozen=True)
class RankInput:
    """The rows of one rank, pass after pass.

    Attributes:
        opened: The source.
        batch_spec: The tensors to make of its rows.
        plan: Returns the plan of a pass, given its index. All plans have the same number of steps.
        rank: Rank of the worker, from 0.
        num_ranks: Number of workers.
        local_replicas: Replicas of this worker, which share its part of each batch.
        num_steps: Steps after which the input ends, counted through all passes; None for an endless input.
        first_step: Step at which the input begins, counted through all passes.
        reading: Limits for Ray Data; None to read in this process.
    """

    opened: OpenSource
    batch_spec: BatchSpec
    plan: Callable[[int], PassPlan]
    rank: int
    num_ranks: int
    local_replicas: int
    num_steps: int | None = None
    first_step: int = 0
    reading: ReadLimits | None = None

    def passes(self) -> Iterator[tuple[int, PassPlan, int, int]]:
        """Yield the index, the plan, and the first and past-the-last step of each pass."""
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
class RowChunk:
    """Consecutive batches of a rank.

    Attributes:
        first_step: Step of the first batch, counted through all passes.
        arrays: One array for each tensor; two, values and row splits, for a ragged one.
        cuts: Where the slices of the replicas begin and end: int64 (batches * replicas + 1,).
        global_rows: Rows of the global batches: int64 (batches,).
    """

    first_step: int
    arrays: tuple[np.ndarray, ...]
    cuts: np.ndarray
    global_rows: np.ndarray


def chunks_of(rank_input: RankInput) -> Iterator[RowChunk]:
    """Return the rank's chunks, in order."""
    return (_indexed_chunks if _by_index(rank_input) else _block_chunks)(rank_input)


def _by_index(rank_input: RankInput) -> bool:
    return rank_input.opened.reader.in_memory and rank_input.batch_spec.transform is None


def _indexed_chunks(rank_input: RankInput) -> Iterator[RowChunk]:
    """Yield the chunks of a source in memory, each taken by the indices of its rows.

    Only the rows of a chunk are converted, so that arrays in shared memory are never copied as a whole.
    """
    opened, batch_spec = rank_input.opened, rank_input.batch_spec
    unit = opened.unit(0)
    columns = opened.reader.read(unit, 0, _memory_rows(opened), batch_spec.columns)
    blocks = _index_blocks(rank_input)
    for index, plan, first, last in rank_input.passes():
        interleaver = LaneInterleaver(rank_input, plan, first, blocks, lambda num_rows: [np.empty(num_rows, np.int64)])
        for a, b in _chunk_steps(rank_input, plan, first, last):
            (rows,) = interleaver.interleave(*_rank_range(rank_input, plan, a, b))
            yield _chunk(rank_input, plan, index, a, b, _take_rows(batch_spec, columns, rows, unit.start))


def _index_blocks(rank_input: RankInput) -> Iterator[Block]:
    """Yield the row indices of each window as a block."""
    for index, plan, window in _windows(rank_input):
        yield Block(index, window.lane, window.start, window.num_rows, [plan.source_rows(window)])


def _take_rows(batch_spec: BatchSpec, columns: Columns, rows: np.ndarray, first_row: int) -> list[Any]:
    """Return rows of columns in memory as tensors.

    Args:
        batch_spec: The tensors to make.
        columns: The columns.
        rows: Indices into the columns: int64 (rows,).
        first_row: Row of the unsliced source at which the columns begin, for errors.
    """

    def tensors(rows: np.ndarray, where: str) -> list[Any]:
        chosen = {name: _take(column, rows) for name, column in columns.items()}
        return batch_spec.assemble(batch_spec.decode(chosen, where), where)

    try:
        return tensors(rows, "the arrays")
    except ColumnError:
        for row in rows:  # one at a time, so that the error names the invalid row
            tensors(np.array([row]), f"row {first_row + row}")
        raise


def _take(column: Any, rows: np.ndarray) -> Any:
    return column[rows] if isinstance(column, np.ndarray) else column.take(pa.array(rows))


def _memory_rows(opened: OpenSource) -> int:
    """Return the rows from the start of the first unit, which is not 0 in a slice, to the end of the last."""
    return int(opened.unit_start[-1] + opened.unit_rows[-1] - opened.unit_start[0])


def _block_chunks(rank_input: RankInput) -> Iterator[RowChunk]:
    """Yield the chunks of a source that is read in blocks."""
    windows = ((index, window) for index, _, window in _windows(rank_input))
    tasks = gather_tasks(windows, rank_input.opened, rank_input.batch_spec.row_nbytes)
    reader = rank_input.opened.reader
    if rank_input.reading is None:
        blocks = local_blocks(reader, rank_input.batch_spec, tasks)
    else:
        blocks = ray_blocks(reader, rank_input.batch_spec, tasks, rank_input.reading)
    try:
        for index, plan, first, last in rank_input.passes():
            interleaver = LaneInterleaver(rank_input, plan, first, blocks, rank_input.batch_spec.empty)
            for a, b in _chunk_steps(rank_input, plan, first, last):
                yield _chunk(
                    rank_input, plan, index, a, b, interleaver.interleave(*_rank_range(rank_input, plan, a, b))
                )
    finally:
        blocks.close()


def _windows(rank_input: RankInput) -> Iterator[tuple[int, PassPlan, Window]]:
    """Yield the pass, its plan and each window that the rank needs, in order."""
    for index, plan, first, last in rank_input.passes():
        lanes = plan.num_lanes(rank_input.rank, rank_input.num_ranks)
        end = _rank_range(rank_input, plan, first, last)[1]
        for window in plan.windows(rank_input.rank, rank_input.num_ranks, first):
            if window.start < plan.lane_offset(window.lane, end, lanes):
                yield index, plan, window


class LaneInterleaver:
    """Interleave the lanes of one pass into the rows of a rank.

    Args:
        rank_input: The rank.
        plan: Plan of the pass.
        first_step: Step of the pass at which to begin.
        blocks: Rows of the lanes; those of each lane in order.
        empty: Returns uninitialized arrays for a number of rows, with None for tensors that are Arrow arrays.
    """

    def __init__(
        self,
        rank_input: RankInput,
        plan: PassPlan,
        first_step: int,
        blocks: Iterator[Block],
        empty: Callable[[int], list[np.ndarray | None]],
    ) -> None:
        self._plan, self._blocks, self._empty = plan, blocks, empty
        self._num_lanes = plan.num_lanes(rank_input.rank, rank_input.num_ranks)
        offset = plan.batch_range(first_step, rank_input.rank, rank_input.num_ranks)[0]
        self._at = [plan.lane_offset(lane, offset, self._num_lanes) for lane in range(self._num_lanes)]
        self._end = [0] * self._num_lanes
        self._buffered: list[deque[Block]] = [deque() for _ in range(self._num_lanes)]

    def interleave(self, start: int, stop: int) -> list[Any]:
        """Return the rank's rows `start` to `stop` as tensors."""
        lanes = self._num_lanes
        until = [self._plan.lane_offset(lane, stop, lanes) for lane in range(lanes)]
        while any(end < wanted for end, wanted, at in zip(self._end, until, self._at, strict=True) if wanted > at):
            block = next(self._blocks)
            self._buffered[block.lane].append(block)
            self._end[block.lane] = block.start + block.num_rows
        taken = [self._take(lane, wanted) for lane, wanted in enumerate(until)]
        if lanes == 1 and len(taken[0]) == 1:
            return taken[0][0]
        result: list[Any] = self._empty(stop - start)
        arrow: list[list[Any]] = [[] for _ in result]  # for each tensor that is not a NumPy array
        places: list[slice] = []
        for lane, pieces in enumerate(taken):
            at = (lane - start) % lanes  # where the lane's first row goes
            for tensors in pieces:
                place = slice(at, at + len(tensors[0]) * lanes, lanes)
                places.append(place)
                for target, arrays, tensor in zip(result, arrow, tensors, strict=True):
                    if target is None:
                        arrays.append(tensor)
                    else:
                        target[place] = tensor
                at = place.stop
        if any(target is None for target in result):
            order = [np.arange(place.start, place.stop, place.step) for place in places]
            inverse = pa.array(np.argsort(np.concatenate(order)) if order else np.zeros(0, np.int64))
            for i, target in enumerate(result):
                if target is None:
                    result[i] = (
                        pa.concat_arrays(arrow[i]).take(inverse) if arrow[i] else pa.array([], pa.large_binary())
                    )
        return result

    def _take(self, lane: int, until: int) -> list[list[Any]]:
        """Return the tensors of a lane's next rows, up to row `until`, block by block."""
        taken, buffered = [], self._buffered[lane]
        while self._at[lane] < until:
            block = buffered[0]
            a, b = self._at[lane] - block.start, min(until - block.start, block.num_rows)
            if b > a:
                taken.append([tensor[a:b] for tensor in block.tensors])
                self._at[lane] += b - a
            if b == block.num_rows:
                buffered.popleft()
        return taken


def _chunk_steps(rank_input: RankInput, plan: PassPlan, first: int, last: int) -> Iterator[tuple[int, int]]:
    """Yield the first and past-the-last step of each chunk."""
    rank_batch_nbytes = rank_input.batch_spec.row_nbytes * plan.global_batch_size // rank_input.num_ranks
    size = min(MAX_CHUNK_BATCHES, max(1, CHUNK_NBYTES // max(1, rank_batch_nbytes)))
    for step in range(first, last, size):
        yield step, min(step + size, last)


def _rank_range(rank_input: RankInput, plan: PassPlan, first: int, last: int) -> tuple[int, int]:
    """Return the first and past-the-last of the rank's rows in the steps from `first` to before `last`."""
    return (
        plan.batch_range(first, rank_input.rank, rank_input.num_ranks)[0],
        plan.batch_range(last - 1, rank_input.rank, rank_input.num_ranks)[1],
    )


def _chunk(rank_input: RankInput, plan: PassPlan, index: int, first: int, last: int, tensors: list[Any]) -> RowChunk:
    batches = plan.batch_cuts(first, last, rank_input.rank, rank_input.num_ranks)
    # (batches, replicas): where each replica's slice begins within its batch
    offsets = np.stack(replica_cuts(np.diff(batches), rank_input.local_replicas)[:-1], axis=1)
    cuts = np.append(batches[:-1, None] + offsets, batches[-1]) - batches[0]
    arrays: list[np.ndarray] = []
    for tensor, value in zip(rank_input.batch_spec.tensors, tensors, strict=True):
        arrays += components(tensor, value)
    rows = np.diff(plan.batch_cuts(first, last, 0, 1))  # a single rank's batches are the global ones
    return RowChunk(index * plan.num_steps + first, tuple(arrays), cuts, rows)


def components(tensor: ElementSpec, value: Any) -> list[np.ndarray]:
    """Return a tensor as NumPy arrays: two, values and row splits, for a ragged one."""
    if tensor.kind == "ragged":
        offsets = value.offsets.to_numpy() if len(value) else np.zeros(1, np.int64)
        values = value.flatten().to_numpy(zero_copy_only=False).astype(tensor.dtype)
        return [values, offsets.astype(np.int64) - offsets[0]]
    return [value.to_numpy(zero_copy_only=False).astype(object) if isinstance(value, pa.Array) else value]
