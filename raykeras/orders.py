"""What a worker is told: plain, picklable, made by the driver, without TensorFlow."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from raykeras.batches import Batches
from raykeras.checkpoint import RunFolder
from raykeras.cluster import Room
from raykeras.columns import Layout
from raykeras.epochs import Epochs
from raykeras.held import Held
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
        held: The rows, where they are read once and held.
        ends_epochs: Whether `fit(steps_per_epoch=…)` ends an epoch at the end of a pass, as Keras 3 does with arrays.
    """

    opened: OpenSource
    layout: Layout
    order: Order
    batch_size: int
    num_shards: int
    window_rows: int
    seed: int
    held: Held | None = None
    ends_epochs: bool = False

    def laid_out(self, layout: Layout) -> DataOrders:
        """The same rows as other tensors."""
        return dataclasses.replace(self, layout=layout)

    @property
    def in_memory(self) -> bool:
        """Whether no storage is read in an epoch."""
        return self.held is not None or self.opened.reader.in_memory

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
        return {
            "fingerprint": self.opened.fingerprint,
            "fingerprint_parts": self.opened.fingerprint_parts,
            "num_rows": self.opened.num_rows,
            "batch_size": self.batch_size,
            "order": self.order,
            "num_shards": self.num_shards,
            "window_rows": self.window_rows,
        }

    def cut_as(self, position: Mapping[str, Any]) -> DataOrders:
        """The same rows in the shards and windows of a checkpoint's position."""
        num_shards, window_rows = position.get("num_shards"), position.get("window_rows")
        if num_shards is None or window_rows is None:
            return self
        return dataclasses.replace(self, num_shards=num_shards, window_rows=window_rows)

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
        passed: Epochs that were trained before, and steps of the next.
    """

    batches: Batches
    layout: Layout
    num_steps: int | None
    shuffle: bool
    seed: int
    steps: int | None
    restart: bool = False
    pipes: tuple[Any, ...] = ()
    passed: tuple[int, int] = (0, 0)
    params: Mapping[str, Any] = field(default_factory=dict)

    @property
    def position(self) -> dict[str, Any]:
        """What a checkpoint must agree with to go on in this data."""
        return {"batches": self.batches.kind, "num_batches": self.num_steps, "shuffle": self.shuffle}

    def cut_as(self, position: Mapping[str, Any]) -> BatchOrders:
        """Itself: the batches are the user's."""
        return self

    def epochs(self) -> Epochs:
        """The batches, epoch after epoch, from where training goes on."""
        return Epochs(
            self.batches,
            shuffle=self.shuffle,
            seed=self.seed,
            steps=self.steps,
            restart=self.restart,
            passed=self.passed,
        )

    def laid_out(self, layout: Layout) -> BatchOrders:
        """The same batches as other tensors."""
        return dataclasses.replace(self, layout=layout)


@dataclass(frozen=True)
class Resumption:
    """Where a training goes on.

    Attributes:
        checkpoint: Path of the checkpoint.
        epoch: Epochs that are finished.
        step: Steps of the next that are, too.
        weights_only: Whether nothing but the model's weights is taken, for a training of its own.
    """

    checkpoint: str
    epoch: int = 0
    step: int = 0
    weights_only: bool = False


@dataclass(frozen=True)
class Orders:
    """One worker's part of a run; the same for all ranks.

    Attributes:
        train, validation: What is trained on and validated with.
        epochs, initial_epoch, steps_per_epoch, validation_freq: As `Model.fit` takes them.
        scale: Of the workers that there are.
        run: As the user gave it.
        folder: The run's folder.
        room: Logical CPUs of the workers and of tasks.
        token: What this driver claimed the folder with.
        resumption: Where to go on; None for a training that begins.
        attempt: How often workers were started for it before.
        widest: The scale that the user gave; `scale` is that of an attempt.
        grow_after_s: Seconds for which there must have been room for more workers before they are started.
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
    room: Room
    token: str
    widest: Scale
    grow_after_s: float = 5.0
    resumption: Resumption | None = None
    attempt: int = 0

    @property
    def position(self) -> dict[str, Any]:
        """What a checkpoint must agree with to go on with these orders."""
        return {"seed": self.run.seed, "steps_per_epoch": self.steps_per_epoch, **self.train.position}

    @property
    def begins_at(self) -> tuple[int, int]:
        """Epoch, and step in it, at which training begins."""
        if self.resumption is None or self.resumption.weights_only:
            return self.initial_epoch, 0
        return self.resumption.epoch, self.resumption.step

    @property
    def trains_nothing(self) -> bool:
        """Whether no epoch is left."""
        epoch, step = self.begins_at
        return epoch >= self.epochs and not step

    @property
    def num_steps(self) -> int | None:
        """Steps of an epoch, though one that ends with the data may have fewer; None where nobody knows them yet."""
        return self.steps_per_epoch or self.train.num_steps

    @property
    def ends_with_pass(self) -> bool:
        """Whether some epochs have fewer steps than others."""
        train, steps = self.train, self.steps_per_epoch
        return bool(steps and isinstance(train, DataOrders) and train.ends_epochs and train.num_steps % steps)

    @property
    def may_end_with_pass(self) -> bool:
        """Whether an epoch may turn out to have fewer steps than others, since nobody knows the dataset's length."""
        if not isinstance(self.train, BatchOrders) or self.scale.num_replicas > 1:
            return False
        batches = self.train.batches
        is_unknown = batches.num_batches is None and not batches.is_infinite
        return bool(self.steps_per_epoch) and batches.kind == "dataset" and is_unknown

    def steps_before(self, epoch: int) -> int:
        """Return the steps of all epochs before one; 0 where nobody knows them yet."""
        steps = self.num_steps or 0
        if not self.ends_with_pass:
            return epoch * steps
        pass_steps = self.train.num_steps or 0
        num_passes, epoch_of_pass = divmod(epoch, -(-pass_steps // steps))
        return num_passes * pass_steps + epoch_of_pass * steps

    def steps_of(self, epoch: int) -> int | None:
        """Return the steps of an epoch; None where nobody knows them yet."""
        return self.num_steps and self.steps_before(epoch + 1) - self.steps_before(epoch)


@dataclass(frozen=True)
class EvaluationOrders:
    """One worker's part of an evaluation; the same for all ranks.

    Attributes:
        data: What is evaluated on.
        scale: As the user gave it.
        seed: Seeds random layers.
        room: Logical CPUs of the workers and of tasks.
    """

    data: DataOrders | BatchOrders
    scale: Scale
    seed: int
    room: Room


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
        left: Whether the workers left before the end, because they were asked to.
    """

    history: dict[str, list[Any]]
    epoch: list[int]
    params: Mapping[str, Any]
    callback_states: list[dict[str, bytes]] = field(default_factory=list)
    variables: list[np.ndarray] | None = None
    left: bool = False
