"""When driver callbacks are asked whether to stop, and what the workers are told."""

from __future__ import annotations

from typing import Any

from raykeras import DriverCallback
from raykeras.core import events
from raykeras.driver.decisions import EpochDecisions
from raykeras.driver.interrupt import Interrupt

ENDED = events.EpochEnded(epoch=1, step=4, logs={"loss": 0.5})
SAVED = events.CheckpointSaved(epoch=1, step=0, path="")


class Asked(DriverCallback):
    def __init__(self, answer: bool | BaseException = True) -> None:
        self.answer = answer
        self.epochs: list[int] = []

    def should_stop(self, epoch: int, logs: Any) -> bool:
        self.epochs.append(epoch)
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer


def answers(*seen: events.Event, callbacks: list[Any], saves_epochs: bool = True) -> list[Any]:
    told: list[Any] = []
    decisions = EpochDecisions(callbacks, saves_epochs, Interrupt())
    with decisions.forwarding_to(lambda epoch, action: told.append((epoch, action))):
        for event in seen:
            decisions(event)
    return told


def test_callbacks_are_asked_once_the_checkpoint_of_the_epoch_is_saved() -> None:
    callback = Asked()
    last_step = events.CheckpointSaved(epoch=1, step=4, path="")
    assert answers(ENDED, last_step, callbacks=[callback]) == []
    assert answers(ENDED, last_step, SAVED, SAVED, callbacks=[callback]) == [(1, "stop")]
    assert callback.epochs == [1]


def test_callbacks_are_asked_without_a_checkpoint_if_there_will_be_none() -> None:
    failed = events.StorageFailed(epoch=1, step=0, cause="unavailable", retry_s=1)
    assert answers(ENDED, failed, SAVED, callbacks=[Asked(False)]) == [(1, None)]
    assert answers(ENDED, callbacks=[Asked(False)], saves_epochs=False) == [(1, None)]


def test_every_callback_is_asked_and_an_exception_interrupts_the_run() -> None:
    callbacks = [Asked(), Asked(SystemExit(0)), Asked(False)]
    assert answers(ENDED, SAVED, callbacks=callbacks) == [(1, "leave")]
    assert [callback.epochs for callback in callbacks] == [[1]] * 3


def test_workers_wait_only_if_a_callback_decides() -> None:
    assert not EpochDecisions([DriverCallback()], True, Interrupt()).are_needed
    assert EpochDecisions([DriverCallback(), Asked()], True, Interrupt()).are_needed
