"""Start the workers of one training attempt, and wait for them to finish."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from raykeras.checkpoint.model_io import is_model, pack_model
from raykeras.compat.keras_api import api_of
from raykeras.compat.quiet import import_tensorflow
from raykeras.core.errors import WorkerLostError
from raykeras.driver.elastic import watched_capacity
from raykeras.driver.event_log import EventDispatcher, forwarding
from raykeras.driver.worker_group import run_here
from raykeras.driver.worker_pool import run_on_workers
from raykeras.worker.callback_placement import named, pack, restore_callbacks
from raykeras.worker.coordinator import LocalStepBarrier, RunCoordinator
from raykeras.worker.entry import Packed, checkpoint_writer, event_sender, train_on_worker, watched_steps
from raykeras.worker.job import Outcome, TrainJob

Steer = Callable[[LocalStepBarrier | RunCoordinator], AbstractContextManager[None]]
"""Forwards signals and the decisions of driver callbacks to the workers while a block runs."""


def fit_here(
    job: TrainJob, model: Any, callbacks: list[Any], dispatcher: EventDispatcher, steer: Steer
) -> tuple[Outcome, Any]:
    """Train with one worker in this process.

    Args:
        job: The job to run.
        model: A compiled model, or a function that builds one.
        callbacks: Keras callbacks.
        dispatcher: Receives the events.
        steer: Connects the worker to what may end its training.

    Returns:
        The outcome, and the trained model; None in its place if the model cannot be used outside of its strategy.
    """
    import_tensorflow()
    from raykeras.worker import train
    from raykeras.worker.session import WorkerContext

    api, _ = pack_model(model, lazily=True)
    models: list[Any] = []

    def build_and_keep() -> Any:
        # A function is called directly and not from a pickle, so that breakpoints and closures work.
        built = model if is_model(model) else model()
        models.append(built)
        return built

    def work() -> Outcome:
        step_control = LocalStepBarrier()
        with contextlib.ExitStack() as stack:
            send = stack.enter_context(event_sender(dispatcher.queue.put))
            heartbeat = stack.enter_context(watched_steps(job, 0, lambda text: None, None))
            writer = stack.enter_context(checkpoint_writer(job, send))
            context = WorkerContext(
                rank=0,
                callbacks=contextlib.nullcontext(named(callbacks)),
                send=send,
                writer=writer,
                step_control=step_control,
                await_answer=step_control.await_answer,
                heartbeat=heartbeat,
            )
            stack.enter_context(steer(step_control))
            return train.run(job, context, api=api, build=build_and_keep)

    outcome = run_here(work)
    has_strategy = not is_model(model) and job.scale.local_replicas > 1
    return outcome, None if has_strategy and not api_of(models[-1]).can_leave_strategy else models[-1]


def pack_for_workers(model: Any, callbacks: list[Any]) -> Packed:
    """Pickle a model and callbacks for worker processes.

    Raises:
        ValidationError: If one of them cannot be sent to the workers.
    """
    from ray import cloudpickle

    return Packed(*pack_model(model), pack(callbacks, cloudpickle.dumps), is_model(model))


def fit_on_workers(
    job: TrainJob, model: Any, callbacks: list[Any], packed: Packed, dispatcher: EventDispatcher, steer: Steer
) -> tuple[Outcome, Any]:
    """Train with worker processes.

    Args:
        job: The job to run.
        model: The user's model, or the function that builds it. A compiled model receives the trained variables.
        callbacks: Keras callbacks, which receive the attributes of the chief's.
        packed: The pickled model and callbacks.
        dispatcher: Receives the events.
        steer: Connects the workers to what may end their training.

    Returns:
        The chief's outcome, and the model if it was trained in place.

    Raises:
        WorkerLostError: If a worker is lost or hangs.
        RaykerasError: If a worker raises an exception.
    """
    import ray
    from ray import cloudpickle

    scale, budget, coordinator = job.scale, job.budget, RunCoordinator(job.scale.workers)
    with contextlib.ExitStack() as stack:
        cpus = budget.cpus_per_task
        train = stack.enter_context(job.train.for_workers(scale.workers, cpus))
        validation = job.validation and stack.enter_context(job.validation.for_workers(scale.workers, cpus))
        shared = dataclasses.replace(job, train=train, validation=validation)
        stack.enter_context(forwarding(coordinator, dispatcher))
        stack.enter_context(steer(coordinator))
        stack.enter_context(watched_capacity(job, coordinator))
        try:
            outcome = run_on_workers(
                train_on_worker,
                # in the object store, because object references inside a pickle are never released
                {"task": ray.put((shared, packed, "tensorflow" in sys.modules)), "coordinator": coordinator},
                scale=scale,
                cpus_per_worker=budget.cpus_per_worker,
                api=packed.api,
                waits=not job.requested_scale.is_elastic,
                stay=not job.requested_scale.is_elastic,
                spares=_needs_spares(job),
            )
        except WorkerLostError as error:
            raise _with_notes(error, coordinator) from None
    restore_callbacks(callbacks, outcome.callback_states, cloudpickle.loads)
    if packed.in_place:
        from raykeras.distribute.build import load_variables  # imports TensorFlow

        load_variables(model, packed.api, outcome.named_values, job.train.batch_spec)
    return outcome, model if packed.in_place else None


def _needs_spares(job: TrainJob) -> bool:
    is_restarted = job.run.max_failures > 0 and job.train.can_restart
    return job.scale.spares and is_restarted and not job.requested_scale.is_elastic


def _with_notes(error: WorkerLostError, coordinator: RunCoordinator) -> WorkerLostError:
    """Return the error with what the workers reported to the coordinator: their nodes, and a hang."""
    try:
        notes = coordinator.notes()
    except Exception:  # the coordinator's node was lost
        return error
    rank = next((rank for rank, facts in sorted(notes.items()) if "wrong" in facts), error.rank)
    facts = notes.get(-1 if rank is None else rank, {})
    result = error
    if "wrong" in facts:
        result = WorkerLostError(f"The worker of rank {rank} hangs: {facts['wrong']}.")
    result.rank, result.node, result.reason = rank, facts.get("node", ""), facts.get("wrong", error.reason)
    return result
