"""Train a job to its end: attempts, the events they send, and what may end them early."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from raykeras.checkpoint.store import RunFolder
from raykeras.core import events
from raykeras.core.errors import UserCodeError, redacted
from raykeras.core.events import Event
from raykeras.driver.decisions import EpochDecisions
from raykeras.driver.event_log import EventDispatcher
from raykeras.driver.interrupt import Interrupt
from raykeras.driver.launch import fit_here, fit_on_workers
from raykeras.driver.restarts import train as run_attempts
from raykeras.worker.coordinator import LocalStepBarrier, RunCoordinator
from raykeras.worker.entry import Packed
from raykeras.worker.job import Outcome, TrainJob

TRACEBACK_FILE = "traceback.txt"


def train_job(
    job: TrainJob,
    model: Any,
    callbacks: list[Any],
    packed: Packed | None,
    handlers: Sequence[Callable[[Event], None]],
    first_events: Sequence[Event],
    interrupt: Interrupt,
    decisions: EpochDecisions,
) -> tuple[Outcome, Any]:
    """Train a job to its end, and dispatch its events.

    Args:
        job: Job of the first attempt.
        model: The user's model, or the function that builds it.
        callbacks: Keras callbacks, which run on the workers.
        packed: Pickled model and callbacks for worker processes; None if this process is the worker.
        handlers: Functions to call with each event.
        first_events: Events from before training, to dispatch first.
        interrupt: Handles signals during training.
        decisions: Decides after each epoch whether training goes on.

    Returns:
        The chief's outcome, and the trained model if it is in this process.
    """
    dispatcher = EventDispatcher([interrupt.watch, *handlers], job.start)
    for event in first_events:
        dispatcher.send(event)

    @contextlib.contextmanager
    def steer(workers: LocalStepBarrier | RunCoordinator) -> Iterator[None]:
        with interrupt.forwarding_to(workers.request), decisions.forwarding_to(workers.answer):
            yield

    def attempt(job: TrainJob) -> tuple[Outcome, Any]:
        if packed is None:
            return fit_here(job, model, callbacks, dispatcher, steer)
        return fit_on_workers(job, model, callbacks, packed, dispatcher, steer)

    status, logs, history = "failed", {}, {}
    try:
        with interrupt.handled():
            outcome, live_model = run_attempts(job, attempt, dispatcher.send, interrupt)
        status = "interrupted" if outcome.preempted else "completed"
        logs = {name: values[-1] for name, values in outcome.history.items() if values}
        history = {**outcome.history, "epoch": outcome.epoch}
    except (KeyboardInterrupt, SystemExit):
        status = "interrupted"
        raise
    except Exception as error:
        _write_traceback(job.folder, error)
        raise
    finally:
        dispatcher.close(events.RunEnded(status=status, logs=logs, history=history))
    dispatcher.raise_failure()
    return outcome, live_model


def _write_traceback(folder: RunFolder, error: Exception) -> None:
    """Write the full traceback of an exception to the run's folder. Never raises."""
    text = redacted("".join(traceback.format_exception(error)))
    if isinstance(error, UserCodeError) and error.full_traceback:
        text = error.full_traceback
    with contextlib.suppress(Exception):
        with folder.fs.open(folder / TRACEBACK_FILE, "w") as file:
            file.write(text)
        if isinstance(error, UserCodeError):
            error.traceback_file = folder / TRACEBACK_FILE
