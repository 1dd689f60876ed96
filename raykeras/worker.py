"""One worker's part of a run.

Enters: its orders, how to get the model, the callbacks, and where events and checkpoints go.
Leaves: an `Outcome`. In between: strategy, model, streams, and Keras' own `fit`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from raykeras.batch_stream import BatchStream
from raykeras.built import make_variables
from raykeras.checks import check_execution, check_model
from raykeras.chunks import Feed
from raykeras.cluster import Room, reading
from raykeras.columns import Layout
from raykeras.errors import ModelError, RaykerasError, root_cause, user_code_error
from raykeras.exactness import building, exact
from raykeras.executions import counted_executions, is_countable, steps_left, without_xla
from raykeras.keras_api import KerasAPI, api_of
from raykeras.logs import Logs, plain_logs
from raykeras.mirroring import is_made_elsewhere, mirrored
from raykeras.options import Scale
from raykeras.orders import BatchOrders, DataOrders, EvaluationOrders, Orders, Outcome
from raykeras.points import LeftError
from raykeras.strategy import distribute, make_strategy, scope
from raykeras.stream import Stream
from raykeras.training import Links, Training


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
    with contextlib.ExitStack() as stack, _translated(links.rank) as streams, links.callbacks as callbacks:
        return _run(orders, links, api, build, callbacks, streams, stack)


def evaluate(
    orders: EvaluationOrders, *, rank: int, api: KerasAPI, build: Callable[[], Any], callbacks: Sequence[Any] = ()
) -> tuple[Logs, list[Any]]:
    """Evaluates a model on every row once.

    Returns:
        Metric to its value over all rows, as `Model.evaluate` gives it, and the values in the order
        in which it lists them; the same on all ranks.

    Raises:
        RaykerasError: As `run`.
    """
    data, scale = orders.data, orders.scale
    with contextlib.ExitStack() as stack, _translated(rank) as streams:
        strategy = make_strategy(scale)
        api.seed(orders.seed)
        model, api = _built(build, api, strategy, stack)
        stack.enter_context(without_xla(model, scale))
        with scope(strategy):
            check_execution(model, scale)
            _lower_steps_per_execution(model, api, strategy)
            data = data.laid_out(check_model(model, api, data.layout))
        stream = _open_stream(data, scale, orders.room, rank, num_steps=data.num_steps)
        streams.append(stream)
        stream.begin()
        rows = [] if strategy is None else stream.sample()
        dataset = distribute(strategy, stream.pass_dataset(data.num_steps))
        executions = _executions(model, api, strategy, None, data.num_steps)
        with exact(model, api, data.layout, strategy, rows), executions:
            options: dict[str, Any] = {"callbacks": list(callbacks)} if callbacks else {}
            logs = model.evaluate(dataset, steps=data.num_steps, verbose=0, return_dict=True, **options)
    return plain_logs(logs), api.in_order(model, logs)


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
    callbacks: Mapping[str, Any],
    streams: list[Stream | BatchStream],
    stack: contextlib.ExitStack,
) -> Outcome:
    scale = orders.scale
    strategy = make_strategy(scale)
    api.seed(orders.run.seed)
    model, api = _built(build, api, strategy, stack)
    stack.enter_context(without_xla(model, scale))
    with scope(strategy):
        check_execution(model, scale)
        train_data = orders.train.laid_out(check_model(model, api, orders.train.layout))
        validation_data = orders.validation
        if validation_data is not None:
            validation_data = validation_data.laid_out(_validation_layout(model, api, validation_data.layout))
    if api.is_legacy and isinstance(orders.train, DataOrders):
        orders = dataclasses.replace(orders, train=dataclasses.replace(orders.train, ends_epochs=False))
    test_steps = None if validation_data is None else validation_data.num_steps
    _lower_steps_per_execution(model, api, strategy)

    open_stream = functools.partial(
        _open_stream,
        scale=scale,
        room=orders.room,
        rank=links.rank,
        num_streams=1 if orders.validation is None else 2,
    )
    epoch, step = orders.begins_at
    first_step = orders.steps_before(epoch) + step  # an epoch's order is its own, wherever a run begins
    last_step = None if orders.num_steps is None else orders.steps_before(max(orders.epochs, epoch + 1))
    train = open_stream(train_data, num_steps=last_step, first_step=first_step)
    streams.append(train)
    train.begin()  # while the model is compiled
    data, steps, counts = _train_dataset(orders, train, model, api)
    validation: dict[str, Any] = {}
    if validation_data is not None:
        stream = open_stream(validation_data, num_steps=None)
        streams.append(stream)
        validation = {
            "validation_data": distribute(strategy, stream.pass_dataset(validation_data.num_steps)),
            "validation_steps": validation_data.num_steps,
            "validation_freq": orders.validation_freq,
        }
    if orders.resumption is not None or orders.trains_nothing:
        make_variables(model, api, train_data.layout, strategy)  # or there is nothing to put them into
    rows = [] if strategy is None else train.sample()
    known_steps = _known_steps(orders, model, api)
    executions = _executions(
        model, api, strategy, known_steps, test_steps, begins_at=(epoch, step), steps_of=orders.steps_of
    )
    with exact(model, api, train_data.layout, strategy, rows), executions:
        training = Training(orders, links, api, model, callbacks, train, train_data, first_step, counts)
        try:
            model.fit(
                distribute(strategy, data),
                epochs=orders.epochs,
                initial_epoch=training.initial_epoch,
                steps_per_epoch=steps,
                callbacks=training.callback_list(),
                verbose=0,
                shuffle=False,
                **validation,
            )
        except LeftError:
            return training.left()
    return training.ended()


def _built(build: Callable[[], Any], api: KerasAPI, strategy: Any, stack: contextlib.ExitStack) -> tuple[Any, KerasAPI]:
    """The model and its Keras; one that was made elsewhere is the strategy's until the stack is left."""
    with scope(strategy), building(api, strategy):
        model = build()
    api = api_of(model)
    if is_made_elsewhere(model, api, strategy):
        stack.enter_context(mirrored(model, api, strategy))
    return model, api


