"""The row order: which rows form global batch k, and which of them rank r reads. Pure NumPy, less than O(rows).

A *unit* is a row group or a range of an array. A *pass* goes over all rows once. Its rows have positions 0, 1, 2, …,
and global batch k has the positions from `k * global_batch_size`. Position p is row `p // num_shards` of *canonical
shard* `p % num_shards`, and rank r of `num_ranks` owns the shards c with `c % num_ranks == r`. So the rows of batch k
do not depend on the number of ranks, and each rank reads only its own shards, its *lanes*.

    order       a shard is                                     used for
    shuffled    consecutive permuted units, shuffled           training
                within windows
    sharded     consecutive rows of the source; the last,      validation: the same rows in every
                short batch is the end of the source           pass, each read by one rank
    source      every `num_shards`-th row                      shuffle=False: exactly the source
                                                               order; every rank reads every unit

A *window* consists of whole units, so a unit is decoded once unless a shard boundary cuts it. To resume at a step,
`windows(first_step=…)` starts at the window that contains it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Order = Literal["shuffled", "sharded", "source"]


Piece = tuple[int, int, int]
"""A unit's index, and the first row and the end (exclusive) of a range of its rows."""


_UNITS, _ROWS = 0, 1  # purposes that generators are seeded with, so that their streams differ


def default_num_shards(max_ranks: int) -> int:
    """Return the smallest power of two that is at least 8 and at least `max_ranks`."""
    return max(8, 1 << (max_ranks - 1).bit_length())


