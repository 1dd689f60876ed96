"""Run one worker's part of a training or an evaluation: strategy, model, streams, and Keras' `fit` or `evaluate`."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from raykeras.compat.keras_api import KerasAPI, api_of
from raykeras.core import events
from raykeras.core.error_context import root_cause, user_code_error
from raykeras.core.errors import ModelError, RaykerasError
from raykeras.core.logs import Logs, plain_logs
from raykeras.data.batch_spec import BatchSpec
from raykeras.data.train_input import TrainInput
from raykeras.distribute.build import make_variables
from raykeras.distribute.empty_replicas import filled
from raykeras.distribute.exact import building, exact
from raykeras.distribute.executions import counted_executions, is_countable, steps_left, without_xla
from raykeras.distribute.mirroring import mirrored, needs_mirroring
from raykeras.distribute.model_checks import check_model
from raykeras.distribute.self_check import check_version
from raykeras.distribute.strategy import distribute, make_strategy, scope
from raykeras.worker.callbacks import TrainingPreempted
from raykeras.worker.job import EvaluationJob, Outcome, TrainJob
from raykeras.worker.session import TrainingSession, WorkerContext


def run(job: TrainJob, context: WorkerContext, *, api: KerasAPI, build: Callable[[], Any]) -> Outcome:
    """Run a training job on this worker.

    Args:
        job: The job, the same for all ranks.
        context: Connects this worker to the rest of the run.
        api: The Keras package that `build` uses.
        build: Returns the compiled model.

    Raises:
        RaykerasError: If the job cannot be run; a `UserCodeError` for an exception in the user's code.
    """
    with contextlib.ExitStack() as stack, _translated_errors(context.rank) as inputs, context.callbacks as callbacks:
        return _run(job, context, api, build, callbacks, inputs, stack)


def evaluate(
    job: EvaluationJob, *, rank: int, api: KerasAPI, build: Callable[[], Any], callbacks: Sequence[Any] = ()
) -> tuple[Logs, list[Any]]:
    """Run an evaluation job on this worker; every row counts once.

    Args:
        job: The job, the same for all ranks.
        rank: Rank of this worker.
        api: The Keras package that `build` uses.
        build: Returns the compiled model.
        callbacks: Keras callbacks.

    Returns:
        The logs that `Model.evaluate` returns, over all rows, and their values in the order in which it lists them;
        the same on all ranks.

    Raises:
        RaykerasError: As for `run`.
    """
    data, scale = job.data, job.scale
    with contextlib.ExitStack() as stack, _translated_errors(rank) as inputs:
        strategy = make_strategy(scale)
        api.seed(job.seed)
        model, api = _build_model(build, api, strategy, stack)
        stack.enter_context(without_xla(model, scale))
        with scope(strategy):
            _lower_steps_per_execution(model, api, strategy)
            data = data.with_spec(check_model(model, api, data.batch_spec))
        if strategy is not None and data.batch_spec.role("sample_weight"):
            api.check_weighted_metrics(model)
        rank_input = data.open(rank, scale, job.budget, num_steps=data.num_steps)
        inputs.append(rank_input)
        rank_input.begin()
        rows = [] if strategy is None else rank_input.sample()
        fills = strategy is not None and not api.synchronizes(model)
        dataset = rank_input.pass_dataset(data.num_steps)
        if fills:
            dataset = filled(dataset, data.batch_spec, rows)
        dataset = distribute(strategy, dataset, data.num_steps)
        executions = _executions(model, api, strategy, None, data.num_steps)
        with exact(model, api, data.batch_spec, strategy, rows, training=False), executions:
            options: dict[str, Any] = {"callbacks": list(callbacks)} if callbacks else {}
            logs = model.evaluate(dataset, steps=data.num_steps, verbose=0, return_dict=True, **options)
    return plain_logs(logs), api.ordered_values(model, logs)


@contextlib.contextmanager
def _translated_errors(rank: int) -> Iterator[list[TrainInput]]:
    """Turn exceptions of the block into RaykerasErrors; yield a list whose items are closed when the block ends."""
    inputs: list[TrainInput] = []
    try:
        yield inputs
    except RaykerasError:
        raise
    except Exception as raised:
        # tf.data passes on only the text of an exception in a dataset
        error = next((item.failure for item in inputs if item.failure is not None), raised)
        cause = root_cause(error)
        if isinstance(cause, RaykerasError):
            raise cause from None
        raise user_code_error(error, rank) from error
    finally:
        for item in inputs:
            with contextlib.suppress(Exception):
                item.close()


def _run(
    job: TrainJob,
    context: WorkerContext,
    api: KerasAPI,
    build: Callable[[], Any],
    callbacks: Mapping[str, Any],
    inputs: list[TrainInput],
    stack: contextlib.ExitStack,
) -> Outcome:
    if context.rank == 0:
        context.send(events.PhaseStarted(rank=context.rank, phase="build"))
    strategy = make_strategy(job.scale)
    api.seed(job.run.seed)
    model, api = _build_model(build, api, strategy, stack)
    stack.enter_context(without_xla(model, job.scale))
    with scope(strategy):
        job = _with_checked_specs(job, model, api)
    _lower_steps_per_execution(model, api, strategy)

    train = _open_train(job, context.rank)
    inputs.append(train)
    train.begin()  # while the model is compiled
    data, steps = _train_dataset(job, train, model, api)
    rows = [] if strategy is None else train.sample()
    fills = strategy is not None and not api.synchronizes(model)
    if fills:
        data = filled(data, job.train.batch_spec, rows)
    validation: dict[str, Any] = {}
    test_steps = None
    if job.validation is not None:
        test_steps = job.validation.num_steps
        test = job.validation.open(context.rank, job.scale, job.budget, num_steps=None, num_inputs=2)
        inputs.append(test)
        test_data = test.pass_dataset(test_steps)
        if fills:
            test_data = filled(test_data, job.validation.batch_spec, test.sample())
        validation = {"validation_steps": test_steps, "validation_freq": job.validation_freq}
        validation["validation_data"] = distribute(strategy, test_data, test_steps)
    if job.resumption is not None or job.is_finished:
        make_variables(model, api, job.train.batch_spec, strategy)  # a checkpoint needs all variables
    known_steps = _known_steps(job, model, api)
    executions = _executions(model, api, strategy, known_steps, test_steps, start=job.start, steps_of=job.steps_of)
    counts_steps = _counts_steps(job, model, api)
    with exact(model, api, job.train.batch_spec, strategy, rows), executions:
        session = TrainingSession(job, context, api, model, callbacks, train=train, counts_steps=counts_steps)
        try:
            model.fit(
                distribute(strategy, data, steps),
                epochs=job.epochs,
                initial_epoch=session.initial_epoch,
                steps_per_epoch=steps,
                callbacks=session.callback_list(),
                verbose=0,
                shuffle=False,
                **validation,
            )
        except TrainingPreempted:
            return session.preempted()
    return session.ended()


def _with_checked_specs(job: TrainJob, model: Any, api: KerasAPI) -> TrainJob:
    """Return the job with the batch specs as the model takes them."""
    train = job.train.with_spec(check_model(model, api, job.train.batch_spec))
    validation = job.validation
    if validation is not None:
        validation = validation.with_spec(_validation_spec(model, api, validation.batch_spec))
    return dataclasses.replace(job, train=train, validation=validation, ends_epochs=api.ends_epochs_with_data)


def _open_train(job: TrainJob, rank: int) -> TrainInput:
    last_step = None if job.num_steps is None else job.steps_before(max(job.epochs, job.start[0] + 1))
    return job.train.open(
        rank,
        job.scale,
        job.budget,
        num_steps=last_step,
        first_step=job.first_step,
        num_inputs=1 if job.validation is None else 2,
    )


def _build_model(
    build: Callable[[], Any], api: KerasAPI, strategy: Any, stack: contextlib.ExitStack
) -> tuple[Any, KerasAPI]:
    """Return the model and its Keras package; a model created elsewhere is mirrored until the stack closes."""
    with scope(strategy), building(api, strategy):
        model = build()
    api = api_of(model)
    check_version(api, strategy)
    if needs_mirroring(model, api, strategy):
        stack.enter_context(mirrored(model, api, strategy))
    return model, api


def _validation_spec(model: Any, api: KerasAPI, batch_spec: BatchSpec) -> BatchSpec:
    try:
        return check_model(model, api, batch_spec)
    except ModelError as error:
        raise ModelError(f"Validation data: {error}") from None


def _train_dataset(job: TrainJob, train: TrainInput, model: Any, api: KerasAPI) -> tuple[Any, int | None]:
    """Return the dataset and `steps_per_epoch` for `fit`."""
    num_steps = job.num_steps
    if num_steps is None:
        return train.pass_dataset(None), None
    if job.may_end_with_pass:
        return train.ending_dataset(num_steps), num_steps
    if _shows_end(job, model, api):
        return train.pass_dataset(num_steps), None
    return train.endless_dataset(), num_steps


def _shows_end(job: TrainJob, model: Any, api: KerasAPI) -> bool:
    """Return whether Keras must see where an epoch's data ends, since whole executions would run into the next."""
    if job.num_steps is None or job.ends_with_pass or job.may_end_with_pass or not api.compiles_executions:
        return False
    return _known_steps(job, model, api) is None and bool(job.num_steps % api.steps_per_execution(model))


