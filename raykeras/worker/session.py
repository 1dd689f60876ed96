"""Prepare Keras' `fit` on one worker, and collect its outcome: callbacks, resumption, checkpoints and events."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from raykeras.checkpoint.snapshot import (
    Restored,
    check_signature,
    restore,
    restore_metrics,
    restore_weights,
    signature_of,
    variables_of,
)
from raykeras.checkpoint.store import Checkpoint
from raykeras.checkpoint.writer import AsyncCheckpointWriter
from raykeras.compat.keras_api import KerasAPI
from raykeras.compat.keras_callbacks import as_callback_class
from raykeras.core import events
from raykeras.core.events import Event
from raykeras.core.logs import plain_logs, plain_number
from raykeras.data.train_input import TrainInput
from raykeras.worker import callbacks as callbacks_
from raykeras.worker.callback_placement import Artifacts, is_transient_attribute, resume_loggers
from raykeras.worker.callbacks import StepControl
from raykeras.worker.checkpointer import CheckpointManager
from raykeras.worker.coordinator import StepAction
from raykeras.worker.job import Outcome, TrainJob
from raykeras.worker.resume import CallbackStates, EpochStart, resuming_list


@dataclass(frozen=True, kw_only=True)
class WorkerContext:
    """What connects one worker to the rest of the run.

    Attributes:
        rank: Rank of this worker.
        callbacks: Context that yields the user's callbacks that run here, by name.
        send: Sends events of this worker.
        writer: Writes checkpoints; None on all ranks but the chief.
        step_control: Decides what to do at each step boundary.
        await_answer: Waits for the driver's decision after an epoch, and returns it.
        artifacts: Stores the files that callbacks write here; None if they stay where they are.
        heartbeat: Called after each step; None if the steps are not watched.
        states: Pickles the callbacks' attributes for the driver; None if the driver has the callbacks.
        return_variables: Whether to return the variables to the driver.
    """

    rank: int
    callbacks: contextlib.AbstractContextManager[Mapping[str, Any]]
    send: Callable[[Event], None]
    writer: AsyncCheckpointWriter | None
    step_control: StepControl
    await_answer: Callable[[int], StepAction | None]
    artifacts: Artifacts | None = None
    heartbeat: Callable[[], None] | None = None
    states: Callable[[Sequence[Any]], list[dict[str, bytes]]] | None = None
    return_variables: bool = False


class TrainingSession:
    """One call of Keras' `fit` on one worker.

    Args:
        job: Job of the run.
        context: Connects this worker to the rest of the run.
        api: The model's Keras package.
        model: A compiled model, and a built one if the job has a checkpoint to continue from.
        callbacks: The user's callbacks that run here, by name.
        train: The training data of this rank.
        counts_steps: As for `resuming_list`.
    """

    def __init__(
        self,
        job: TrainJob,
        context: WorkerContext,
        api: KerasAPI,
        model: Any,
        callbacks: Mapping[str, Any],
        *,
        train: TrainInput,
        counts_steps: bool,
    ) -> None:
        self._job, self._context, self._api, self._model = job, context, api, model
        self._callbacks, self._train, self._counts_steps = callbacks, train, counts_steps
        self._send = context.send if context.rank == 0 else _discard
        history_type = api.module.callbacks.History
        histories = [callback for callback in callbacks.values() if isinstance(callback, history_type)]
        self._history = histories[0] if histories else history_type()
        self._adds_history = not histories
        self._states = CallbackStates({**callbacks, "History": self._history}, is_transient_attribute)
        self.params = {"epochs": job.epochs, "steps": job.num_steps, "verbose": 0}
        signature = signature_of(model, api)
        self._manager = CheckpointManager(job, model, api, context.writer, signature, self._extra)
        self._restored = self._restore(signature)

    @property
    def initial_epoch(self) -> int:
        """The `initial_epoch` for `fit`; with a checkpoint of a stopped training, one that leaves no epoch to train."""
        epoch, step = self._job.start
        stopped = self._restored is not None and self._restored.state["stopped"]
        return max(epoch, self._job.epochs) if stopped and not step else epoch

    def callback_list(self) -> Any:
        """Announce the start to the driver, and return the callbacks for `fit`: the user's, then internal ones."""
        self._announce()
        epoch, step = self._job.start
        state = self._restored.state if self._restored is not None else {}
        start = EpochStart(
            epoch,
            step,
            is_over=bool(step) and bool(state["stopped"]),
            logs={name: np.asarray(value) for name, value in state.get("step_logs", {}).items()},
        )
        callbacks = [*self._callbacks.values(), *self._added_callbacks()]
        return resuming_list(self._api, callbacks, self._model, self, start, self._counts_steps)

    def steps_of(self, epoch: int) -> int | None:
        """Return the number of steps of an epoch; None if unknown."""
        first, step = self._job.start
        if epoch == first and self._train.is_epoch_over:
            return step
        return self._job.steps_of(epoch)

    def restore_states(self) -> None:
        """Set the attributes of callbacks as they were in the checkpoint, if there is one."""
        if self._restored is not None:
            self._states.restore_states(self._restored.extra["callbacks"])

    def restore_metrics(self) -> None:
        """Set the metrics' variables as they were in the checkpoint."""
        assert self._restored is not None
        restore_metrics(self._model, self._api, self._restored, self._context.rank)

    def preempted(self) -> Outcome:
        """Finish a training that continues later, and return its outcome."""
        self._close_writer()
        return self._outcome(preempted=True)

    def ended(self) -> Outcome:
        """Save the end of a training, and return its outcome."""
        epochs = self._history.epoch
        last_epoch = epochs[-1] if epochs else self._job.epochs - 1
        last_logs = {name: values[-1] for name, values in self._history.history.items() if values}
        self._manager.save_last(last_epoch, plain_logs(last_logs), stopped=bool(epochs))
        self._close_writer()
        self._store_artifacts(last_epoch)
        return self._outcome(preempted=False)

    def _restore(self, signature: Mapping[str, Any]) -> Restored | None:
        resumption = self._job.resumption
        if resumption is None:
            return None
        checkpoint = Checkpoint(resumption.checkpoint)
        if resumption.weights_only:
            restore_weights(self._model, self._api, checkpoint)
            return None
        model_signature = {**signature, "variables": variables_of(self._model)}
        check_signature(checkpoint, checkpoint.state["signature"], model_signature)
        restored = restore(self._model, self._api, checkpoint)
        self._manager.set_position(resumption.epoch, resumption.step, self._job.first_step)
        resume_loggers(self._callbacks.values() if self._context.rank == 0 else (), resumption.epoch)
        return restored

    def _extra(self) -> dict[str, Any]:
        return {"callbacks": self._states.changed()}

    def _announce(self) -> None:
        job, rank = self._job, self._context.rank
        epoch, step = job.start
        history = self._past_history()
        self._send(  # also after a restart: an earlier attempt may have failed before it
            events.RunStarted(
                rank=rank,
                params={**self.params, **job.train.params, "validation": job.validation is not None},
                workers=job.scale.workers,
                replicas=job.scale.total_replicas,
                initial_epoch=epoch,
                initial_step=step,
                path=job.folder.path,
                model=self._api.describe(self._model) if rank == 0 else {},
                history=history,
            )
        )
        if job.attempt:
            self._send(
                events.RunRestarted(
                    rank=rank,
                    epoch=epoch,
                    step=step,
                    workers=job.scale.workers,
                    attempt=job.attempt,
                    history=history,
                )
            )
        self._send(events.PhaseStarted(rank=rank, phase="compile"))

    def _past_history(self) -> dict[str, list[Any]]:
        """Return the history in the checkpoint, and its epochs under "epoch"; nothing if it holds anything else."""
        state = {} if self._restored is None else self._restored.extra["callbacks"].get("History", {})
        metrics, epochs = state.get("history"), state.get("epoch")
        if not isinstance(metrics, dict) or not isinstance(epochs, list):
            return {}
        lists = {name: values for name, values in metrics.items() if isinstance(values, list)}
        return {**{name: [plain_number(v) for v in values] for name, values in lists.items()}, "epoch": epochs}

    def _added_callbacks(self) -> list[Any]:
        context, job, train = self._context, self._job, self._train
        make = functools.partial(as_callback_class, self._api)
        internal = train.callbacks(self._api)
        if self._adds_history:
            internal.append(self._history)
        internal.append(
            make(callbacks_.EventCallback)(
                self._send,
                send_times=context.send,
                rank=context.rank,
                batch_rows=job.train.batch_num_rows,
                waited_s=train.waited_s,
                learning_rate=functools.partial(self._api.learning_rate, self._model),
                position=job.start,
                first_step=job.first_step,
            )
        )
        if context.artifacts is not None:
            internal.append(make(callbacks_.EpochEndCallback)(self._store_artifacts))
        control = make(callbacks_.StepControlCallback)
        await_answer = context.await_answer if job.awaits_decisions else None
        internal.append(control(context.step_control, self._manager, await_answer, job.first_step, job.start))
        if context.heartbeat is not None:
            internal.append(make(callbacks_.HeartbeatCallback)(context.heartbeat))
        return internal

    def _close_writer(self) -> None:
        if self._context.writer is not None:
            self._context.writer.close()

    def _outcome(self, preempted: bool) -> Outcome:
        context = self._context
        # on all ranks, because reading some variables merges them from all
        variables = self._api.variables(self._model) if context.return_variables else []
        named_values = [(self._api.path_of(variable), np.asarray(variable)) for variable in variables]
        callbacks = list(self._callbacks.values())
        return Outcome(
            history={name: [plain_number(v) for v in values] for name, values in self._history.history.items()},
            epoch=list(self._history.epoch),
            params=self.params,
            callback_states=context.states(callbacks) if context.states is not None and context.rank == 0 else [],
            named_values=named_values if context.rank == 0 else [],
            preempted=preempted,
        )

    def _store_artifacts(self, epoch: int) -> None:
        for path in self._context.artifacts.collect() if self._context.artifacts is not None else ():
            self._send(events.ArtifactSaved(rank=self._context.rank, epoch=epoch, path=path))


def _discard(event: Event) -> None:
    """Send nothing: what happens on all ranks is announced by the chief."""
