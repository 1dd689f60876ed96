"""Starts one attempt to train a run and waits for it.

Enters: the orders, the model, the callbacks. Leaves: the chief's `Outcome`, and the model if it is in
this process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from raykeras.agreement import Agreement, Alone
from raykeras.artifacts import Artifacts
from raykeras.cluster import room_found
from raykeras.data import for_workers, in_memory
from raykeras.desk import Desk
from raykeras.errors import WorkerLostError, loading
from raykeras.events import EventSender
from raykeras.gathering import Gathering, forwarding
from raykeras.group import run_here, run_on_workers
from raykeras.interrupt import Interrupt
from raykeras.keras_api import KerasAPI, api_of
from raykeras.noise import import_tensorflow, quiet
from raykeras.orders import Orders, Outcome
from raykeras.placement import hand_back, named, pack, placed, states_of
from raykeras.saving import Keeper
from raykeras.temporary import remove_abandoned
from raykeras.transfer import is_model, load_model, pack_model, put_back, save_model, unpack_model
from raykeras.watch import Watch, end_process
from raykeras.world import watched_world


def fit_here(
    orders: Orders, model: Any, callbacks: list[Any], gathered: Gathering, interrupt: Interrupt
) -> tuple[Outcome, Any]:
    """One worker in this process."""
    import_tensorflow()
    from raykeras import worker
    from raykeras.training import Links

    api, _ = pack_model(model, lazily=True)
    # variables must be made under the strategy; for those of Keras 3 see `raykeras.mirroring`
    rebuild = is_model(model) and api.is_legacy and orders.scale.replicas > 1
    saved = save_model(model, api) if rebuild else None
    kept: list[Any] = []

    def build_and_keep() -> Any:
        if saved is not None:
            made = load_model(saved, api)
        elif is_model(model):
            made = model
        else:  # called as it is, so that breakpoints and closures work
            made = model()
        kept.append(made)
        return made

    def work() -> Outcome:
        points = Alone()
        with contextlib.ExitStack() as stack:
            send = stack.enter_context(_sending(gathered.queue.put))
            beat = stack.enter_context(_watched(orders, 0, lambda text: None, None))
            keeper = stack.enter_context(_keeping(orders, send))
            links = Links(
                rank=0,
                callbacks=contextlib.nullcontext(named(callbacks)),
                send=send,
                keeper=keeper,
                points=points,
                beat=beat,
                return_variables=rebuild,
            )
            stack.enter_context(interrupt.reaching(points.call))
            return worker.run(orders, links, api=api, build=build_and_keep)

    outcome = run_here(work)
    if outcome.variables is not None:
        put_back(model, api, outcome.variables, orders.train.layout)
        return outcome, model
    is_strategys = orders.scale.replicas > 1 and api_of(kept[-1]).is_legacy  # no other one can use it
    return outcome, None if is_strategys else kept[-1]


@contextlib.contextmanager
def _sending(put: Any) -> Iterator[Any]:
    """What takes events; all are sent when it is left."""
    sender = EventSender(put)
    try:
        yield sender.send
    finally:
        sender.close()


@contextlib.contextmanager
def _keeping(orders: Orders, send: Any) -> Iterator[Keeper]:
    """What writes checkpoints."""
    keeper = Keeper(orders.folder, orders.token, orders.run, send)
    try:
        yield keeper
    except Exception:  # after a second Ctrl-C, which is none, nothing is waited for
        keeper.stop()
        raise
    keeper.stop()


@contextlib.contextmanager
def _watched(orders: Orders, rank: int, tell: Any, leave: Any) -> Iterator[Any]:
    """What is called at every step of a worker that is watched; None where it is not."""
    if orders.run.hang_timeout_s is None:
        yield None
        return
    name = f"attempt-{orders.attempt}-rank-{rank}"
    watch = Watch(orders.run.hang_timeout_s, orders.folder, name, tell, leave)
    try:
        yield watch.beat
    finally:
        watch.close()


@dataclass(frozen=True)
class Packed:
    """A model and callbacks, pickled for workers.

    Attributes:
        api: The model's Keras.
        build: Pickled function that makes the model.
        callbacks: Pickled.
        in_place: Whether the trained variables go back into a model of this process.
    """

    api: KerasAPI
    build: bytes
    callbacks: bytes
    in_place: bool


def pack_for_workers(model: Any, callbacks: list[Any]) -> Packed:
    """Raises ValidationError if either cannot go to workers."""
    from ray import cloudpickle

    return Packed(*pack_model(model), pack(callbacks, cloudpickle.dumps), is_model(model))


def fit_on_workers(
    orders: Orders, model: Any, callbacks: list[Any], packed: Packed, gathered: Gathering, interrupt: Interrupt
) -> tuple[Outcome, Any]:
    """Workers in processes of their own."""
    import ray
    from ray import cloudpickle

    scale, room, desk = orders.scale, orders.room, Desk(orders.scale.workers)
    with contextlib.ExitStack() as stack:
        train, validation = (
            stack.enter_context(for_workers(o, scale.workers, room.cpus_per_task))
            for o in (orders.train, orders.validation)
        )
        shared = dataclasses.replace(orders, train=train, validation=validation)
        stack.enter_context(forwarding(desk, gathered))
        stack.enter_context(interrupt.reaching(desk.call))
        stack.enter_context(watched_world(orders, desk))
        try:
            outcome = run_on_workers(
                _work,
                # through the store: references inside of a pickle of our own would never be let go
                {"task": ray.put((shared, packed, "tensorflow" in sys.modules)), "desk": desk},
                scale=scale,
                cpus_per_worker=room.cpus_per_worker,
                folder=orders.folder,
                waits=orders.widest.least == orders.widest.workers,
            )
        except WorkerLostError as error:
            raise _explained(error, desk) from None
    hand_back(callbacks, outcome.callback_states, cloudpickle.loads)
    if packed.in_place:
        put_back(model, packed.api, outcome.variables, orders.train.layout)
    return outcome, model if packed.in_place else None


def _explained(error: WorkerLostError, desk: Desk) -> WorkerLostError:
    """The error with what the workers themselves said: where they ran, and what was wrong."""
    try:
        notes = desk.notes()
    except Exception:  # the desk's node is gone, too
        return error
    rank = next((rank for rank, facts in sorted(notes.items()) if "wrong" in facts), error.rank)
    facts = notes.get(-1 if rank is None else rank, {})
    made = error
    if "wrong" in facts:
        made = WorkerLostError(f"The worker of rank {rank} hung: {facts['wrong']}.")
    made.rank, made.node, made.reason = rank, facts.get("node", ""), facts.get("wrong", error.reason)
    return made


def _work(config: dict[str, Any]) -> Outcome | None:
    """What runs on each worker: the first line that imports TensorFlow."""
    quiet()
    import_tensorflow()
    import ray
    import ray.train
    from ray import cloudpickle
    from ray.train.collective import broadcast_from_rank_zero

    from raykeras import worker
    from raykeras.training import Links

    rank = ray.train.get_context().get_world_rank()
    with loading(rank):
        orders, packed, keras_there = ray.get(config["task"])
        callbacks = cloudpickle.loads(packed.callbacks)
    remove_abandoned()
    desk = config["desk"]
    desk.note(rank, node=socket.gethostname(), node_id=ray.get_runtime_context().get_node_id())
    if not in_memory([orders.train, orders.validation]):
        orders = dataclasses.replace(orders, room=room_found(orders.room, rank))
    artifacts = Artifacts(orders.folder)
    with contextlib.ExitStack() as stack:
        stack.callback(artifacts.close)
        send = stack.enter_context(_sending(desk.put)) if rank == 0 else None
        beat = stack.enter_context(_watched(orders, rank, lambda text: desk.note(rank, wrong=text), end_process))
        links = Links(
            rank=rank,
            callbacks=placed(callbacks, rank, artifacts.path, broadcast_from_rank_zero),
            send=send,
            keeper=stack.enter_context(_keeping(orders, send)) if send else None,
            points=Agreement(desk, rank),
            artifacts=artifacts if rank == 0 else None,
            beat=beat,
            states=lambda mine: states_of(mine, keras_there),
            return_variables=packed.in_place,
        )
        outcome = worker.run(orders, links, api=packed.api, build=lambda: unpack_model(packed.build, rank))
    return outcome if rank == 0 else None
