"""The specification of the user's batches, and of how they are used."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from raykeras.core.config import Scale
from raykeras.data.adapters.adapter import Batches
from raykeras.data.adapters.epochs import Epochs
from raykeras.data.adapters.transport import BatchFeeder, has_epoch_hooks
from raykeras.data.batch_spec import BatchSpec
from raykeras.data.streaming.resources import CpuBudget

if TYPE_CHECKING:
    from raykeras.data.adapters.dataset import BatchStream


@dataclass(frozen=True)
class BatchesSpec:
    """The user's batches, and how they are used; a `raykeras.data.train_input.DataSpec`.

    Attributes:
        batches: The batches; without the user's object in a process that receives them through a channel.
        batch_spec: Spec of a batch as the model takes it; it may have sample weights that the batches do not.
        num_steps: Batches in a pass; None if unknown.
        shuffle: See `Epochs`.
        seed: See `Epochs`.
        steps: See `Epochs`.
        restart: See `Epochs`.
        channels: For each rank the channel from which it receives its part of the batches; empty if the process that
            uses them also makes them.
        skip: See `Epochs`.
    """

    batches: Batches
    batch_spec: BatchSpec
    num_steps: int | None
    shuffle: bool
    seed: int
    steps: int | None
    restart: bool = False
    channels: tuple[Any, ...] = ()
    skip: tuple[int, int] = (0, 0)

    @property
    def ends_epochs(self) -> bool:
        batches = self.batches
        return batches.kind == "dataset" and batches.num_batches is None and not batches.is_infinite

    @property
    def may_run_out(self) -> bool:
        return self.batches.kind == "generator"

    @property
    def can_restart(self) -> bool:
        batches = self.batches
        return batches.kind != "generator" and not (batches.kind == "sequence" and has_epoch_hooks(batches.data))

    @property
    def uses_ray_data(self) -> bool:
        return False

    @property
    def params(self) -> Mapping[str, Any]:
        return {}

    @property
    def position(self) -> Mapping[str, Any]:
        return {"batches": self.batches.kind, "num_batches": self.num_steps, "shuffle": self.shuffle}

    def with_spec(self, batch_spec: BatchSpec) -> BatchesSpec:
        return dataclasses.replace(self, batch_spec=batch_spec)

    def with_shards(self, position: Mapping[str, Any]) -> BatchesSpec:
        return self

    def skip_to(self, epoch: int, step: int) -> BatchesSpec:
        is_epoch_end = step == (self.steps or self.num_steps)
        return dataclasses.replace(self, skip=(epoch + 1, 0) if is_epoch_end else (epoch, step))

    def what_changed(self, position: Mapping[str, Any]) -> str | None:
        return None

    def batch_num_rows(self, step: int) -> int:
        return 0

    def read_ahead(self) -> None:
        pass

    @contextlib.contextmanager
    def for_workers(self, num_workers: int, cpus_per_task: float) -> Iterator[BatchesSpec]:
        """Send the batches to the workers from threads of this process."""
        feeder = BatchFeeder(self.epochs(), num_workers, cpus_per_task)
        try:
            yield dataclasses.replace(self, batches=self.batches.without_data(), channels=feeder.channels)
        finally:
            feeder.close()

    def open(
        self,
        rank: int,
        scale: Scale,
        budget: CpuBudget,
        *,
        num_steps: int | None,
        first_step: int = 0,
        num_inputs: int = 1,
    ) -> BatchStream:
        from raykeras.data.adapters.dataset import BatchStream  # imports TensorFlow

        steps = self.steps or self.num_steps
        num_epochs = None
        if num_steps is not None and steps is not None:
            num_epochs = -(-(num_steps - first_step) // steps)
        return BatchStream(
            self.epochs(),
            self.batch_spec,
            num_ranks=scale.workers,
            local_replicas=scale.local_replicas,
            channel=self.channels[rank] if self.channels else None,
            num_epochs=num_epochs,
        )

    def epochs(self) -> Epochs:
        """Return the epochs from where training starts or resumes."""
        return Epochs(
            self.batches,
            shuffle=self.shuffle,
            seed=self.seed,
            steps=self.steps,
            restart=self.restart,
            skip=self.skip,
        )
