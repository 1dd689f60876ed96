"""Our callbacks: those that turn Keras' hooks into events, and the one whose hooks run in the driver.

Enters: Keras' hooks on the chief. Leaves: events; and, in the driver, hooks again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from raykeras import events
from raykeras.events import Event
from raykeras.keras_api import KerasAPI
from raykeras.logs import Logs, plain_logs

BATCH_INTERVAL_S = 0.05
"""Batches within this time are told of together: reading a step's logs waits for the step."""


class DriverCallback:
    """A callback whose hooks run in the driver, on the event stream.

    Pass it to `fit` among the others. It never holds up a step, sees what the chief sees, and may
    use what only the driver has. Logs are floats, and arrays of metrics that have several values.
    """

    def on_train_begin(self, logs: Logs) -> None: ...

    def on_train_end(self, logs: Logs) -> None: ...

    def on_epoch_begin(self, epoch: int, logs: Logs) -> None: ...

    def on_epoch_end(self, epoch: int, logs: Logs) -> None: ...

    def on_train_batch_end(self, batch: int, logs: Logs) -> None:
        """`batch` counts from 0; several batches may be told of as the last of them."""

    def on_test_end(self, logs: Logs) -> None: ...

    def on_event(self, event: Event) -> None:
        """Every event, before the hook that it belongs to."""

    def dispatch(self, event: Event) -> None:
        """Calls the hooks of an event."""
        self.on_event(event)
        epoch = event.epoch or 0
        if isinstance(event, events.RunStarted):
            self.on_train_begin({})
        elif isinstance(event, events.EpochStarted):
            self.on_epoch_begin(epoch, {})
        elif isinstance(event, events.BatchEnded):
            self.on_train_batch_end((event.step or 1) - 1, dict(event.logs))
        elif isinstance(event, events.ValidationEnded):
            self.on_test_end(dict(event.logs))
        elif isinstance(event, events.EpochEnded):
            self.on_epoch_end(epoch, dict(event.logs))
        elif isinstance(event, events.RunEnded):
            self.on_train_end(dict(event.logs))


def event_callback(
    api: KerasAPI,
    send: Callable[[Event], None],
    *,
    rank: int,
    batch_rows: Callable[[int], int],
    waited_s: Callable[[int, float], float],
    position: tuple[int, int] = (0, 0),
    first_step: int = 0,
) -> Any:
    """The callback that turns Keras' hooks into events.

    Args:
        api: The Keras that calls it.
        send: Takes each event, at once.
        rank: Rank of this worker.
        batch_rows: Step, counted through all passes, to the rows of its global batch.
        waited_s: Step and the time its predecessor ended to the seconds it waited for data.
        position: Epoch, and step in it, at which training begins.
        first_step: The same, counted through all passes.
    """

    class EventCallback(api.module.callbacks.Callback):  # type: ignore[name-defined]
        _supports_tf_logs = True  # or tf_keras would wait for the logs of every step

        def __init__(self) -> None:
            super().__init__()
            self._step = first_step  # counted through all passes
            self._begin_epoch(*position)

        def _begin_epoch(self, epoch: int, step: int) -> None:
            self._epoch, self._in_epoch, self._sent = epoch, step, step  # told of up to here
            self._rows, self._waited = 0, 0.0
            self._begin = self._end = self._told = time.perf_counter()

        def on_train_begin(self, logs: Any = None) -> None:
            self._begin_epoch(*position)

        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            self._begin_epoch(epoch, 0)
            send(events.EpochStarted(rank=rank, epoch=epoch, step=0))

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            for _ in range(steps_done(batch, self.params["steps"]) - self._in_epoch):
                self._waited += waited_s(self._step, self._end)
                self._rows += batch_rows(self._step)
                self._step += 1
                self._in_epoch += 1
            now = self._end = time.perf_counter()
            self._logs = logs
            if now - self._told >= BATCH_INTERVAL_S:
                self._tell()

        def on_test_begin(self, logs: Any = None) -> None:
            self._tell()

        def on_test_end(self, logs: Any = None) -> None:
            send(events.ValidationEnded(rank=rank, epoch=self._epoch, step=self._in_epoch, logs=plain_logs(logs)))

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            self._tell()
            rate, wait = self._speed()
            send(
                events.EpochEnded(
                    rank=rank,
                    epoch=epoch,
                    step=self._in_epoch,
                    logs=plain_logs(logs),
                    seconds=time.perf_counter() - self._begin,
                    rows_per_s=rate,
                    data_wait=wait,
                )
            )

        def _speed(self) -> tuple[float, float]:
            seconds = max(self._end - self._begin, 1e-9)
            return self._rows / seconds, min(1.0, self._waited / seconds)

        def _tell(self) -> None:
            if self._in_epoch == self._sent:
                return
            self._told = self._end
            rate, wait = self._speed()
            send(
                events.BatchEnded(
                    rank=rank,
                    epoch=self._epoch,
                    step=self._in_epoch,
                    logs=plain_logs(self._logs),
                    num_steps=self._in_epoch - self._sent,
                    rows_per_s=rate,
                    data_wait=wait,
                )
            )
            self._sent = self._in_epoch

    return EventCallback()


def steps_done(batch: int, steps: int | None) -> int:
    """Steps of an epoch of `steps` that are done in `on_train_batch_end(batch)`: Keras 3 counts whole executions."""
    return batch + 1 if steps is None else min(batch + 1, steps)


def epoch_end_callback(api: KerasAPI, function: Callable[[int, Logs], None]) -> Any:
    """A callback that calls a function with the epoch and its logs."""

    class EpochEndCallback(api.module.callbacks.Callback):  # type: ignore[name-defined]
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            function(epoch, plain_logs(logs))

    return EpochEndCallback()