def _validation_layout(model: Any, api: KerasAPI, layout: Layout) -> Layout:
    try:
        return check_model(model, api, layout)
    except ModelError as error:
        raise ModelError(f"Of the validation data: {error}") from None


def _train_dataset(
    orders: Orders, train: Stream | BatchStream, model: Any, api: KerasAPI
) -> tuple[Any, int | None, bool]:
    """The dataset for `fit`, `steps_per_epoch`, and whether Keras does not know how many steps an epoch has."""
    num_steps = orders.num_steps
    if num_steps is None:
        return train.pass_dataset(None), None, False
    if orders.ends_with_pass:
        return train.endless_dataset(), num_steps, True
    if orders.may_end_with_pass and isinstance(train, BatchStream) and not api.is_legacy:
        return train.ending_dataset(num_steps), num_steps, False
    in_middle = orders.begins_at[1] > 0
    # then Keras 3 has to see the end of the data, and whole executions would run on into the next epoch
    if _known_steps(orders, model, api) is None and not api.is_legacy and num_steps % api.steps_per_execution(model):
        return train.pass_dataset(num_steps), None, in_middle
    return train.endless_dataset(), num_steps, in_middle and api.is_legacy


def _open_stream(
    data: DataOrders | BatchOrders,
    scale: Scale,
    room: Room,
    rank: int,
    num_steps: int | None,
    first_step: int = 0,
    num_streams: int = 1,
) -> Stream | BatchStream:
    if isinstance(data, BatchOrders):
        num_steps = None if num_steps is None else num_steps - first_step
        return BatchStream(data, rank, scale.workers, scale.replicas, num_steps)
    opened, layout = (data.opened, data.layout) if data.held is None else data.held.source(data.layout)
    feed = Feed(
        opened=opened,
        layout=layout,
        plan=data.plan,
        rank=rank,
        num_ranks=scale.workers,
        num_replicas=scale.replicas,
        num_steps=num_steps,
        first_step=first_step,
        reading=None if data.in_memory else reading(room, scale.workers, num_streams),
    )
    return Stream(feed)


def _known_steps(orders: Orders, model: Any, api: KerasAPI) -> int | None:
    """Steps of every epoch, if the data is sure to have as many, and a function of Keras' makes them."""
    is_generator = isinstance(orders.train, BatchOrders) and orders.train.batches.kind == "generator"
    may_end = is_generator or (orders.may_end_with_pass and not api.is_legacy)
    return None if may_end or not (api.is_legacy or is_countable(model)) else orders.num_steps


def _lower_steps_per_execution(model: Any, api: KerasAPI, strategy: Any) -> None:
    """To one for functions of the user's that Keras 3's loop cannot run under a strategy; see `raykeras.executions`."""
    if strategy is not None and not api.is_legacy and not is_countable(model):
        model.steps_per_execution = 1


def _executions(
    model: Any,
    api: KerasAPI,
    strategy: Any,
    train_steps: int | None,
    test_steps: int | None = None,
    *,
    begins_at: tuple[int, int] = (0, 0),
    steps_of: Callable[[int], int | None] = lambda epoch: None,
) -> contextlib.AbstractContextManager[None]:
    """What `steps_per_execution` needs to make no other steps than these."""
    if api.is_legacy:
        return contextlib.nullcontext()
    if strategy is None or not is_countable(model):
        test_steps = None  # without a strategy a callback may evaluate on what it likes
    train_left = None if train_steps is None else steps_left(steps_of, begins_at)
    test_left = None if test_steps is None else steps_left(lambda _: test_steps)
    return counted_executions(model, strategy, train_left=train_left, test_left=test_left)
