"""One worker's part of a run.

Enters: its orders, how to get the model, the callbacks, and where events and checkpoints go.
Leaves: an `Outcome`. In between: strategy, model, streams, and Keras' own `fit`.
"""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

import raykeras
from raykeras import callbacks as callbacks_
from raykeras import checkpoint, events
from raykeras.batch_stream import BatchStream
from raykeras.checks import check_model
from raykeras.cluster import reading
from raykeras.errors import RaykerasError, root_cause, user_code_error
from raykeras.events import Event
from raykeras.exactness import exact
from raykeras.keras_api import KerasAPI, api_of
from raykeras.options import Scale
from raykeras.orders import BatchOrders, DataOrders, EvaluationOrders, Orders, Outcome
from raykeras.strategy import distribute, make_strategy, scope
from raykeras.stream import Feed, Stream

Save = Callable[[str, Callable[[str], None], dict[str, float]], str]
"""Takes a checkpoint's name, what writes it into a folder, and the epoch's logs; gives its path."""


def run(
    orders: Orders,
    *,
    rank: int,
    api: KerasAPI,
    build: Callable[[], Any],
    callbacks: Sequence[Any],
    send: Callable[[Event], None],
    save: Save,
    dumps: Callable[[Any], bytes] | None = None,
    return_variables: bool = False,
) -> Outcome:
    """Trains.

    Args:
        orders: The same for all ranks.
        rank: This worker's.
        api: The Keras that `build` is going to use.
        build: Gives the compiled model.
        callbacks: The user's.
        send: Takes events; called on the chief only.
        save: Stores a checkpoint; called on all ranks alike.
        dumps: Pickles callbacks' attributes for the way back; None where they need no way back.
        return_variables: Whether the variables go back too.

    Raises:
        RaykerasError: What the user can mend, or `UserCodeError` around an exception of their code.
    """
    with _translated(rank) as streams:
        return _run(
            orders,
            rank,
            api,
            build,
            callbacks,
            send if rank == 0 else _discard,
            save,
            dumps,
            return_variables,
            streams,
        )


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
        with scope(strategy):
            model = build()
            api = api_of(model)
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
    rank: int,
    api: KerasAPI,
    build: Callable[[], Any],
    user_callbacks: Sequence[Any],
    send: Callable[[Event], None],
    save: Save,
    dumps: Callable[[Any], bytes] | None,
    return_variables: bool,
    streams: list[Stream | BatchStream],
) -> Outcome:
    scale = orders.scale
    strategy = make_strategy(scale)
    api.seed(orders.run.seed)
    with scope(strategy):
        model = build()
        api = api_of(model)
        train_data = orders.train.laid_out(check_model(model, api, orders.train.layout))
        validation_data = orders.validation
        if validation_data is not None:
            validation_data = validation_data.laid_out(check_model(model, api, validation_data.layout))
    steps_per_execution = _steps_per_execution(model)

    epochs = range(orders.initial_epoch, orders.epochs)
    open_stream = functools.partial(
        _open_stream,
        scale=scale,
        cpus_per_worker=orders.cpus_per_worker,
        rank=rank,
        num_streams=1 if orders.validation is None else 2,
    )
    num_steps = orders.num_steps
    train = open_stream(train_data, num_steps=None if num_steps is None else len(epochs) * num_steps)
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

    mine = callbacks_.for_rank(user_callbacks, rank)
    tell = callbacks_.event_callback(
        api,
        send,
        rank=rank,
        batch_rows=_batch_rows(train_data),
        waited_s=train.waited_s,
    )
    saver = _Saver(orders, model, api, send, save)
    ours = [tell]
    if orders.run.checkpoint_every == "epoch":
        ours.append(callbacks_.epoch_end_callback(api, saver.save))
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
            callbacks=[*mine, *ours],
            verbose=0,
            shuffle=False,
            **validation,
        )
    logs = {name: float(values[-1]) for name, values in history.history.items() if values}
    saver.save_last(history.epoch[-1] if history.epoch else orders.epochs - 1, logs)
    return Outcome(
        history={name: [float(value) for value in values] for name, values in history.history.items()},
        epoch=list(history.epoch),
        params=params,
        callback_states=callbacks_.states_of(mine, dumps) if dumps is not None and rank == 0 else [],
        variables=[np.asarray(v) for v in api.variables(model)] if return_variables and rank == 0 else None,
    )


class _Saver:
    """Saves checkpoints, each epoch once."""

    def __init__(self, orders: Orders, model: Any, api: KerasAPI, send: Callable[[Event], None], save: Save) -> None:
        self._orders, self._model, self._api, self._send, self._save = orders, model, api, send, save
        self._saved: int | None = None

    def save(self, epoch: int, logs: dict[str, float]) -> None:
        orders = self._orders
        state = {
            "epoch": epoch + 1,
            "step": 0,
            "seed": orders.run.seed,
            **orders.train.position,
            "logs": logs,
            "keras": {"package": self._api.name, "version": self._api.version},
            "raykeras": raykeras.__version__,
        }
        name = checkpoint.checkpoint_name(epoch + 1)
        path = self._save(name, lambda folder: checkpoint.write(folder, self._model, state), logs)
        self._saved = epoch
        self._send(events.CheckpointSaved(rank=0, epoch=epoch, step=0, path=path))

    def save_last(self, epoch: int, logs: dict[str, float]) -> None:
        if self._saved != epoch:
            self.save(epoch, logs)


def save_locally(orders: Orders) -> Save:
    """Stores checkpoints from this process: for a single worker."""

    def save(name: str, write: Callable[[str], None], logs: dict[str, float]) -> str:
        with tempfile.TemporaryDirectory(prefix="raykeras-checkpoint-") as folder:
            write(folder)
            return checkpoint.store(orders.folder, name, folder, orders.run.keep).path

    return save


def save_through_ray_train(orders: Orders, rank: int) -> Save:
    """Stores checkpoints through `ray.train.report`: all ranks write, the chief's is kept."""
    import ray.train

    def save(name: str, write: Callable[[str], None], logs: dict[str, float]) -> str:
        with tempfile.TemporaryDirectory(prefix="raykeras-checkpoint-") as folder:
            write(folder)
            kept = ray.train.Checkpoint.from_directory(folder) if rank == 0 else None
            ray.train.report(dict(logs), checkpoint=kept, checkpoint_dir_name=name)
        return f"{orders.folder / checkpoint.FOLDER}/{name}"

    return save


def _open_stream(
    data: DataOrders | BatchOrders,
    scale: Scale,
    cpus_per_worker: float,
    rank: int,
    num_steps: int | None,
    num_streams: int = 1,
) -> Stream | BatchStream:
    if isinstance(data, BatchOrders):
        return BatchStream(data, rank, scale.workers, scale.replicas)
    in_memory = data.opened.reader.in_memory
    feed = Feed(
        opened=data.opened,
        layout=data.layout,
        plan=data.plan,
        rank=rank,
        num_ranks=scale.workers,
        num_replicas=scale.replicas,
        num_steps=num_steps,
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


def _discard(event: Event) -> None:
    """Only the chief tells."""
