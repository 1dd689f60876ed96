"""Keras callbacks that a worker adds to the user's: they send events, save, and stop when all workers do.

Keras is imported lazily, and may be either package: `compat.keras_callbacks.as_callback_class` gives the classes
their base.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from raykeras.core import events
from raykeras.core.events import Event
from raykeras.core.logs import plain_logs
from raykeras.worker.checkpointer import CheckpointManager
from raykeras.worker.coordinator import StepAction

if TYPE_CHECKING:
    from keras.callbacks import Callback as _Callback
else:
    _Callback = object

BATCH_INTERVAL_S = 0.05
"""Batches within this time share an event, because reading a step's logs waits for the step."""


class StepControl(Protocol):
    """Decides what to do at each step boundary; see `raykeras.worker.coordinator`."""

    def check(self, action: StepAction | None) -> set[StepAction]: ...


class TrainingPreempted(BaseException):
    """Ends `fit` on all workers after the same step, once its checkpoint is saved; training continues elsewhere."""


class EventCallback(_Callback):
    """Turns Keras' hooks into events.

    Args:
        send: Takes each event; must return at once.
        send_times: The same for `WorkerStepsEnded`, which every worker sends.
        rank: Rank of this worker.
        batch_rows: Maps a step, counted over all passes, to the number of rows of its global batch.
        waited_s: Maps a step and the time at which the previous one ended to the seconds it waited for data.
        learning_rate: Returns the learning rate of the next step, or None.
        position: Epoch, and step in it, at which training begins.
        first_step: The same, as a step counted over all passes.
    """

    _end: float  # of the last step
    _has_stepped = False
    _test_begin = 0.0

    def __init__(
        self,
        send: Callable[[Event], None],
        *,
        send_times: Callable[[Event], None],
        rank: int,
        batch_rows: Callable[[int], int],
        waited_s: Callable[[int, float], float],
        learning_rate: Callable[[], float | None],
        position: tuple[int, int] = (0, 0),
        first_step: int = 0,
    ) -> None:
        super().__init__()
        self._send, self._send_times = send, send_times
        self._rank, self._batch_rows, self._waited_s = rank, batch_rows, waited_s
        self._learning_rate, self._position = learning_rate, position
        self._step = first_step  # counted over all passes
        self._begin_epoch(*position)

    def on_train_begin(self, logs: Any = None) -> None:
        self._begin_epoch(*self._position)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._begin_epoch(epoch, 0)
        self._send(events.EpochStarted(rank=self._rank, epoch=epoch, step=0))

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        for _ in range(steps_done(batch, self.params["steps"]) - self._in_epoch):
            self._waited += self._waited_s(self._step, self._end)
            self._rows += self._batch_rows(self._step)
            self._step += 1
            self._in_epoch += 1
        self._end, self._logs = time.perf_counter(), logs
        if not self._has_stepped:
            self._has_stepped = True
            self._timed_from = self._end, self._in_epoch, self._waited  # without the first step, which compiles
            self._send(events.PhaseStarted(rank=self._rank, epoch=self._epoch, step=self._in_epoch, phase="train"))
        if self._end - self._sent_at >= BATCH_INTERVAL_S:
            self._send_batches()

    def on_test_begin(self, logs: Any = None) -> None:
        self._send_batches()
        self._test_begin = time.perf_counter()

    def on_test_end(self, logs: Any = None) -> None:
        self._send(
            events.ValidationEnded(
                rank=self._rank,
                epoch=self._epoch,
                step=self._in_epoch,
                logs=plain_logs(logs),
                seconds=time.perf_counter() - self._test_begin,
            )
        )

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._send_batches()
        begin, first, waited = self._timed_from
        self._send_times(
            events.WorkerStepsEnded(
                rank=self._rank,
                epoch=epoch,
                step=self._in_epoch,
                num_steps=self._in_epoch - first,
                seconds=self._end - begin,
                wait_s=self._waited - waited,
            )
        )
        rate, wait = self._rates()
        plain = plain_logs(logs)
        self._send(
            events.EpochEnded(
                rank=self._rank,
                epoch=epoch,
                step=self._in_epoch,
                logs=plain,
                seconds=time.perf_counter() - self._begin,
                rows_per_s=rate,
                data_wait=wait,
                learning_rate=plain.get("learning_rate", plain.get("lr")) or self._learning_rate(),
            )
        )

    def _begin_epoch(self, epoch: int, step: int) -> None:
        self._epoch, self._in_epoch, self._num_sent = epoch, step, step
        self._rows, self._waited, self._waited_sent = 0, 0.0, 0.0
        self._begin = self._end = self._sent_at = time.perf_counter()
        self._timed_from = self._begin, step, 0.0

    def _rates(self) -> tuple[float, float]:
        """Return rows per second, and the share of the time in which steps waited for data."""
        seconds = max(self._end - self._begin, 1e-9)
        return self._rows / seconds, min(1.0, self._waited / seconds)

    def _send_batches(self) -> None:
        """Send one event for the steps since the last one."""
        if self._in_epoch == self._num_sent:
            return
        self._sent_at = self._end
        rate, wait = self._rates()
        self._send(
            events.BatchEnded(
                rank=self._rank,
                epoch=self._epoch,
                step=self._in_epoch,
                logs=plain_logs(self._logs),
                num_steps=self._in_epoch - self._num_sent,
                rows_per_s=rate,
                data_wait=wait,
                wait_s=self._waited - self._waited_sent,
            )
        )
        self._num_sent, self._waited_sent = self._in_epoch, self._waited


