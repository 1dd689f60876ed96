"""Ask driver callbacks after each epoch whether training goes on, and tell the workers, which wait for the answer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

from raykeras.core import events
from raykeras.core.events import Event
from raykeras.core.logs import Logs
from raykeras.driver.callback import DriverCallback
from raykeras.driver.interrupt import Interrupt
from raykeras.worker.coordinator import StepAction

Answer = Callable[[int, StepAction | None], None]
"""Tells the workers what to do after an epoch: "stop", "leave", or None to continue."""


class EpochDecisions:
    """An event handler that calls `should_stop` of driver callbacks once the checkpoint of an epoch is saved.

    Args:
        callbacks: All driver callbacks; those that do not override `should_stop` are not asked.
        saves_epochs: Whether a checkpoint is saved at the end of each epoch.
        interrupt: Receives what a callback raises.
    """

    def __init__(self, callbacks: Sequence[DriverCallback], saves_epochs: bool, interrupt: Interrupt) -> None:
        self._callbacks = [c for c in callbacks if type(c).should_stop is not DriverCallback.should_stop]
        self._saves_epochs, self._interrupt = saves_epochs, interrupt
        self._ended: events.EpochEnded | None = None  # the epoch that is not decided yet
        self._answer: Answer | None = None

    @property
    def are_needed(self) -> bool:
        """Whether the workers must wait for decisions."""
        return bool(self._callbacks)

    def __call__(self, event: Event) -> None:
        if isinstance(event, events.EpochEnded):
            self._ended = event
            if not self._saves_epochs:
                self._decide(event)
        elif isinstance(event, events.CheckpointSaved | events.StorageFailed):
            ended = self._ended
            if ended is not None and (event.epoch, event.step) == (ended.epoch, 0):
                self._decide(ended)

    @contextlib.contextmanager
    def forwarding_to(self, answer: Answer) -> Iterator[None]:
        """Tell the workers with `answer` while the block runs."""
        self._answer = answer
        try:
            yield
        finally:
            self._answer = None

    def _decide(self, ended: events.EpochEnded) -> None:
        self._ended = None
        epoch = ended.epoch or 0
        action = self._action(epoch, ended.logs)
        with contextlib.suppress(Exception):  # the workers were lost
            if self.are_needed and self._answer is not None:
                self._answer(epoch, action)

    def _action(self, epoch: int, logs: Logs) -> StepAction | None:
        stops = False
        for callback in self._callbacks:
            try:
                stops |= bool(callback.should_stop(epoch, dict(logs)))
            except BaseException as error:  # `ray.tune.report` raises SystemExit
                self._interrupt.error = self._interrupt.error or error
        return "leave" if self._interrupt.error is not None else "stop" if stops else None
