"""Trains a run to its end, whatever happens to its workers.

Enters: orders. Leaves: the chief's `Outcome`. Each attempt goes on from the newest whole checkpoint. Ray Train starts
the workers and notices that one is gone; how often a run may fail is counted here, since Ray Train counts all
failures of a run, and only those count that follow each other without a checkpoint between them.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

from raykeras import events
from raykeras.checkpoint import FOLDER, Checkpoint, RunFolder
from raykeras.cluster import room_beside
from raykeras.errors import CheckpointError, OptionError, WorkerLostError
from raykeras.events import Event
from raykeras.interrupt import Interrupt
from raykeras.orders import BatchOrders, DataOrders, Orders, Outcome, Resumption
from raykeras.pump import may_change
from raykeras.sources import what_changed
from raykeras.world import wait_for_room

_BACKOFF_S = (0.0, 1.0, 5.0, 20.0)
"""Pauses before the attempts that follow failures without progress."""

_KEPT_BESIDE = "checkpoints-before-"

Attempt = Callable[[Orders], tuple[Outcome, Any]]
"""Trains by orders until the end, or until the workers are asked to leave; gives the model if it is here."""


def train(orders: Orders, attempt: Attempt, send: Callable[[Event], None], interrupt: Interrupt) -> tuple[Outcome, Any]:
    """Makes attempts until one comes to its end.

    Args:
        orders: Of the first attempt.
        attempt: Makes one.
        send: Takes events.
        interrupt: After which no further attempt is made.

    Raises:
        WorkerLostError: If workers failed too often without a checkpoint between.
        RaykerasError: What an attempt raised that another one would raise, too.
    """
    failures = 0
    while True:
        if orders.attempt or orders.widest.least < orders.widest.workers:
            orders = _fitted(orders, send, has_left=failures == 0)
        try:
            outcome, live = attempt(orders)
        except WorkerLostError as error:
            resumption = newest(orders, send)
            failures = failures + 1 if resumption == orders.resumption else 1
            gives_up = failures > orders.run.max_failures or interrupt.is_requested or not _can_begin_again(orders)
            send(_failed(error, orders, resumption, gives_up))
            if gives_up:
                raise _gave_up(error, orders, failures) from None
            time.sleep(_BACKOFF_S[min(failures - 1, len(_BACKOFF_S) - 1)])
        else:
            if not outcome.left or interrupt.is_requested:
                return outcome, live
            resumption, failures = newest(orders, send), 0
        orders = dataclasses.replace(going_on(orders, resumption), attempt=orders.attempt + 1)


def _fitted(orders: Orders, send: Callable[[Event], None], has_left: bool) -> Orders:
    """With as many workers as there is room for, which may have to be waited for."""
    workers = wait_for_room(orders)
    orders = dataclasses.replace(orders, room=room_beside(orders.room.cpus_per_worker, workers))
    if not orders.attempt:
        return dataclasses.replace(orders, scale=orders.scale.of(workers))
    if workers != orders.scale.workers:
        send(events.WorldResized(workers=workers, before=orders.scale.workers))
        return dataclasses.replace(orders, scale=orders.scale.of(workers))
    if has_left:  # for room that was none after all, which is not tried again at once
        return dataclasses.replace(orders, grow_after_s=4 * orders.grow_after_s)
    return orders


def _failed(error: WorkerLostError, orders: Orders, resumption: Resumption | None, gives_up: bool) -> Event:
    if gives_up:
        follows = "the run fails"
    elif resumption is None or resumption.weights_only:
        follows = "training begins again"
    else:
        follows = f"training goes on from epoch {resumption.epoch + 1}, step {resumption.step}"
    where = {} if resumption is None else {"epoch": resumption.epoch, "step": resumption.step}
    cause = error.reason or str(error)
    return events.WorkerFailed(rank=error.rank, node=error.node, cause=cause, next=follows, **where)


def _gave_up(error: WorkerLostError, orders: Orders, failures: int) -> WorkerLostError:
    why = f"It was failure {failures} without a new checkpoint; `max_failures` is {orders.run.max_failures}."
    if not _can_begin_again(orders):
        why = "Its batches cannot be made again in this process: they come from a generator, or its hooks change them."
    raised = WorkerLostError(
        f"{error} {why} Call `fit` again for the run to go on in {orders.folder.path!r}; its events are in "
        f"{orders.folder.path}/events.jsonl."
    )
    raised.rank, raised.node, raised.reason = error.rank, error.node, error.reason
    return raised


def newest(orders: Orders, send: Callable[[Event], None]) -> Resumption | None:
    """Where a further attempt goes on; where the first one did, if nothing was saved since."""
    found = newest_whole(orders.folder, send)
    if found is None:
        return orders.resumption
    state = found.state
    return Resumption(found.path, int(state["epoch"]), int(state["step"]))


def newest_whole(folder: RunFolder, send: Callable[[Event], None]) -> Checkpoint | None:
    """The newest checkpoint that is whole; each damaged one is told of."""

    def damaged(checkpoint: Checkpoint, error: CheckpointError) -> None:
        send(events.CheckpointDamaged(path=checkpoint.path, cause=str(error)))

    return folder.newest_whole(damaged)


def resumed(orders: Orders, send: Callable[[Event], None]) -> Orders:
    """The orders of a run that goes on where its folder holds checkpoints.

    Raises:
        OptionError: If what was asked for now is not what the run began with; both sides, and what to do.
    """
    found = newest_whole(orders.folder, send)
    if found is None:
        return orders
    if orders.run.resume == "weights":
        kept = _set_aside(orders.folder, found)
        return dataclasses.replace(orders, resumption=Resumption(kept, weights_only=True))
    state = found.state
    theirs: Mapping[str, Any] = state["position"]
    orders = dataclasses.replace(orders, train=orders.train.cut_as(theirs))
    ours = orders.position
    told = [name for name in {**theirs, **ours} if name != "fingerprint_parts"]
    differ = [name for name in told if theirs.get(name) != ours.get(name)]
    if differ:
        sides = "; ".join(_difference(name, theirs, orders) for name in differ)
        raise OptionError(
            f"A run goes on with the data, order and seed that it began with; since {found.path!r} {sides}. Make them "
            'the same, or take only its weights with `Run(resume="weights")`, or give the run another `name`.'
        )
    return going_on(orders, Resumption(found.path, int(state["epoch"]), int(state["step"])))


def _difference(name: str, theirs: Mapping[str, Any], orders: Orders) -> str:
    if name == "fingerprint" and "fingerprint_parts" in theirs and isinstance(orders.train, DataOrders):
        return what_changed(theirs["fingerprint_parts"], orders.train.opened)
    return f"{name} was {theirs.get(name)!r} and is now {orders.position.get(name)!r}"


def going_on(orders: Orders, resumption: Resumption | None) -> Orders:
    """The orders for what follows a checkpoint."""
    train = orders.train
    if resumption is not None and isinstance(train, BatchOrders):
        is_whole = resumption.step == orders.num_steps
        passed = (resumption.epoch + 1, 0) if is_whole else (resumption.epoch, resumption.step)
        train = dataclasses.replace(train, passed=passed)
    return dataclasses.replace(orders, train=train, resumption=resumption)


def _can_begin_again(orders: Orders) -> bool:
    """Whether the data can be had once more from its beginning, in this process."""
    if not isinstance(orders.train, BatchOrders):
        return True
    batches = orders.train.batches
    return batches.kind != "generator" and not (batches.kind == "sequence" and may_change(batches.data))


def _set_aside(folder: RunFolder, found: Checkpoint) -> str:
    """Moves a run's checkpoints away, from which another training takes only the weights; gives the new path."""
    number = 1
    while folder.fs.exists(folder / f"{_KEPT_BESIDE}{number}"):
        number += 1
    target = folder / f"{_KEPT_BESIDE}{number}"
    folder.fs.mv(folder / FOLDER, target, recursive=True)
    return f"{target}/{found.path.rsplit('/', 1)[-1]}"
