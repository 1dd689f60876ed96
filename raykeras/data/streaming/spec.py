"""The specification of planned rows: a source, and the order in which its rows are used."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from raykeras.core.config import Scale
from raykeras.data.batch_spec import BatchSpec
from raykeras.data.plan import Order, PassPlan
from raykeras.data.sources.arrays import ArrayReader
from raykeras.data.sources.base import OpenSource, what_changed
from raykeras.data.streaming.cache import CachedRows
from raykeras.data.streaming.interleave import RankInput
from raykeras.data.streaming.resources import CpuBudget, reading

if TYPE_CHECKING:
    from raykeras.data.streaming.dataset import Stream


@dataclass(frozen=True)
class RowsSpec:
    """A source, and the order in which its rows are used; a `raykeras.data.train_input.DataSpec`.

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

    @property
    def uses_ray_data(self) -> bool:
        """Whether tasks of Ray Data read the rows; False if all epochs are read from memory."""
        return self.cache is None and not self.opened.reader.in_memory

    @property
    def may_run_out(self) -> bool:
        return False

    @property
    def can_restart(self) -> bool:
        return True

    @property
    def num_steps(self) -> int:
        return -(-self.opened.num_rows // self.batch_size)

    @property
    def params(self) -> dict[str, Any]:
        return {"batch_size": self.batch_size, "num_rows": self.opened.num_rows}

    @property
    def position(self) -> dict[str, Any]:
        return {
            "fingerprint": self.opened.fingerprint,
            "fingerprint_parts": self.opened.fingerprint_parts,
            "num_rows": self.opened.num_rows,
            "batch_size": self.batch_size,
            "order": self.order,
            "num_shards": self.num_shards,
            "window_rows": self.window_rows,
        }

    def with_spec(self, batch_spec: BatchSpec) -> RowsSpec:
        return dataclasses.replace(self, batch_spec=batch_spec)

    def with_shards(self, position: Mapping[str, Any]) -> RowsSpec:
        num_shards, window_rows = position.get("num_shards"), position.get("window_rows")
        if num_shards is None or window_rows is None:
            return self
        return dataclasses.replace(self, num_shards=num_shards, window_rows=window_rows)

    def skip_to(self, epoch: int, step: int) -> RowsSpec:
        return self  # `open` takes the first step

    def what_changed(self, position: Mapping[str, Any]) -> str | None:
        parts = position.get("fingerprint_parts")
        return None if parts is None else what_changed(parts, self.opened)

    def batch_num_rows(self, step: int) -> int:
        first_row = step % self.num_steps * self.batch_size
        return min(self.batch_size, self.opened.num_rows - first_row)

    def read_ahead(self) -> None:
        if self.cache is not None:
            self.cache.start()

    @contextlib.contextmanager
    def for_workers(self, num_workers: int, cpus_per_task: float) -> Iterator[RowsSpec]:
        """Put arrays into Ray's object store."""
        reader = self.cache.reader if self.cache is not None else self.opened.reader
        if isinstance(reader, ArrayReader):
            reader.share()
        yield self

    def open(
        self,
        rank: int,
        scale: Scale,
        budget: CpuBudget,
        *,
        num_steps: int | None,
        first_step: int = 0,
        num_inputs: int = 1,
    ) -> Stream:
        from raykeras.data.streaming.dataset import Stream  # imports TensorFlow

        cached = None if self.cache is None else self.cache.source(self.batch_spec)
        opened, batch_spec = cached or (self.opened, self.batch_spec)
        rank_input = RankInput(
            opened=opened,
            batch_spec=batch_spec,
            plan=self.plan,
            rank=rank,
            num_ranks=scale.workers,
            local_replicas=scale.local_replicas,
            num_steps=num_steps,
            first_step=first_step,
            reading=reading(budget, scale.workers, num_inputs) if self.uses_ray_data else None,
        )
        return Stream(rank_input)

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
