"""The jobs that the driver sends to workers, and the outcome they return: picklable, without TensorFlow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from raykeras.checkpoint.store import RunFolder
from raykeras.core.config import Run, Scale
from raykeras.data.streaming.resources import CpuBudget
from raykeras.data.train_input import DataSpec


@dataclass(frozen=True)
class Resumption:
    """The checkpoint from which a training continues.

    Attributes:
        checkpoint: Path of the checkpoint.
        epoch: Number of finished epochs.
        step: Number of finished steps in the next epoch.
        weights_only: Whether to load only the model's weights and start a new training.
    """

    checkpoint: str
    epoch: int = 0
    step: int = 0
    weights_only: bool = False


@dataclass(frozen=True)
class TrainJob:
    """A training job; the same for all ranks.

    Attributes:
        train, validation: Spec of the training and validation data.
        epochs, initial_epoch, steps_per_epoch, validation_freq: As `Model.fit` takes them.
        scale: Scale of this attempt.
        run: The user's options for the run.
        folder: The run's folder.
        budget: Logical CPUs of the workers and of the tasks that read data.
        token: Token with which this driver claimed the folder.
        requested_scale: The scale that the user asked for.
        grow_after_s: Seconds for which more workers must fit into the cluster before they are started.
        resumption: Checkpoint to continue from; None for a new training.
        attempt: Number of attempts before this one.
        ends_epochs: Whether Keras ends an epoch where the data ends, as Keras 3 does and tf_keras does not.
        awaits_decisions: Whether the workers wait for the driver's decision at the end of each epoch.
    """

    train: DataSpec
    validation: DataSpec | None
    epochs: int
    initial_epoch: int
    steps_per_epoch: int | None
    validation_freq: Any
    scale: Scale
    run: Run
    folder: RunFolder
    budget: CpuBudget
    token: str
    requested_scale: Scale
    grow_after_s: float = 5.0
    resumption: Resumption | None = None
    attempt: int = 0
    ends_epochs: bool = True
    awaits_decisions: bool = False

    @property
    def position(self) -> dict[str, Any]:
        """What must be the same in a checkpoint for this job to continue from it."""
        return {"seed": self.run.seed, "steps_per_epoch": self.steps_per_epoch, **self.train.position}

    @property
    def start(self) -> tuple[int, int]:
        """The epoch, and step in it, at which training begins."""
        if self.resumption is None or self.resumption.weights_only:
            return self.initial_epoch, 0
        return self.resumption.epoch, self.resumption.step

    @property
    def first_step(self) -> int:
        """The same, as a step counted over all passes: an epoch's row order does not depend on where a run begins."""
        epoch, step = self.start
        return self.steps_before(epoch) + step

    @property
    def is_finished(self) -> bool:
        """Whether no epoch is left."""
        epoch, step = self.start
        return epoch >= self.epochs and not step

    @property
    def num_steps(self) -> int | None:
        """The number of steps in an epoch, or an upper bound if it may end with the data; None if unknown."""
        return self.steps_per_epoch or self.train.num_steps

    @property
    def ends_with_pass(self) -> bool:
        """Whether some epochs have fewer steps than others."""
        steps, pass_steps = self.steps_per_epoch, self.train.num_steps
        return bool(self.ends_epochs and self.train.ends_epochs and steps and pass_steps and pass_steps % steps)

    @property
    def may_end_with_pass(self) -> bool:
        """Whether an epoch may have fewer steps than others because the dataset's length is unknown."""
        ends_epochs = self.ends_epochs and self.train.ends_epochs
        return bool(ends_epochs and self.steps_per_epoch and self.train.num_steps is None and self.scale.workers == 1)

    def steps_before(self, epoch: int) -> int:
        """Return the number of steps in all epochs before one; 0 if unknown."""
        steps = self.num_steps or 0
        if not self.ends_with_pass:
            return epoch * steps
        pass_steps = self.train.num_steps or 0
        num_passes, epoch_of_pass = divmod(epoch, -(-pass_steps // steps))
        return num_passes * pass_steps + epoch_of_pass * steps

    def steps_of(self, epoch: int) -> int | None:
        """Return the number of steps in an epoch; None if unknown."""
        return self.num_steps and self.steps_before(epoch + 1) - self.steps_before(epoch)


@dataclass(frozen=True)
class EvaluationJob:
    """An evaluation job; the same for all ranks.

    Attributes:
        data: Spec of the data.
        scale: Scale of the evaluation.
        seed: Seed of random layers.
        budget: Logical CPUs of the workers and of the tasks that read data.
    """

    data: DataSpec
    scale: Scale
    seed: int
    budget: CpuBudget


@dataclass(frozen=True)
class Outcome:
    """What the chief returns to the driver.

    Attributes:
        history: Maps each metric to its value in each epoch.
        epoch: The epochs that were trained.
        params: As Keras' `History.params`.
        callback_states: Attributes of the user's callbacks; see `raykeras.worker.callback_placement.states_of`.
        named_values: Paths and values of the variables of the model and its optimizer, if the driver's model is trained
            in place.
        preempted: Whether the workers left before the end on request, to continue later.
    """

    history: dict[str, list[Any]]
    epoch: list[int]
    params: Mapping[str, Any]
    callback_states: list[dict[str, bytes]] = field(default_factory=list)
    named_values: list[tuple[str, np.ndarray]] = field(default_factory=list)
    preempted: bool = False
