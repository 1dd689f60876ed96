"""What is known about a run so far, from its events."""

from __future__ import annotations

from typing import Any

from raykeras.checkpoint.store import is_better
from raykeras.core import events
from raykeras.core.events import Event
from raykeras.core.logs import Logs
from raykeras.driver.goodput import Timeline


class RunState:
    """An event handler that keeps the state of a run.

    Args:
        monitor: Name of the metric that determines the best epoch.

    Attributes:
        monitor: The same.
        started: The event with which the run, or this call, began; None before.
        phase: Key of `events.PHASES`; empty before the first one.
        workers: Current number of workers.
        epoch: Current epoch, from 0.
        step: Number of steps finished in it.
        logs: Latest metrics of the epoch.
        rows_per_s: Rows of the global batches per second.
        data_wait: Fraction of the epoch, 0 to 1, in which steps waited for data.
        finished: Ends of the epochs in the history, by epoch.
        checkpoint: The last checkpoint that was saved.
        restarts: Number of restarts.
        begun: Time of the first event; 0 before.
        updated: Time of the latest event; 0 before.
        status: As in `RunEnded`; empty while the run goes on.
        timeline: Where the time went.
    """

    def __init__(self, monitor: str = "val_loss") -> None:
        self.monitor = monitor
        self.started: events.RunStarted | None = None
        self.phase = ""
        self.workers = 1
        self.epoch, self.step = 0, 0
        self.logs: Logs = {}
        self.rows_per_s = self.data_wait = 0.0
        self.finished: dict[int, events.EpochEnded] = {}
        self.checkpoint: events.CheckpointSaved | None = None
        self.restarts = 0
        self.begun = self.updated = 0.0
        self.status = ""
        self.timeline = Timeline()
        self._first: tuple[float, int] | None = None  # time and step from which the speed is measured
        self._step_s: float | None = None

    def __call__(self, event: Event) -> None:
        self.timeline(event)
        self.begun, self.updated = self.begun or event.time, max(self.updated, event.time)
        epoch, step = event.epoch or 0, event.step or 0
        if isinstance(event, events.PhaseStarted):
            self.phase, self.status = event.phase, ""
            self._first = (event.time, step) if event.phase == "train" else None
        elif isinstance(event, events.RunStarted):
            self.started, self.workers = event, event.workers
            self._go_back(event.initial_epoch, event.initial_step)
        elif isinstance(event, events.RunRestarted):
            self.workers, self.restarts = event.workers, self.restarts + 1
            self._go_back(epoch, step)
        elif isinstance(event, events.EpochStarted):
            self.epoch, self.step, self.logs = epoch, 0, {}
            self._first = (event.time, 0) if self.phase == "train" else None
        elif isinstance(event, events.BatchEnded):
            self.epoch, self.step, self.logs = epoch, step, event.logs
            self.rows_per_s, self.data_wait = event.rows_per_s, event.data_wait
            self._measure(event.time, step)
        elif isinstance(event, events.ValidationEnded):
            self.logs = {**self.logs, **{f"val_{name}": value for name, value in event.logs.items()}}
        elif isinstance(event, events.EpochEnded):
            self.finished[epoch] = event
        elif isinstance(event, events.CheckpointSaved):
            self.checkpoint = event
        elif isinstance(event, events.RunEnded):
            self.status = event.status

    @property
    def params(self) -> dict[str, Any]:
        """The parameters that Keras passes to callbacks."""
        return self.started.params if self.started is not None else {}

    @property
    def epochs(self) -> int | None:
        """The epoch at which the run stops; None before it starts."""
        return self.params.get("epochs")

    @property
    def steps(self) -> int | None:
        """Number of steps of an epoch; None if unknown."""
        return self.params.get("steps")

    @property
    def is_validating(self) -> bool:
        """Whether the steps of the epoch are done and its validation is not."""
        is_last_step = self.steps is not None and self.step >= self.steps and self.epoch not in self.finished
        return is_last_step and bool(self.params.get("validation")) and not any(map(_is_validated, self.logs))

    @property
    def step_s(self) -> float | None:
        """Seconds of a step; None before two steps ended."""
        return self._step_s

    @property
    def epoch_left_s(self) -> float | None:
        """Seconds until the steps of the epoch are done; None if unknown."""
        if self.steps is None or self._step_s is None:
            return None
        return max(0, self.steps - self.step) * self._step_s

    @property
    def run_left_s(self) -> float | None:
        """Seconds until the run is done, if the epochs take as long as those before; None if unknown."""
        if self.epochs is None:
            return None
        num_later = max(0, self.epochs - self.epoch - 1)
        if not self.finished:
            return None if self.epoch_left_s is None or num_later else self.epoch_left_s
        times = sorted(event.seconds for event in self.finished.values())
        median_s = times[(len(times) - 1) // 2]
        if self.epoch in self.finished:
            return num_later * median_s
        done = min(1.0, self.step / self.steps) if self.steps else 0.0
        return (num_later + 1 - done) * median_s

    @property
    def best(self) -> int | None:
        """The epoch with the best value of the monitored metric; None if no epoch has it."""
        best: tuple[float, int] | None = None
        for epoch, event in sorted(self.finished.items()):
            value = event.logs.get(self.monitor)
            if isinstance(value, float) and (best is None or is_better(self.monitor, value, best[0])):
                best = (value, epoch)
        return None if best is None else best[1]

    def history(self) -> dict[str, list[Any]]:
        """Return the metrics by name, as `History.history` in Keras."""
        history: dict[str, list[Any]] = {}
        for _, event in sorted(self.finished.items()):
            for name, value in event.logs.items():
                history.setdefault(name, []).append(value)
        return history

    def _go_back(self, epoch: int, step: int) -> None:
        self.epoch, self.step, self.logs, self._first = epoch, step, {}, None
        self.finished = {number: event for number, event in self.finished.items() if number < epoch}

    def _measure(self, time: float, step: int) -> None:
        """Measure the time of a step from the first event of the epoch."""
        if self._first is None:
            self._first = (time, step)
        elif step > self._first[1] and time > self._first[0]:
            self._step_s = (time - self._first[0]) / (step - self._first[1])


def _is_validated(name: str) -> bool:
    return name.startswith("val_")
