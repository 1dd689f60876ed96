"""The functions that Ray Train runs on each worker, and the contexts around a training."""

from __future__ import annotations

import contextlib
import dataclasses
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from raykeras.checkpoint.model_io import unpack_model
from raykeras.checkpoint.writer import AsyncCheckpointWriter
from raykeras.compat.keras_api import KerasAPI
from raykeras.compat.quiet import import_tensorflow, quiet
from raykeras.core.error_context import loading
from raykeras.core.events import EventSender
from raykeras.core.logs import Logs
from raykeras.core.temporary import remove_abandoned
from raykeras.data.streaming.resources import discover_budget
from raykeras.worker.callback_placement import Artifacts, OnChief, placed, states_of, unwrapped
from raykeras.worker.coordinator import StepBarrier
from raykeras.worker.job import Outcome, TrainJob
from raykeras.worker.watchdog import Watchdog, end_process


@dataclass(frozen=True)
class Packed:
    """A model and callbacks, pickled for workers.

    Attributes:
        api: The model's Keras package.
        build: Pickled function that returns the model.
        callbacks: Pickled callbacks.
        in_place: Whether the trained variables are loaded into a model of the driver.
    """

    api: KerasAPI
    build: bytes
    callbacks: bytes
    in_place: bool


@contextlib.contextmanager
def event_sender(put: Any) -> Iterator[Any]:
    """Yield a function that sends events; all are sent when the block ends.

    Args:
        put: Takes a list of events.
    """
    sender = EventSender(put)
    try:
        yield sender.send
    finally:
        sender.close()


@contextlib.contextmanager
def checkpoint_writer(job: TrainJob, send: Any) -> Iterator[AsyncCheckpointWriter]:
    """Yield the checkpoint writer of a run, and stop it when the block ends.

    Args:
        job: Job of the run.
        send: Sends events.
    """
    writer = AsyncCheckpointWriter(job.folder, job.token, job.run, send)
    try:
        yield writer
    except Exception:  # no KeyboardInterrupt: a second Ctrl-C does not wait for the writer
        writer.stop()
        raise
    writer.stop()


@contextlib.contextmanager
def watched_steps(job: TrainJob, rank: int, report: Any, end: Any) -> Iterator[Any]:
    """Watch the steps of a worker while the block runs; yield the function to call after each step.

    Yields None if the run has no `hang_timeout_s`.

    Args:
        job: Job of the run.
        rank: Rank of the worker.
        report: As for `Watchdog`.
        end: As for `Watchdog`.
    """
    if job.run.hang_timeout_s is None:
        yield None
        return
    name = f"attempt-{job.attempt}-rank-{rank}"
    watchdog = Watchdog(job.run.hang_timeout_s, job.folder, name, report, end)
    try:
        yield watchdog.heartbeat
    finally:
        watchdog.close()


def train_on_worker(config: dict[str, Any]) -> Outcome | None:
    """Run a training job on this worker of Ray Train. TensorFlow is imported here, not in Ray Train's controller.

    Args:
        config: "task" is a reference to a `TrainJob`, a `Packed`, and whether the driver has TensorFlow loaded;
            "coordinator" is the run's `RunCoordinator`.

    Returns:
        The outcome on the chief; None on other ranks.
    """
    quiet()
    import_tensorflow()
    import ray
    import ray.train
    from ray import cloudpickle
    from ray.train.collective import broadcast_from_rank_zero

    from raykeras.worker import train as worker
    from raykeras.worker.session import WorkerContext

    rank = ray.train.get_context().get_world_rank()
    with loading(rank):
        job, packed, driver_has_keras = ray.get(config["task"])
        callbacks = cloudpickle.loads(packed.callbacks)
    remove_abandoned()
    coordinator = config["coordinator"]
    coordinator.join(rank, node=socket.gethostname(), node_id=ray.get_runtime_context().get_node_id())
    if job.train.uses_ray_data or (job.validation is not None and job.validation.uses_ray_data):
        job = dataclasses.replace(job, budget=discover_budget(job.budget, rank))
    artifacts = Artifacts(job.folder) if rank == 0 else None
    with contextlib.ExitStack() as stack:
        if artifacts is not None:
            stack.callback(artifacts.close)
        send = stack.enter_context(event_sender(coordinator.put))
        heartbeat = stack.enter_context(
            watched_steps(job, rank, lambda text: coordinator.note(rank, wrong=text), end_process)
        )
        context = WorkerContext(
            rank=rank,
            callbacks=placed(callbacks, artifacts.path if artifacts else None, broadcast_from_rank_zero),
            send=send,
            writer=stack.enter_context(checkpoint_writer(job, send)) if rank == 0 else None,
            step_control=StepBarrier(coordinator, rank),
            await_answer=coordinator.await_answer,
            artifacts=artifacts,
            heartbeat=heartbeat,
            states=lambda chief_callbacks: states_of(chief_callbacks, driver_has_keras),
            return_variables=packed.in_place,
        )
        outcome = worker.run(job, context, api=packed.api, build=lambda: unpack_model(packed.build, rank))
    return outcome if rank == 0 else None


def evaluate_on_worker(config: dict[str, Any]) -> tuple[Logs, list[Any], list[dict[str, bytes]]]:
    """Run an evaluation job on this worker of Ray Train.

    Args:
        config: "task" is a reference to an `EvaluationJob`, the model's Keras package, the pickled function that
            returns the model, pickled callbacks, and whether the driver has TensorFlow loaded.

    Returns:
        Logs and values as `raykeras.worker.train.evaluate` returns them, and the callbacks' states, which are empty
        on all ranks but the chief.
    """
    quiet()
    import_tensorflow()
    import ray
    import ray.train
    from ray import cloudpickle

    from raykeras.worker import train as worker

    rank = ray.train.get_context().get_world_rank()
    with loading(rank):
        job, api, build, packed, driver_has_keras = ray.get(config["task"])
        all_callbacks = cloudpickle.loads(packed)
    if job.data.uses_ray_data:
        job = dataclasses.replace(job, budget=discover_budget(job.budget, rank))
    callbacks = unwrapped(all_callbacks if rank == 0 else [c for c in all_callbacks if not isinstance(c, OnChief)])
    logs, values = worker.evaluate(
        job, rank=rank, api=api, build=lambda: unpack_model(build, rank), callbacks=callbacks
    )
    return logs, values, states_of(callbacks, driver_has_keras) if rank == 0 else []
