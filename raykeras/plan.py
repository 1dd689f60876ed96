"""Which rows make global batch k, and which of them are rank r's. Pure NumPy, nothing of O(rows).

Enters: the number of rows in each row unit (a row group, or a range of an array), the global batch
size, the seed, the pass. Leaves: for a rank, the *windows* to read, in the order they are needed,
and for each step the slice of the rank's rows that belongs to it.

A *pass* is one walk over all rows. Its rows get positions 0, 1, 2 …, and global batch k is the
positions from `k * global_batch_size` on. Position p is row `p // num_shards` of *canonical shard*
`p % num_shards`, and rank r of `num_ranks` owns the shards c with `c % num_ranks == r`. So which
rows make batch k never depends on the number of ranks, and yet a rank reads its own shards only.

    order       a shard is                                     used for
    shuffled    a run of the permuted units, each window       training
                of it permuted row by row
    sharded     a run of the source; the rows of the last,     validation: the same rows every
                short batch are those that end the source      pass, read once over all ranks
    source      every `num_shards`-th row                      shuffle=False: exactly the source's
                                                               order; every rank reads every unit

A window is whole units, so that a unit is decoded once but for those that a shard's border cuts.
Resuming at a step is arithmetic: `windows(first_step=…)` starts at the window that holds it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Order = Literal["shuffled", "sharded", "source"]
Piece = tuple[int, int, int]
"""A unit's index and the first and past-the-last row of it."""

_UNITS, _ROWS = 0, 1  # what a generator is seeded for, so that no two streams are alike


def default_num_shards(max_ranks: int) -> int:
    """The smallest power of two that is at least 8 and at least `max_ranks`."""
    return max(8, 1 << (max_ranks - 1).bit_length())