def window_rows_for(row_nbytes: int, target_nbytes: int = 8 << 20) -> int:
    """Return the rows of a shuffle window of about `target_nbytes`: a power of two, at least 256."""
    return 1 << max(8, (target_nbytes // max(1, row_nbytes)).bit_length() - 1)


@dataclass(frozen=True)
class Window:
    """Consecutive rows of one of a rank's lanes, and how to read them.

    Attributes:
        lane: Index of the lane within the rank.
        start: First row within the lane.
        num_rows: Number of rows.
        pieces: The ranges of rows to read, in order.
        key: Seed of the permutation of the rows and of a random transform.
        shuffled: Whether the rows are permuted.
        select: `(phase, period, residues)`: keep row i of those read if `(phase + i) % period` is in `residues`. None
            keeps all rows.
    """

    lane: int
    start: int
    num_rows: int
    pieces: tuple[Piece, ...]
    key: tuple[int, ...]
    shuffled: bool
    select: tuple[int, int, tuple[int, ...]] | None = None

    @property
    def num_rows_read(self) -> int:
        """The number of rows read, before `select`."""
        return sum(stop - start for _, start, stop in self.pieces)

    def rows(self) -> np.ndarray | None:
        """Return the window's rows as indices into the rows read: int64 (num_rows,); None for all in order."""
        if self.shuffled:
            return _generator(_ROWS, *self.key).permutation(self.num_rows_read)
        if self.select is None:
            return None
        phase, period, residues = self.select
        is_selected = np.isin(np.arange(phase, phase + period) % period, residues)  # (period,)
        return np.flatnonzero(np.resize(is_selected, self.num_rows_read))


class PassPlan:
    """One pass over the rows of a source.

    Args:
        unit_rows: Rows of each unit, int64 (units,).
        global_batch_size: Rows of a global batch, at least 1.
        num_shards: Number of canonical shards, at least the number of ranks.
        window_rows: Approximate rows of a window, which is extended to whole units.
        order: "shuffled", "sharded" or "source"; see the module's docstring.
        seed: Seed of the run.
        epoch: Number of the pass; with "shuffled", each pass has a different order.
    """

    def __init__(
        self,
        unit_rows: np.ndarray,
        *,
        global_batch_size: int,
        num_shards: int = 8,
        window_rows: int = 1 << 14,
        order: Order = "shuffled",
        seed: int = 0,
        epoch: int = 0,
    ) -> None:
        self.global_batch_size = global_batch_size
        self.num_shards = num_shards
        self.window_rows = window_rows
        self.order = order
        self.seed = seed
        self.epoch = epoch
        unit_rows = np.asarray(unit_rows, np.int64)
        if order == "shuffled":
            self._units = _generator(_UNITS, seed, epoch).permutation(len(unit_rows))
        else:
            self._units = np.arange(len(unit_rows))
        self._rows = unit_rows[self._units]
        self._ends = np.cumsum(self._rows)
        self.num_rows = int(self._ends[-1]) if len(self._ends) else 0
        self.num_steps = -(-self.num_rows // global_batch_size)
        self._sharded_rows = self.num_rows  # rows cut into shards; the remaining ones follow in source order
        if order == "sharded":
            self._sharded_rows -= self.num_rows % global_batch_size

    def shards_of(self, rank: int, num_ranks: int) -> np.ndarray:
        """Return the canonical shards of a rank, ascending: int64 (lanes,)."""
        return np.arange(rank, self.num_shards, num_ranks)

    def rank_offset(self, position: int, rank: int, num_ranks: int) -> int:
        """Return how many of the rank's rows come before a position of the pass."""
        return int(self._rank_offsets(np.array(position), rank, num_ranks))

    def batch_range(self, step: int, rank: int, num_ranks: int) -> tuple[int, int]:
        """Return start and stop of a step's batch within the rank's rows."""
        start, stop = self.batch_cuts(step, step + 1, rank, num_ranks).tolist()
        return start, stop

    def batch_cuts(self, first: int, last: int, rank: int, num_ranks: int) -> np.ndarray:
        """Return the offsets that split the rank's rows into batches `first` to `last`: int64 (last - first + 1,)."""
        return self._rank_offsets(self.global_batch_size * np.arange(first, last + 1), rank, num_ranks)

    def batch_num_rows(self, step: int) -> int:
        """Return the rows of a global batch; only the last may have fewer than `global_batch_size`."""
        return min(self.global_batch_size, self.num_rows - step * self.global_batch_size)

    def lane_offset(self, lane: int, rank_offset: int, num_lanes: int) -> int:
        """Return how many rows of a lane come before row `rank_offset` of the rank."""
        return (rank_offset - lane + num_lanes - 1) // num_lanes

    def num_lanes(self, rank: int, num_ranks: int) -> int:
        """Return the number of lanes; taking one row from each in turn gives the rank's rows."""
        return 1 if self.order == "source" else len(range(rank, self.num_shards, num_ranks))

    def windows(self, rank: int, num_ranks: int, first_step: int = 0) -> Iterator[Window]:
        """Yield the rank's windows, from the first that contains rows of `first_step`, in the order of use."""
        offset = self.batch_range(first_step, rank, num_ranks)[0]
        if self.order == "source":
            yield from self._source_windows(rank, num_ranks, offset)
            return
        shards = self.shards_of(rank, num_ranks)
        cuts = [self._shard_windows(int(shard)) for shard in shards]  # for each lane: starts, first units
        lane = np.concatenate([np.full(len(starts) - 1, i) for i, (starts, _) in enumerate(cuts)])
        index = np.concatenate([np.arange(len(starts) - 1) for starts, _ in cuts])
        start = np.concatenate([starts[:-1] for starts, _ in cuts])
        stop = np.concatenate([starts[1:] for starts, _ in cuts])
        skipped = (offset - lane + len(shards) - 1) // len(shards)  # rows of the window's lane before the step
        remaining = np.flatnonzero(stop > skipped)
        for i in remaining[np.lexsort((lane[remaining], start[remaining]))]:
            yield self._window(int(lane[i]), int(shards[lane[i]]), int(index[i]), cuts[lane[i]])

    def rank_rows(self, rank: int, num_ranks: int, first_step: int = 0) -> np.ndarray:
        """Return the source row numbers of the rank's rows from `first_step`, in order: int64 (rows,).

        O(rows); for data in memory and for tests.
        """
        num_lanes = self.num_lanes(rank, num_ranks)
        first = self.batch_range(first_step, rank, num_ranks)[0]
        last = self.rank_offset(self.num_rows, rank, num_ranks)
        result = np.empty(last - first, np.int64)
        for window in self.windows(rank, num_ranks, first_step):
            rows = self.source_rows(window)
            index = (window.start + np.arange(len(rows))) * num_lanes + window.lane - first
            result[index[index >= 0]] = rows[index >= 0]
        return result

    def source_rows(self, window: Window) -> np.ndarray:
        """Return the source row numbers of a window's rows, in order: int64 (num_rows,)."""
        starts = self._source_starts
        rows = np.concatenate([starts[unit] + np.arange(a, b) for unit, a, b in window.pieces])
        chosen = window.rows()
        return rows if chosen is None else rows[chosen]

    def batch_rows(self, step: int) -> np.ndarray:
        """Return the source row numbers of a global batch, in order: int64 (rows,). O(rows of the source)."""
        first = step * self.global_batch_size
        return self.rank_rows(0, 1)[first : first + self.global_batch_size]

    def _rank_offsets(self, positions: np.ndarray, rank: int, num_ranks: int) -> np.ndarray:
        lanes = len(range(rank, self.num_shards, num_ranks))
        rounds, shards = np.divmod(np.minimum(positions, self.num_rows), self.num_shards)
        return rounds * lanes + np.maximum(shards - rank + num_ranks - 1, 0) // num_ranks

    @functools.cached_property
    def _source_starts(self) -> np.ndarray:
        """The first source row of each unit."""
        rows = np.empty_like(self._rows)
        rows[self._units] = self._rows
        return np.cumsum(rows) - rows

    def _shard_start(self, shard: int) -> int:
        """Return the first row of a shard, counted over the permuted units."""
        full, longer = divmod(self._sharded_rows, self.num_shards)
        return shard * full + min(shard, longer)

    def _shard_windows(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        """Return where a shard's windows start within it, and the index in `_units` at which each begins.

        Both have one entry more than there are windows. In order "sharded" the last window may contain the shard's part
        of the rows after the shards; the last index is then -1.
        """
        begin, end = self._shard_start(shard), self._shard_start(shard + 1)
        starts, first = np.zeros(0, np.int64), np.zeros(0, np.int64)
        if end > begin:
            lo = int(np.searchsorted(self._ends, begin, "right"))
            hi = int(np.searchsorted(self._ends, end - 1, "right")) + 1
            offsets = np.maximum(self._ends[lo:hi] - self._rows[lo:hi] - begin, 0)
            # A window has the units that start between the same multiples of window_rows.
            first_units = np.flatnonzero(np.diff(offsets // self.window_rows, prepend=-1) != 0)
            starts, first = offsets[first_units], lo + first_units
            first = np.append(first, hi)
        starts = np.append(starts, end - begin)
        tail = len(range(self._tail_phase(shard), self.num_rows - self._sharded_rows, self.num_shards))
        if tail:
            first = np.append(first, -1) if len(first) else np.array([-1, -1])
            starts = np.append(starts, end - begin + tail)
        return starts, first

    def _tail_phase(self, shard: int) -> int:
        """Return the shard's first row among the rows after the shards."""
        return (shard - self._sharded_rows) % self.num_shards

    def _window(self, lane: int, shard: int, index: int, cuts: tuple[np.ndarray, np.ndarray]) -> Window:
        starts, first = cuts
        key = (self.seed, self.epoch, shard, index)
        start, num_rows = int(starts[index]), int(starts[index + 1] - starts[index])
        if self.order == "sharded" and index == len(starts) - 2 and first[-1] == -1:
            pieces = self._pieces(self._sharded_rows, self.num_rows)
            select = (self._sharded_rows % self.num_shards, self.num_shards, (shard,))
            return Window(lane, start, num_rows, pieces, key, False, select)
        begin = self._shard_start(shard) + start
        pieces = self._pieces(begin, begin + num_rows)
        return Window(lane, start, num_rows, pieces, key, self.order == "shuffled")

    def _source_windows(self, rank: int, num_ranks: int, offset: int) -> Iterator[Window]:
        """Yield windows of whole units in source order, from which the rank selects the rows of its shards."""
        residues = tuple(int(c) for c in self.shards_of(rank, num_ranks))
        begins = self._ends - self._rows
        begins = begins[np.flatnonzero(np.diff(begins // self.window_rows, prepend=-1) != 0)]
        for index, begin in enumerate(begins):
            end = int(begins[index + 1]) if index + 1 < len(begins) else self.num_rows
            start, stop = (self.rank_offset(int(p), rank, num_ranks) for p in (begin, end))
            if stop <= max(start, offset):
                continue
            pieces = self._pieces(int(begin), end)
            select = None if num_ranks == 1 else (int(begin) % self.num_shards, self.num_shards, residues)
            yield Window(0, start, stop - start, pieces, (self.seed, self.epoch, 0, index), False, select)

    def _pieces(self, begin: int, end: int) -> tuple[Piece, ...]:
        """Return the ranges of units that contain rows `begin` to `end`, counted over the permuted units."""
        lo = int(np.searchsorted(self._ends, begin, "right"))
        hi = int(np.searchsorted(self._ends, end - 1, "right")) + 1
        pieces = []
        for i in range(lo, hi):
            unit_begin = int(self._ends[i] - self._rows[i])
            start, stop = max(begin - unit_begin, 0), min(end - unit_begin, int(self._rows[i]))
            if stop > start:
                pieces.append((int(self._units[i]), start, stop))
        return tuple(pieces)


def replica_cuts(num_rows: Any, local_replicas: int) -> list[Any]:
    """Return the `local_replicas + 1` offsets that split a rank's part of a batch between its replicas.

    Args:
        num_rows: Rows of the part, or an array of them for several batches; offsets have the same type.
        local_replicas: Number of replicas of the worker.
    """
    return [num_rows * i // local_replicas for i in range(local_replicas + 1)]


def _generator(purpose: int, *key: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([purpose, *key])))
