"""One worker's part of a run.

Enters: its orders, how to get the model, the callbacks, and where events and checkpoints go.
Leaves: an `Outcome`. In between: strategy, model, streams, and Keras' own `fit`.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from raykeras import callbacks as callbacks_
from raykeras import events
from raykeras.artifacts import Artifacts
from raykeras.batch_stream import BatchStream
from raykeras.checks import check_execution, check_model
from raykeras.cluster import reading
from raykeras.errors import RaykerasError, root_cause, user_code_error
from raykeras.events import Event
from raykeras.exactness import building, exact
from raykeras.keras_api import KerasAPI, api_of
from raykeras.options import Scale
from raykeras.orders import BatchOrders, DataOrders, EvaluationOrders, Orders, Outcome
from raykeras.saving import Save, Saver
from raykeras.stopping import Agreement, stop_callback
from raykeras.strategy import distribute, make_strategy, scope
from raykeras.stream import Feed, Stream


@dataclass(frozen=True, kw_only=True)
class Links:
    """What ties one worker to the rest of the run.

    Attributes:
        rank: This worker's.
        callbacks: Gives the user's callbacks that run here.
        send: Takes events; None where nobody listens, which is on all ranks but the first.
        save: Stores a checkpoint; called on all ranks alike.
        artifacts: The files that callbacks write here; None where they stay where they are.
        agreement: With the other workers, on where to stop; None where there are none.
        states: Pickles callbacks' attributes for the way back; None where they need no way back.
        return_variables: Whether the variables go back, too.
    """

    rank: int
    callbacks: contextlib.AbstractContextManager[Sequence[Any]]
    send: Callable[[Event], None] | None
    save: Save
    artifacts: Artifacts | None = None
    agreement: Agreement | None = None
    states: Callable[[Sequence[Any]], list[dict[str, bytes]]] | None = None
    return_variables: bool = False


def run(orders: Orders, links: Links, *, api: KerasAPI, build: Callable[[], Any]) -> Outcome:
    """Trains.

    Args:
        orders: The same for all ranks.
        links: This worker's.
        api: The Keras that `build` is going to use.
        build: Gives the compiled model.

    Raises:
        RaykerasError: What the user can mend, or `UserCodeError` around an exception of their code.
    """
    with _translated(links.rank) as streams, links.callbacks as callbacks:
        return _run(orders, links, api, build, callbacks, streams)


def evaluate(
    orders: EvaluationOrders, *, rank: int, api: KerasAPI, build: Callable[[], Any]
) -> tuple[dict[str, float], list[float]]:
    """Evaluates a model on every row once.

    Returns:
        Metric to its value over all rows, as `Model.evaluate` gives it, and the values in the order
        in which it lists them; the same on all ranks.

    Raises:
        RaykerasError: As `run`.
    """
    data, scale = orders.data, orders.scale
    with _translated(rank) as streams:
        strategy = make_strategy(scale)
        api.seed(orders.seed)
        with scope(strategy), building(api, strategy):
            model = build()
            api = api_of(model)
            check_execution(model, scale)
            _lower_steps_per_execution(model, api, strategy, [data.num_steps])
            data = data.laid_out(check_model(model, api, data.layout))
        stream = _open_stream(data, scale, orders.cpus_per_worker, rank, num_steps=data.num_steps)
        streams.append(stream)
        rows = [] if strategy is None else stream.sample()
        dataset = distribute(strategy, stream.pass_dataset(data.num_steps))
        with exact(model, api, data.layout, strategy, rows):
            logs = model.evaluate(dataset, steps=data.num_steps, verbose=0, return_dict=True)
    return {name: float(value) for name, value in logs.items()}, api.in_order(model, logs)


@contextlib.contextmanager
def _translated(rank: int) -> Iterator[list[Stream | BatchStream]]:
    """Raises errors of ours, closes the streams that it gives."""
    streams: list[Stream | BatchStream] = []
    try:
        yield streams
    except RaykerasError:
        raise
    except Exception as raised:
        # of an exception in a stream tf.data passes on the text only
        error = next((stream.failure for stream in streams if stream.failure is not None), raised)
        cause = root_cause(error)
        if isinstance(cause, RaykerasError):
            raise cause from None
        raise user_code_error(error, rank) from error
    finally:
        for stream in streams:
            with contextlib.suppress(Exception):
                stream.close()


def _run(
    orders: Orders,
    links: Links,
    api: KerasAPI,
    build: Callable[[], Any],
    callbacks: Sequence[Any],
    streams: list[Stream | BatchStream],
) -> Outcome:
    scale, rank, send = orders.scale, links.rank, links.send or _discard
    strategy = make_strategy(scale)
    api.seed(orders.run.seed)
    with scope(strategy), building(api, strategy):
        model = build()
        api = api_of(model)
        check_execution(model, scale)
        train_data = orders.train.laid_out(check_model(model, api, orders.train.layout))
        validation_data = orders.validation
        if validation_data is not None:
            validation_data = validation_data.laid_out(check_model(model, api, validation_data.layout))
    every_num_steps = [orders.num_steps, validation_data.num_steps if validation_data is not None else None]
    _lower_steps_per_execution(model, api, strategy, every_num_steps)
    steps_per_execution = _steps_per_execution(model)

    open_stream = functools.partial(
        _open_stream,
        scale=scale,
        cpus_per_worker=orders.cpus_per_worker,
        rank=rank,
        num_streams=1 if orders.validation is None else 2,
    )
    num_steps = orders.num_steps
    first_step = orders.initial_epoch * (num_steps or 0)  # an epoch's order is its own, wherever a run begins
    train = open_stream(
        train_data, num_steps=None if num_steps is None else orders.epochs * num_steps, first_step=first_step
    )
    streams.append(train)
    if num_steps is None or (orders.steps_per_epoch is None and num_steps % steps_per_execution):
        # several steps in one execution may not run on into the next epoch
        data, steps = train.pass_dataset(num_steps), None
    else:
        data, steps = train.endless_dataset(), num_steps
    validation: dict[str, Any] = {}
    if validation_data is not None:
        stream = open_stream(validation_data, num_steps=None)
        streams.append(stream)
        num_steps = validation_data.num_steps
        validation = {
            "validation_data": distribute(strategy, stream.pass_dataset(num_steps)),
            "validation_steps": num_steps,
            "validation_freq": orders.validation_freq,
        }

    saver = Saver(orders, model, api, send, links.save)
    ours = _our_callbacks(orders, links, api, saver, _batch_rows(train_data), train.waited_s, first_step)
    if isinstance(train, BatchStream):
        ours.insert(0, train.ending_callback(api))
    params = {"epochs": orders.epochs, "steps": orders.num_steps, "verbose": 0}
    send(
        events.RunStarted(
            rank=rank,
            params={**params, **orders.train.params},
            workers=scale.workers,
            replicas=scale.num_replicas,
            initial_epoch=orders.initial_epoch,
            path=orders.folder.path,
        )
    )
    rows = [] if strategy is None else train.sample()
    with exact(model, api, train_data.layout, strategy, rows):
        history = model.fit(
            distribute(strategy, data),
            epochs=orders.epochs,
            initial_epoch=orders.initial_epoch,
            steps_per_epoch=steps,
            callbacks=[*callbacks, *ours],
            verbose=0,
            shuffle=False,
            **validation,
        )
    logs = {name: float(values[-1]) for name, values in history.history.items() if values}
    last_epoch = history.epoch[-1] if history.epoch else orders.epochs - 1
    saver.save_last(last_epoch, logs)
    _tell_artifacts(links, last_epoch)
    # all ranks read them: some are variables that are put together when read
    variables = [np.asarray(v) for v in api.variables(model)] if links.return_variables else None
    return Outcome(
        history={name: [float(value) for value in values] for name, values in history.history.items()},
        epoch=list(history.epoch),
        params=params,
        callback_states=links.states(callbacks) if links.states is not None and rank == 0 else [],
        variables=variables if rank == 0 else None,
    )


def _our_callbacks(
    orders: Orders,
    links: Links,
    api: KerasAPI,
    saver: Saver,
    batch_rows: Callable[[int], int],
    waited_s: Callable[[int, float], float],
    first_step: int,
) -> list[Any]:
    """Those that follow the user's."""
    tell = callbacks_.event_callback(
        api,
        links.send or _discard,
        rank=links.rank,
        batch_rows=batch_rows,
        waited_s=waited_s,
        first_step=first_step,
    )
    ours = [tell]
    if orders.run.checkpoint_every == "epoch":
        ours.append(callbacks_.epoch_end_callback(api, saver.save))
    if links.artifacts is not None:
        ours.append(callbacks_.epoch_end_callback(api, lambda epoch, logs: _tell_artifacts(links, epoch)))
    if links.agreement is not None:
        ours.append(stop_callback(api, links.agreement))
    return ours


