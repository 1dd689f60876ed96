"""Restart the workers of a run after failures, until it ends.

Every attempt continues from the newest complete checkpoint. Ray Train starts the workers and detects lost ones.
Failures are counted here, because Ray Train counts all failures of a run, and `Run.max_failures` limits only those
without a new checkpoint between them.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

from raykeras.checkpoint.store import FOLDER, Checkpoint, RunFolder
from raykeras.core import events
from raykeras.core.errors import CheckpointError, OptionError, WorkerLostError
from raykeras.core.events import Event
from raykeras.data.streaming.resources import plan_budget
from raykeras.driver import worker_pool
from raykeras.driver.elastic import wait_for_capacity
from raykeras.driver.interrupt import Interrupt
from raykeras.worker.job import Outcome, Resumption, TrainJob

_BACKOFF_S = (0.0, 1.0, 5.0, 20.0)
"""Pause before the next attempt, by the number of consecutive failures without a new checkpoint."""


_SET_ASIDE_PREFIX = "checkpoints-before-"


Attempt = Callable[[TrainJob], tuple[Outcome, Any]]
"""Runs a job until training ends or is preempted; returns the outcome, and the model if it is in this process."""


def train(job: TrainJob, attempt: Attempt, send: Callable[[Event], None], interrupt: Interrupt) -> tuple[Outcome, Any]:
    """Run attempts until training ends or is interrupted.

    Args:
        job: Job of the first attempt.
        attempt: Function that runs one attempt.
        send: Function that sends an event.
        interrupt: Tells whether a signal was received, after which no attempt is started.

    Returns:
        The chief's outcome, and the trained model if it is in this process.

    Raises:
        WorkerLostError: If workers are lost more often than `Run.max_failures` allows.
        RaykerasError: If an attempt fails in a way that a restart would repeat.
    """
    failures = 0
    while True:
        send(events.PhaseStarted(phase="workers"))
        is_elastic = job.requested_scale.is_elastic
        if is_elastic or (job.attempt and not worker_pool.prepare(job.scale, job.budget.cpus_per_worker)):
            job = _rescaled(job, send, was_preempted=failures == 0)
        try:
            outcome, live_model = attempt(job)
        except WorkerLostError as error:
            resumption = _newest_resumption(job, send)
            failures = failures + 1 if resumption == job.resumption else 1
            is_final = failures > job.run.max_failures or interrupt.is_requested or not job.train.can_restart
            send(_failure_event(error, resumption, is_final))
            if is_final:
                raise _final_error(error, job, failures) from None
            time.sleep(_BACKOFF_S[min(failures - 1, len(_BACKOFF_S) - 1)])
        else:
            if not outcome.preempted or interrupt.is_requested:
                return outcome, live_model
            resumption, failures = _newest_resumption(job, send), 0
        job = dataclasses.replace(_resume_from(job, resumption), attempt=job.attempt + 1)


def _rescaled(job: TrainJob, send: Callable[[Event], None], was_preempted: bool) -> TrainJob:
    """Wait for capacity, and return the job with the number of workers that the cluster can start."""
    workers = wait_for_capacity(job)
    job = dataclasses.replace(job, budget=plan_budget(job.budget.cpus_per_worker, workers))
    if not job.attempt:
        return dataclasses.replace(job, scale=job.scale.with_workers(workers))
    if workers != job.scale.workers:
        send(events.WorldResized(workers=workers, before=job.scale.workers))
        return dataclasses.replace(job, scale=job.scale.with_workers(workers))
    if was_preempted:  # to grow, but the capacity was gone: wait longer before the next try
        return dataclasses.replace(job, grow_after_s=4 * job.grow_after_s)
    return job


def _failure_event(error: WorkerLostError, resumption: Resumption | None, is_final: bool) -> Event:
    if is_final:
        next_step = "the run fails"
    elif resumption is None or resumption.weights_only:
        next_step = "training starts over"
    else:
        next_step = f"training continues from epoch {resumption.epoch + 1}, step {resumption.step}"
    position = {} if resumption is None else {"epoch": resumption.epoch, "step": resumption.step}
    cause = error.reason or str(error)
    return events.WorkerFailed(rank=error.rank, node=error.node, cause=cause, next=next_step, **position)


def _final_error(error: WorkerLostError, job: TrainJob, failures: int) -> WorkerLostError:
    why = f"This was failure {failures} without a new checkpoint; `max_failures` is {job.run.max_failures}."
    if not job.train.can_restart:
        why = (
            "Workers cannot be restarted in this process, because the data is a generator, or a Sequence with "
            "`on_epoch_begin` or `on_epoch_end`, which cannot be iterated again from its beginning."
        )
    final = WorkerLostError(
        f"{error} {why} Call `fit` again to resume the run in {job.folder.path!r}; its events are in "
        f"{job.folder.path}/events.jsonl."
    )
    final.rank, final.node, final.reason = error.rank, error.node, error.reason
    return final


def _newest_resumption(job: TrainJob, send: Callable[[Event], None]) -> Resumption | None:
    """Return the position of the newest checkpoint, or that of the job if nothing has been saved since."""
    checkpoint = _newest_checkpoint(job.folder, send)
    if checkpoint is None:
        return job.resumption
    state = checkpoint.state
    return Resumption(checkpoint.path, int(state["epoch"]), int(state["step"]))


def _newest_checkpoint(folder: RunFolder, send: Callable[[Event], None]) -> Checkpoint | None:
    """Return the newest complete checkpoint; send an event for each damaged one."""

    def report_damaged(checkpoint: Checkpoint, error: CheckpointError) -> None:
        send(events.CheckpointDamaged(path=checkpoint.path, cause=str(error)))

    return folder.newest_complete(report_damaged)


def resumed(job: TrainJob, send: Callable[[Event], None]) -> TrainJob:
    """Return the job, resumed from the newest checkpoint if its folder holds one.

    Args:
        job: Job of a run, from its beginning.
        send: Function that sends an event.

    Raises:
        OptionError: If the data, order or seed differ from those that the run started with.
    """
    checkpoint = _newest_checkpoint(job.folder, send)
    if checkpoint is None:
        return job
    if job.run.resume == "weights":
        path = _set_aside(job.folder, checkpoint)
        return dataclasses.replace(job, resumption=Resumption(path, weights_only=True))
    state = checkpoint.state
    saved_position: Mapping[str, Any] = state["position"]
    job = dataclasses.replace(job, train=job.train.with_shards(saved_position))
    position = job.position
    names = [name for name in {**saved_position, **position} if name != "fingerprint_parts"]
    changed = [name for name in names if saved_position.get(name) != position.get(name)]
    if changed:
        changes = "; ".join(_describe_change(name, saved_position, job) for name in changed)
        raise OptionError(
            f"A run must resume with the data, order and seed that it started with; since {checkpoint.path!r} "
            f'{changes}. Restore them, take only the weights with `Run(resume="weights")`, or choose another `name`.'
        )
    return _resume_from(job, Resumption(checkpoint.path, int(state["epoch"]), int(state["step"])))


def _describe_change(name: str, saved_position: Mapping[str, Any], job: TrainJob) -> str:
    if name == "fingerprint" and (change := job.train.what_changed(saved_position)) is not None:
        return change
    return f"{name} was {saved_position.get(name)!r} and is now {job.position.get(name)!r}"


def _resume_from(job: TrainJob, resumption: Resumption | None) -> TrainJob:
    """Return the job for the steps after a checkpoint."""
    train = job.train if resumption is None else job.train.skip_to(resumption.epoch, resumption.step)
    return dataclasses.replace(job, train=train, resumption=resumption)


def _set_aside(folder: RunFolder, checkpoint: Checkpoint) -> str:
    """Move the checkpoints of a run aside, before training starts over with the weights of one.

    Returns:
        The new path of the checkpoint.
    """
    number = 1
    while folder.fs.exists(folder / f"{_SET_ASIDE_PREFIX}{number}"):
        number += 1
    target = folder / f"{_SET_ASIDE_PREFIX}{number}"
    folder.fs.mv(folder / FOLDER, target, recursive=True)
    return f"{target}/{checkpoint.path.rsplit('/', 1)[-1]}"
