"""Starts the training of a run and waits for it.

Enters: the orders, the model, the callbacks. Leaves: the chief's `Outcome`, and the model if it is in
this process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from dataclasses import dataclass
from typing import Any

from raykeras.artifacts import Artifacts
from raykeras.data import for_workers
from raykeras.desk import Desk
from raykeras.events import EventSender
from raykeras.gathering import Gathering, forwarding
from raykeras.group import run_here, run_on_workers
from raykeras.keras_api import KerasAPI
from raykeras.noise import import_tensorflow, quiet
from raykeras.orders import Orders, Outcome
from raykeras.placement import hand_back, pack, placed, states_of, unwrapped
from raykeras.saving import save_locally, save_through_ray_train
from raykeras.stopping import Agreement
from raykeras.transfer import is_model, load_model, pack_model, put_back, save_model


def fit_here(orders: Orders, model: Any, callbacks: list[Any], gathered: Gathering) -> tuple[Outcome, Any]:
    """One worker in this process."""
    import_tensorflow()
    from ray import cloudpickle

    from raykeras import worker

    api, build = pack_model(model, lazily=True)
    rebuild = is_model(model) and orders.scale.replicas > 1  # its variables must be made under the strategy
    saved = save_model(model, api) if rebuild else None
    kept: list[Any] = []

    def build_and_keep() -> Any:
        if saved is not None:
            made = load_model(saved, api)
        elif is_model(model):
            made = model
        else:  # called as it is, so that breakpoints and closures work
            made = model() if callable(model) else cloudpickle.loads(build)()
        kept.append(made)
        return made

    sender = EventSender(gathered.queue.put)

    def work() -> Outcome:
        links = worker.Links(
            rank=0,
            callbacks=contextlib.nullcontext(unwrapped(callbacks)),
            send=sender.send,
            save=save_locally(orders),
            return_variables=rebuild,
        )
        return worker.run(orders, links, api=api, build=build_and_keep)

    try:
        outcome = run_here(work)
    finally:
        sender.close()
    if outcome.variables is not None:
        put_back(model, api, outcome.variables)
        return outcome, model
    return outcome, kept[-1]


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
    orders: Orders, model: Any, callbacks: list[Any], packed: Packed, gathered: Gathering
) -> tuple[Outcome, Any]:
    """Workers in processes of their own."""
    import ray
    from ray import cloudpickle

    scale, desk = orders.scale, Desk(orders.scale.workers)
    with contextlib.ExitStack() as stack:
        train, validation = (stack.enter_context(for_workers(o, scale)) for o in (orders.train, orders.validation))
        shared = dataclasses.replace(orders, train=train, validation=validation)
        stack.enter_context(forwarding(desk, gathered))
        outcome = run_on_workers(
            _work,
            # through the store: references inside of a pickle of our own would never be let go
            {"task": ray.put((shared, packed, "tensorflow" in sys.modules)), "desk": desk},
            scale=scale,
            cpus_per_worker=orders.cpus_per_worker,
            folder=orders.folder,
            keep=orders.run.keep,
        )
    hand_back(callbacks, outcome.callback_states, cloudpickle.loads)
    if packed.in_place:
        put_back(model, packed.api, outcome.variables)
    return outcome, model if packed.in_place else None


def _work(config: dict[str, Any]) -> Outcome | None:
    """What runs on each worker: the first line that imports TensorFlow."""
    quiet()
    import_tensorflow()
    import ray
    import ray.train
    from ray import cloudpickle
    from ray.train.collective import broadcast_from_rank_zero

    from raykeras import worker

    rank = ray.train.get_context().get_world_rank()
    orders, packed, keras_there = ray.get(config["task"])
    desk = config["desk"]
    sender = EventSender(desk.put) if rank == 0 else None
    artifacts = Artifacts(orders.folder)
    links = worker.Links(
        rank=rank,
        callbacks=placed(cloudpickle.loads(packed.callbacks), rank, artifacts.path, broadcast_from_rank_zero),
        send=sender.send if sender else None,
        save=save_through_ray_train(orders, rank),
        artifacts=artifacts if rank == 0 else None,
        agreement=Agreement(desk, rank) if orders.scale.workers > 1 else None,
        states=lambda mine: states_of(mine, keras_there),
        return_variables=packed.in_place,
    )
    try:
        outcome = worker.run(orders, links, api=packed.api, build=lambda: cloudpickle.loads(packed.build)())
    finally:
        artifacts.close()
        if sender:
            sender.close()
    return outcome if rank == 0 else None