def window_rows_for(row_nbytes: int, target_nbytes: int = 8 << 20) -> int:
    """Rows in a shuffle window of about `target_nbytes`, rounded down to a power of two."""
    return 1 << max(8, (target_nbytes // max(1, row_nbytes)).bit_length() - 1)


@dataclass(frozen=True)
class Window:
    """Consecutive rows of one of a rank's lanes, and how to make them.

    Attributes:
        lane: Index of the lane among the rank's.
        start: First row in the lane.
        num_rows: Rows that it gives.
        pieces: What to read, in order.
        key: Seeds the permutation of the rows read and a random transform; see `rows`.
        shuffled: Whether the rows are permuted.
        select: `(phase, period, residues)`: of the rows read, keep i where
            `(phase + i) % period` is in `residues`. None keeps all.
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
        return sum(stop - start for _, start, stop in self.pieces)

    def rows(self) -> np.ndarray | None:
        """Which of the rows read, and in which order: int64 (num_rows,), or None for all as they are."""
        if self.shuffled:
            return _generator(_ROWS, *self.key).permutation(self.num_rows_read)
        if self.select is None:
            return None
        phase, period, residues = self.select
        kept = np.isin(np.arange(phase, phase + period) % period, residues)
        return np.flatnonzero(np.resize(kept, self.num_rows_read))


class PassPlan:
    """One pass over the rows of a source.

    Args:
        unit_rows: Rows of each unit, int64 (units,).
        global_batch_size: Rows of a global batch.
        num_shards: Canonical shards, at least the most ranks there will ever be.
        window_rows: A window ends with the first unit that reaches this many rows.
        order: See the module's docstring.
        seed: Seed of the run.
        epoch: Number of the pass; with `order="shuffled"`, each has another order.
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
        self._sharded_rows = self.num_rows  # rows cut into shards; the others follow in source order
        if order == "sharded":
            self._sharded_rows -= self.num_rows % global_batch_size

    def shards_of(self, rank: int, num_ranks: int) -> np.ndarray:
        """The canonical shards of a rank, ascending: int64 (lanes,)."""
        return np.arange(rank, self.num_shards, num_ranks)

    def rank_offset(self, position: int, rank: int, num_ranks: int) -> int:
        """How many of the rank's rows lie before a position of the pass."""
        return int(self._rank_offsets(np.array(position), rank, num_ranks))

    def batch_range(self, step: int, rank: int, num_ranks: int) -> tuple[int, int]:
        """First and past-the-last of the rank's rows that belong to a step's batch."""
        start, stop = self.batch_cuts(step, step + 1, rank, num_ranks).tolist()
        return start, stop

    def batch_cuts(self, first: int, last: int, rank: int, num_ranks: int) -> np.ndarray:
        """Where the rank's rows are cut into its parts of the batches `first` to `last`: int64 (last - first + 1,)."""
        return self._rank_offsets(self.global_batch_size * np.arange(first, last + 1), rank, num_ranks)

    def batch_num_rows(self, step: int) -> int:
        """Rows of a global batch; fewer than `global_batch_size` in the last only."""
        return min(self.global_batch_size, self.num_rows - step * self.global_batch_size)

    def lane_offset(self, lane: int, rank_offset: int, num_lanes: int) -> int:
        """How many rows of a lane lie before one of the rank's rows."""
        return (rank_offset - lane + num_lanes - 1) // num_lanes

    def num_lanes(self, rank: int, num_ranks: int) -> int:
        """Lanes whose rows, taken in turn, are the rank's rows."""
        return 1 if self.order == "source" else len(range(rank, self.num_shards, num_ranks))

    def windows(self, rank: int, num_ranks: int, first_step: int = 0) -> Iterator[Window]:
        """The rank's windows from the one that holds `first_step` on, in the order they are needed."""
        offset = self.batch_range(first_step, rank, num_ranks)[0]
        if self.order == "source":
            yield from self._source_windows(rank, num_ranks, offset)
            return
        shards = self.shards_of(rank, num_ranks)
        cuts = [self._shard_windows(int(shard)) for shard in shards]  # a lane: starts, first units
        lane = np.concatenate([np.full(len(starts) - 1, i) for i, (starts, _) in enumerate(cuts)])
        index = np.concatenate([np.arange(len(starts) - 1) for starts, _ in cuts])
        start = np.concatenate([starts[:-1] for starts, _ in cuts])
        stop = np.concatenate([starts[1:] for starts, _ in cuts])
        skipped = (offset - lane + len(shards) - 1) // len(shards)  # rows of the lane before the step
        wanted = np.flatnonzero(stop > skipped)
        for i in wanted[np.lexsort((lane[wanted], start[wanted]))]:
            yield self._window(int(lane[i]), int(shards[lane[i]]), int(index[i]), cuts[lane[i]])

    def rank_rows(self, rank: int, num_ranks: int, first_step: int = 0) -> np.ndarray:
        """Row numbers in the source of the rank's rows from `first_step` on, in order: int64 (rows,).

        O(rows): for data in memory, for tests and for audits.
        """
        num_lanes = self.num_lanes(rank, num_ranks)
        first = self.batch_range(first_step, rank, num_ranks)[0]
        last = self.rank_offset(self.num_rows, rank, num_ranks)
        result = np.empty(last - first, np.int64)
        for window in self.windows(rank, num_ranks, first_step):
            rows = self.source_rows(window)
            at = (window.start + np.arange(len(rows))) * num_lanes + window.lane - first
            result[at[at >= 0]] = rows[at >= 0]
        return result

    def source_rows(self, window: Window) -> np.ndarray:
        """Row numbers in the source of a window's rows, in order: int64 (num_rows,)."""
        starts = self._source_starts
        rows = np.concatenate([starts[unit] + np.arange(a, b) for unit, a, b in window.pieces])
        chosen = window.rows()
        return rows if chosen is None else rows[chosen]

    def batch_rows(self, step: int) -> np.ndarray:
        """Row numbers in the source of global batch `step`, in order: int64 (rows,). O(rows)."""
        first = step * self.global_batch_size
        return self.rank_rows(0, 1)[first : first + self.global_batch_size]

    def _rank_offsets(self, positions: np.ndarray, rank: int, num_ranks: int) -> np.ndarray:
        lanes = len(range(rank, self.num_shards, num_ranks))
        rounds, shards = np.divmod(np.minimum(positions, self.num_rows), self.num_shards)
        return rounds * lanes + np.maximum(shards - rank + num_ranks - 1, 0) // num_ranks

    @functools.cached_property
    def _source_starts(self) -> np.ndarray:
        """First row in the source of each unit."""
        rows = np.empty_like(self._rows)
        rows[self._units] = self._rows
        return np.cumsum(rows) - rows

    def _shard_start(self, shard: int) -> int:
        """First row, among the permuted units' rows, of a shard."""
        full, longer = divmod(self._sharded_rows, self.num_shards)
        return shard * full + min(shard, longer)

    def _shard_windows(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        """Starts of a shard's windows in it, and the index in `_units` at which each begins.

        Both have one entry more than there are windows. In order "sharded" the last window holds
        the shard's part of the rows that follow the shards; its index is past all units.
        """
        begin, end = self._shard_start(shard), self._shard_start(shard + 1)
        starts, first = np.zeros(0, np.int64), np.zeros(0, np.int64)
        if end > begin:
            lo = int(np.searchsorted(self._ends, begin, "right"))
            hi = int(np.searchsorted(self._ends, end - 1, "right")) + 1
            offsets = np.maximum(self._ends[lo:hi] - self._rows[lo:hi] - begin, 0)
            # a window is the units that start in the same multiple of window_rows
            new = np.flatnonzero(np.diff(offsets // self.window_rows, prepend=-1) != 0)
            starts, first = offsets[new], lo + new
            first = np.append(first, hi)
        starts = np.append(starts, end - begin)
        tail = len(range(self._tail_phase(shard), self.num_rows - self._sharded_rows, self.num_shards))
        if tail:
            first = np.append(first, -1) if len(first) else np.array([-1, -1])
            starts = np.append(starts, end - begin + tail)
        return starts, first

    def _tail_phase(self, shard: int) -> int:
        """First row, among those that follow the shards, that is the shard's."""
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
        """Windows of whole units in source order, of which the rank keeps its shards' rows."""
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
        """What holds the rows `begin` to `end` of the permuted units."""
        lo = int(np.searchsorted(self._ends, begin, "right"))
        hi = int(np.searchsorted(self._ends, end - 1, "right")) + 1
        pieces = []
        for i in range(lo, hi):
            unit_begin = int(self._ends[i] - self._rows[i])
            a, b = max(begin - unit_begin, 0), min(end - unit_begin, int(self._rows[i]))
            if b > a:
                pieces.append((int(self._units[i]), a, b))
        return tuple(pieces)


def replica_cuts(num_rows: Any, num_replicas: int) -> list[Any]:
    """Where a rank's slice of a batch is cut for its replicas: `num_replicas + 1` offsets.

    Args:
        num_rows: Rows of the slice, or an array of them; the offsets are of the same kind.
        num_replicas: Of the worker.
    """
    return [num_rows * i // num_replicas for i in range(num_replicas + 1)]


def _generator(purpose: int, *key: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([purpose, *key])))
