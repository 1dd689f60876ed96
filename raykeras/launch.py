"""Starts the training of a run and waits for it.

Enters: the orders, the model, the callbacks. Leaves: the chief's `Outcome`, and the model if it is in
this process.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

from raykeras.callbacks import hand_back, into_artifacts
from raykeras.data import for_workers
from raykeras.events import EventSender
from raykeras.gathering import Gathering, forwarding
from raykeras.group import run_here, run_on_workers
from raykeras.noise import import_tensorflow, quiet
from raykeras.orders import Orders, Outcome
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
        return worker.run(
            orders,
            rank=0,
            api=api,
            build=build_and_keep,
            callbacks=callbacks,
            send=sender.send,
            save=worker.save_locally(orders),
            return_variables=rebuild,
        )

    try:
        outcome = run_here(work)
    finally:
        sender.close()
    if outcome.variables is not None:
        put_back(model, api, outcome.variables)
        return outcome, model
    return outcome, kept[-1]


def fit_on_workers(orders: Orders, model: Any, callbacks: list[Any], gathered: Gathering) -> tuple[Outcome, Any]:
    """Workers in processes of their own."""
    from ray import cloudpickle
    from ray.util.queue import Queue

    api, build = pack_model(model)
    into_artifacts(callbacks, orders.folder / "artifacts")
    pipe = Queue(actor_options={"num_cpus": 0})
    scale = orders.scale
    with contextlib.ExitStack() as stack:
        train, validation = (stack.enter_context(for_workers(o, scale)) for o in (orders.train, orders.validation))
        shared = dataclasses.replace(orders, train=train, validation=validation)
        task = cloudpickle.dumps((shared, api, build, is_model(model), cloudpickle.dumps(callbacks)))
        stack.enter_context(forwarding(pipe, gathered))
        outcome = run_on_workers(
            _work,
            {"task": task, "pipe": pipe},
            scale=scale,
            cpus_per_worker=orders.cpus_per_worker,
            folder=orders.folder,
            keep=orders.run.keep,
        )
    hand_back(callbacks, outcome.callback_states, cloudpickle.loads)
    if is_model(model):
        put_back(model, api, outcome.variables)
        return outcome, model
    return outcome, None


def _work(config: dict[str, Any]) -> Outcome | None:
    """What runs on each worker: the first line that imports TensorFlow."""
    quiet()
    import_tensorflow()
    import ray.train
    from ray import cloudpickle

    from raykeras import worker

    rank = ray.train.get_context().get_world_rank()
    orders, api, build, return_variables, callbacks = cloudpickle.loads(config["task"])
    sender = EventSender(config["pipe"].put) if rank == 0 else None
    try:
        outcome = worker.run(
            orders,
            rank=rank,
            api=api,
            build=lambda: cloudpickle.loads(build)(),
            callbacks=cloudpickle.loads(callbacks),
            send=sender.send if sender else print,
            save=worker.save_through_ray_train(orders, rank),
            dumps=cloudpickle.dumps,
            return_variables=return_variables,
        )
    finally:
        if sender:
            sender.close()
    return outcome if rank == 0 else None
