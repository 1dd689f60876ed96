"""The interface of the data: one for rows that raykeras batches, and for batches that the user makes."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any, Protocol, Self

from raykeras.core.config import Scale
from raykeras.data.batch_spec import BatchSpec
from raykeras.data.streaming.resources import CpuBudget


class TrainInput(Protocol):
    """The batches of one rank. Not thread-safe; only one iteration at a time."""

    @property
    def failure(self) -> Exception | None:
        """The exception that ended the iteration, of which tf.data reports only the text."""

    @property
    def is_epoch_over(self) -> bool:
        """Whether the first epoch has no batches left when training resumes; see `ending_dataset`."""

    def begin(self) -> None:
        """Start to read before the first batch is requested."""

    def close(self) -> None:
        """Stop reading."""

    def sample(self) -> list[Any]:
        """Return a few rows as tensors in the order of the batch spec."""

    def waited_s(self, step: int, since: float) -> float:
        """Return the seconds after `since` until a step's batch was available; 0 if that is not measured.

        Args:
            step: Number of the step, counted over all passes.
            since: When the previous step ended, by `time.perf_counter`.
        """

    def callbacks(self, api: Any) -> list[Any]:
        """Return the callbacks that training with this data needs, for a Keras package."""

    def endless_dataset(self) -> Any:
        """Return a `tf.data.Dataset` of the batches of all epochs; its cardinality is infinite."""

    def pass_dataset(self, num_steps: int | None) -> Any:
        """Return a `tf.data.Dataset` of the batches of one epoch; each iteration continues with the next epoch.

        Args:
            num_steps: Batches in an epoch; None for a whole pass.
        """

    def ending_dataset(self, num_steps: int) -> Any:
        """Return a `tf.data.Dataset` of the batches of one pass; after a resume, first the rest of a pass.

        It is for `fit` in Keras 3, where an epoch of `num_steps` continues the pass of the epoch before, and ends where
        the pass ends.
        """


class DataSpec(Protocol):
    """How data is used, the same for all ranks: picklable, without TensorFlow."""

    @property
    def batch_spec(self) -> BatchSpec:
        """The spec of a batch as the model takes it."""

    @property
    def num_steps(self) -> int | None:
        """The number of batches in a pass; None if unknown."""

    @property
    def ends_epochs(self) -> bool:
        """Whether `fit(steps_per_epoch=…)` of Keras 3 ends an epoch at the end of a pass."""

    @property
    def may_run_out(self) -> bool:
        """Whether the data may end before the last epoch."""

    @property
    def can_restart(self) -> bool:
        """Whether the data can be used again from its beginning, in this process."""

    @property
    def uses_ray_data(self) -> bool:
        """Whether tasks of Ray Data read the rows."""

    @property
    def params(self) -> Mapping[str, Any]:
        """The parameters that `RunStarted` reports."""

    @property
    def position(self) -> Mapping[str, Any]:
        """The properties of the data that must equal those in a checkpoint to resume from it."""

    def with_spec(self, batch_spec: BatchSpec) -> Self:
        """Return the same data with another batch spec."""

    def with_shards(self, position: Mapping[str, Any]) -> Self:
        """Return the same data with the shards and windows, if any, of a checkpoint's `position`."""

    def skip_to(self, epoch: int, step: int) -> Self:
        """Return the data for a training that resumes after `step` steps of an epoch."""

    def what_changed(self, position: Mapping[str, Any]) -> str | None:
        """Describe how the data differs from that of a checkpoint's `position`; None if only a fingerprint is known."""

    def batch_num_rows(self, step: int) -> int:
        """Return the number of rows of a step's global batch, counted over all passes; 0 if unknown."""

    def read_ahead(self) -> None:
        """Start reading the rows that will be cached, in the background."""

    def for_workers(self, num_workers: int, cpus_per_task: float) -> contextlib.AbstractContextManager[Self]:
        """Make the data available to workers in other processes while the block runs; yield the spec to pickle.

        Args:
            num_workers: Number of workers.
            cpus_per_task: Logical CPUs of a task that makes batches.
        """

    def open(
        self,
        rank: int,
        scale: Scale,
        budget: CpuBudget,
        *,
        num_steps: int | None,
        first_step: int = 0,
        num_inputs: int = 1,
    ) -> TrainInput:
        """Return the input of one rank.

        Args:
            rank: Rank of this worker.
            scale: Scale of the run.
            budget: Logical CPUs of the workers and of the tasks that read data.
            num_steps: Step, counted over all passes, at which the input ends; None for no limit.
            first_step: Step, counted over all passes, at which the input begins.
            num_inputs: Number of inputs of this worker that share the budget.
        """