def _tell_artifacts(links: Links, epoch: int) -> None:
    for path in links.artifacts.collect() if links.artifacts is not None else ():
        (links.send or _discard)(events.ArtifactSaved(rank=links.rank, epoch=epoch, path=path))


def _open_stream(
    data: DataOrders | BatchOrders,
    scale: Scale,
    cpus_per_worker: float,
    rank: int,
    num_steps: int | None,
    first_step: int = 0,
    num_streams: int = 1,
) -> Stream | BatchStream:
    if isinstance(data, BatchOrders):
        num_steps = None if num_steps is None else num_steps - first_step
        return BatchStream(data, rank, scale.workers, scale.replicas, num_steps)
    in_memory = data.opened.reader.in_memory
    feed = Feed(
        opened=data.opened,
        layout=data.layout,
        plan=data.plan,
        rank=rank,
        num_ranks=scale.workers,
        num_replicas=scale.replicas,
        num_steps=num_steps,
        first_step=first_step,
        reading=None if in_memory else reading(scale, cpus_per_worker, num_streams),
    )
    return Stream(feed)


def _batch_rows(data: DataOrders | BatchOrders) -> Callable[[int], int]:
    """Step to the rows of its global batch; 0 where only the user knows them."""
    if isinstance(data, BatchOrders):
        return lambda step: 0
    plan = data.plan(0)
    return lambda step: plan.batch_num_rows(step % plan.num_steps)


def _steps_per_execution(model: Any) -> int:
    steps = getattr(model, "steps_per_execution", None) or getattr(model, "_steps_per_execution", None) or 1
    return int(steps if isinstance(steps, int) else steps.numpy())


def _lower_steps_per_execution(model: Any, api: KerasAPI, strategy: Any, every_num_steps: Sequence[int | None]) -> None:
    """To what divides all numbers of steps: under a strategy Keras 3 cannot execute a part of so many."""
    if strategy is not None and not api.is_legacy and (steps := _steps_per_execution(model)) > 1:
        model.steps_per_execution = math.gcd(steps, *(n for n in every_num_steps if n is not None))


def _discard(event: Event) -> None:
    """Only the chief tells."""
