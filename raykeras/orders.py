"""What a worker is told: plain, picklable, made by the driver, without TensorFlow."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from raykeras.batches import Batches
from raykeras.checkpoint import RunFolder
from raykeras.columns import Layout
from raykeras.options import Run, Scale
from raykeras.plan import Order, PassPlan
from raykeras.sources import OpenSource


@dataclass(frozen=True)
class DataOrders:
    """A source, and the order in which its rows are used.

    Attributes:
        opened, layout: The source and its tensors.
        order: See `raykeras.plan`.
        batch_size: Rows of a global batch.
        num_shards, window_rows, seed: See `raykeras.plan.PassPlan`.
    """

    opened: OpenSource
    layout: Layout
    order: Order
    batch_size: int
    num_shards: int
    window_rows: int
    seed: int

    def laid_out(self, layout: Layout) -> DataOrders:
        """The same rows as other tensors."""
        return dataclasses.replace(self, layout=layout)

    @property
    def num_steps(self) -> int:
        """Batches in a pass."""
        return -(-self.opened.num_rows // self.batch_size)

    @property
    def params(self) -> dict[str, Any]:
        """What the run tells of itself."""
        return {"batch_size": self.batch_size, "num_rows": self.opened.num_rows}

    @property
    def position(self) -> dict[str, Any]:
        """What a checkpoint must agree with to go on in this data."""
        return {"num_shards": self.num_shards, "fingerprint": self.opened.fingerprint}

    def plan(self, pass_index: int) -> PassPlan:
        return PassPlan(
            self.opened.unit_rows,
            global_batch_size=self.batch_size,
            num_shards=self.num_shards,
            window_rows=self.window_rows,
            order=self.order,
            seed=self.seed,
            epoch=pass_index if self.order == "shuffled" else 0,
        )


@dataclass(frozen=True)
class BatchOrders:
    """Batches that the user makes.

    Attributes:
        batches: What is known of them, and where this process makes them, what makes them.
        layout: Of a batch as the model takes it; it may hold weights that the batches do not.
        num_steps: Batches in a pass; None where it is not known.
        shuffle, seed, steps, restart: As `raykeras.epochs.Epochs` takes them.
        pipes: For each rank the way by which its parts come, where the driver makes them.
    """

    batches: Batches
    layout: Layout
    num_steps: int | None
    shuffle: bool
    seed: int
    steps: int | None
    restart: bool = False
    pipes: tuple[Any, ...] = ()
    params: Mapping[str, Any] = field(default_factory=dict)
    position: Mapping[str, Any] = field(default_factory=dict)

    def laid_out(self, layout: Layout) -> BatchOrders:
        """The same batches as other tensors."""
        return dataclasses.replace(self, layout=layout)


@dataclass(frozen=True)
class Orders:
    """One worker's part of a run; the same for all ranks.

    Attributes:
        train, validation: What is trained on and validated with.
        epochs, initial_epoch, steps_per_epoch, validation_freq: As `Model.fit` takes them.
        scale, run: As the user gave them.
        folder: The run's folder.
        cpus_per_worker: Logical CPUs that each worker takes.
    """

    train: DataOrders | BatchOrders
    validation: DataOrders | BatchOrders | None
    epochs: int
    initial_epoch: int
    steps_per_epoch: int | None
    validation_freq: Any
    scale: Scale
    run: Run
    folder: RunFolder
    cpus_per_worker: float

    @property
    def num_steps(self) -> int | None:
        """Steps of an epoch; None where it is not known before one was made."""
        return self.steps_per_epoch or self.train.num_steps


@dataclass(frozen=True)
class EvaluationOrders:
    """One worker's part of an evaluation; the same for all ranks.

    Attributes:
        data: What is evaluated on.
        scale: As the user gave it.
        seed: Seeds random layers.
        cpus_per_worker: Logical CPUs that each worker takes.
    """

    data: DataOrders | BatchOrders
    scale: Scale
    seed: int
    cpus_per_worker: float


@dataclass(frozen=True)
class Outcome:
    """What the chief hands back.

    Attributes:
        history: Metric to its value in each epoch.
        epoch: The epochs that were trained.
        params: As Keras' `History.params`.
        callback_states: Attributes of the user's callbacks; see `raykeras.callbacks.states_of`.
        variables: The model's and its optimizer's variables, where they go back into a model of the
            driver.
    """

    history: dict[str, list[float]]
    epoch: list[int]
    params: Mapping[str, Any]
    callback_states: list[dict[str, bytes]] = field(default_factory=list)
    variables: list[np.ndarray] | None = None
