"""Specs of planned rows: of a whole source, made by the driver, and of one rank's input."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from raykeras.compat.ray_data import ReadLimits
from raykeras.data.batch_spec import BatchSpec
from raykeras.data.plan import Order, PassPlan
from raykeras.data.sources.base import OpenSource
from raykeras.data.streaming.cache import CachedRows


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
class RowsSpec:
    """A source, and the order in which its rows are used.

    Attributes:
        opened: The source.
        batch_spec: The tensors to make of its rows.
        order: See `raykeras.data.plan`.
        batch_size: Rows of a global batch.
        num_shards: See `raykeras.data.plan.PassPlan`.
        window_rows: See `raykeras.data.plan.PassPlan`.
        seed: Seed of the run.
        cache: The cached rows; None if every epoch reads the source.
        ends_epochs: Whether `fit(steps_per_epoch=…)` ends an epoch at the end of a pass, as Keras 3 does with arrays.
    """

    opened: OpenSource
    batch_spec: BatchSpec
    order: Order
    batch_size: int
    num_shards: int
    window_rows: int
    seed: int
    cache: CachedRows | None = None
    ends_epochs: bool = False

    def with_spec(self, batch_spec: BatchSpec) -> RowsSpec:
        """Return the same rows with another batch spec."""
        return dataclasses.replace(self, batch_spec=batch_spec)

    @property
    def in_memory(self) -> bool:
        """Whether all epochs are read from memory."""
        return self.cache is not None or self.opened.reader.in_memory

    @property
    def num_steps(self) -> int:
        """The number of batches in a pass."""
        return -(-self.opened.num_rows // self.batch_size)

    @property
    def params(self) -> dict[str, Any]:
        """The parameters that `RunStarted` reports."""
        return {"batch_size": self.batch_size, "num_rows": self.opened.num_rows}

    @property
    def position(self) -> dict[str, Any]:
        """The properties of the data that must equal those in a checkpoint to resume from it."""
        return {
            "fingerprint": self.opened.fingerprint,
            "fingerprint_parts": self.opened.fingerprint_parts,
            "num_rows": self.opened.num_rows,
            "batch_size": self.batch_size,
            "order": self.order,
            "num_shards": self.num_shards,
            "window_rows": self.window_rows,
        }

    def with_shards(self, position: Mapping[str, Any]) -> RowsSpec:
        """Return the same rows with the shards and windows of a checkpoint's `position`."""
        num_shards, window_rows = position.get("num_shards"), position.get("window_rows")
        if num_shards is None or window_rows is None:
            return self
        return dataclasses.replace(self, num_shards=num_shards, window_rows=window_rows)

    def plan(self, pass_index: int) -> PassPlan:
        """Return the plan of a pass."""
        return PassPlan(
            self.opened.unit_rows,
            global_batch_size=self.batch_size,
            num_shards=self.num_shards,
            window_rows=self.window_rows,
            order=self.order,
            seed=self.seed,
            epoch=pass_index if self.order == "shuffled" else 0,
        )