class StepControlCallback(_Callback):
    """Saves, stops or leaves as all workers agreed.

    It must come after all callbacks that may stop training or change the model.

    Args:
        step_control: Decides what to do at each step boundary.
        manager: Saves checkpoints.
        await_answer: Waits for the driver's decision after an epoch; None if it takes none.
        first_step: Step, counted over all passes, at which training begins.
        position: The same, as epoch and step in it.
    """

    def __init__(
        self,
        step_control: StepControl,
        manager: CheckpointManager,
        await_answer: Callable[[int], StepAction | None] | None,
        first_step: int,
        position: tuple[int, int],
    ) -> None:
        super().__init__()
        self._step_control, self._manager, self._await_answer = step_control, manager, await_answer
        self._epoch, self._in_epoch = position
        self._total = first_step

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._epoch, self._in_epoch = epoch, 0

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        steps = self.params["steps"]
        done = steps_done(batch, steps)
        self._total, self._in_epoch = self._total + done - self._in_epoch, done
        stopped, actions = self._agree()
        is_due = self._manager.is_due_by_steps(self._total) or actions & {"save", "leave"}
        if is_due and steps is not None:  # a resumed run must know how many steps are left
            self._manager.save_step(self._epoch, done, plain_logs(logs), stopped=stopped)
        if "leave" in actions:
            raise TrainingPreempted

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        stopped, actions = self._agree()
        self._manager.save_epoch(epoch, plain_logs(logs), stopped=stopped, must="leave" in actions)
        answer = self._await_answer(epoch) if self._await_answer is not None else None
        is_over = stopped or epoch + 1 >= self.params["epochs"]
        if answer == "stop" and not is_over:
            self.model.stop_training = True
            self._manager.save_epoch(epoch, plain_logs(logs), stopped=True, must=False)
        if "leave" in actions or (answer == "leave" and not is_over):
            raise TrainingPreempted

    def _agree(self) -> tuple[bool, set[StepAction]]:
        """Return whether training stops here, and the actions that all workers take."""
        wanted = bool(self.model.stop_training)
        action: StepAction | None = "stop" if wanted else "save" if self._manager.is_due_by_time else None
        actions = self._step_control.check(action)
        stops = "stop" in actions
        if stops != wanted:  # setting an attribute of a tf_keras model is slow
            self.model.stop_training = stops
        return stops or (wanted and "leave" in actions), actions


class EpochEndCallback(_Callback):
    """Calls a function with each finished epoch."""

    def __init__(self, function: Callable[[int], None]) -> None:
        super().__init__()
        self._function = function

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._function(epoch)


class HeartbeatCallback(_Callback):
    """Calls a function after each step of training and validation."""

    def __init__(self, heartbeat: Callable[[], None]) -> None:
        super().__init__()
        self._heartbeat = heartbeat

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self._heartbeat()

    def on_test_batch_end(self, batch: int, logs: Any = None) -> None:
        self._heartbeat()


def steps_done(batch: int, steps: int | None) -> int:
    """Return how many steps of an epoch are done in `on_train_batch_end(batch)`.

    Keras 3 counts whole executions, so `batch` may go beyond the epoch.

    Args:
        batch: As Keras passes it, from 0.
        steps: Steps of the epoch; None if unknown.
    """
    return batch + 1 if steps is None else min(batch + 1, steps)