def _counts_steps(job: TrainJob, model: Any, api: KerasAPI) -> bool:
    """Return `counts_steps` for `resuming_list`."""
    if job.num_steps is None:
        return False
    in_middle = job.start[1] > 0
    return job.ends_with_pass or (in_middle and (not api.compiles_executions or _shows_end(job, model, api)))


def _known_steps(job: TrainJob, model: Any, api: KerasAPI) -> int | None:
    """Return the number of steps of each epoch if it is certain and Keras' functions run the steps; else None."""
    may_end = job.train.may_run_out or job.may_end_with_pass
    return None if may_end or (api.compiles_executions and not is_countable(model)) else job.num_steps


def _lower_steps_per_execution(model: Any, api: KerasAPI, strategy: Any) -> None:
    """Set `steps_per_execution` to 1 for custom functions, whose compiled loop cannot run under a strategy."""
    if strategy is not None and api.compiles_executions and not is_countable(model):
        model.steps_per_execution = 1


def _executions(
    model: Any,
    api: KerasAPI,
    strategy: Any,
    train_steps: int | None,
    test_steps: int | None = None,
    *,
    start: tuple[int, int] = (0, 0),
    steps_of: Callable[[int], int | None] = lambda epoch: None,
) -> contextlib.AbstractContextManager[None]:
    """Return a context in which `steps_per_execution` runs exactly the steps of each epoch and evaluation."""
    if not api.compiles_executions:
        return contextlib.nullcontext()
    if strategy is None or not is_countable(model):
        test_steps = None  # without a strategy, a callback may evaluate other data
    train_left = None if train_steps is None else steps_left(steps_of, start)
    test_left = None if test_steps is None else steps_left(lambda _: test_steps)
    return counted_executions(model, strategy, train_left=train_left, test_left=test_left)
