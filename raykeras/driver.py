"""The user's call: checks it, gives the orders, gathers events, returns a `Result`.

Enters: what `fit` is called with. Leaves: a `Result`, and the run's folder.
"""

from __future__ import annotations

import contextlib
import itertools
import time
import traceback
import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from raykeras import events
from raykeras.arguments import (
    check_counts,
    check_positive,
    check_scale_and_run,
    split_callbacks,
)
from raykeras.attempts import resumed
from raykeras.attempts import train as train_run
from raykeras.checkpoint import RunFolder
from raykeras.cluster import Room, connect
from raykeras.data import (
    Given,
    Rows,
    in_memory,
    open_data,
    open_validation,
    read_ahead,
    steps_within,
    train_orders,
    validation_orders,
)
from raykeras.display import make_display
from raykeras.errors import OptionError, UserCodeError, redacted
from raykeras.events import Event
from raykeras.gathering import Gathering, RunLog
from raykeras.group import runs_here
from raykeras.interrupt import Interrupt
from raykeras.keras_api import current_floatx
from raykeras.launch import Packed, fit_here, fit_on_workers, pack_for_workers
from raykeras.noise import quiet
from raykeras.options import Run, Scale
from raykeras.orders import Orders, Outcome
from raykeras.result import Result
from raykeras.sources import listed, nearest
from raykeras.temporary import remove_abandoned
from raykeras.tracebacks import without_frames
from raykeras.transfer import ModelFile, as_model, is_model

TRACEBACK_FILE = "traceback.txt"


@without_frames
def fit(
    model: Any,
    x: Any,
    y: Any = None,
    *,
    batch_size: int | None = None,
    epochs: int = 1,
    verbose: str | int = "auto",
    callbacks: Sequence[Any] | Any | None = None,
    validation_split: float = 0.0,
    validation_data: Any = None,
    shuffle: bool | int = True,
    class_weight: Mapping[Any, Any] | None = None,
    sample_weight: Any = None,
    initial_epoch: int = 0,
    steps_per_epoch: int | None = None,
    validation_steps: int | None = None,
    validation_batch_size: int | None = None,
    validation_freq: Any = 1,
    safe_mode: bool = True,
    scale: Scale | None = None,
    run: Run | None = None,
    on_event: Callable[[Event], None] | None = None,
) -> Result:
    """Trains a Keras model, as `Model.fit` does, on one machine or many.

    Args:
        model: A function without arguments that builds and compiles the model; it is called once on
            each worker, under the strategy. Or a compiled model, which is trained in place. Or a
            checkpoint, or the path of one or of a `.keras` file, to train on from.
        x: A source (`raykeras.parquet`, `raykeras.npy`); an array (rows first), a DataFrame, or a list or
            dict of them by input; or batches: a `tf.data.Dataset`, a `PyDataset` or `Sequence`, a
            generator.
        y: As x, by output; with a source or batches, part of them.
        batch_size: Rows of a global batch, over all replicas; 32 by default.
        epochs: Epoch at which to stop, counted from 0.
        verbose: 0 silent, 1 a progress bar, 2 a line an epoch; "auto" is 1 on a terminal, else 2.
        callbacks: Keras callbacks, which run where the model is, and `raykeras.DriverCallback`s.
        validation_split: Fraction of the rows, the last in source order, kept for validation.
        validation_data: A source, or (x, y) or (x, y, sample_weight) of arrays. Takes precedence.
        shuffle: Whether rows are used in a new, seeded order each epoch; an int is the window in rows.
        class_weight: Class to weight, or that by output name; multiplies with the sample weights.
        sample_weight: Array, or dict of arrays by output name; with a source, part of the source.
        initial_epoch: Epoch to start at.
        steps_per_epoch: Batches of an epoch; the data goes on where it stopped and starts over. With arrays, and with
            batches of your own that are fewer, an epoch ends where they end, as in Keras 3.
        validation_steps: Batches of a validation, always the first ones.
        validation_batch_size: Rows of a validation batch; `batch_size` by default.
        validation_freq: Validate every so many epochs, or in these epochs.
        safe_mode: Whether to refuse a model's file that holds code, such as that of a Lambda layer; as
            `keras.saving.load_model`.
        scale: Workers, GPUs and replicas.
        run: Storage, name, seed, checkpoints, and what happens when something fails.
        on_event: Called in this process with each event.

    Returns:
        The history and the way to the model and its checkpoints.

    Raises:
        ValidationError: If what was asked for cannot be done; says why and what to do.
        ResourceError: If the cluster can never give what was asked for.
        UserCodeError: If the user's own code raised on a worker.
        WorkerLostError: If workers went away more often than `run` allows.
        CheckpointError: If a checkpoint is of another model, or cannot be written.
        KeyboardInterrupt: After Ctrl-C, when the run is saved.
        SystemExit: After SIGTERM or SIGHUP, when the run is saved; with 128 and the signal's number.
    """
    check_scale_and_run(scale, run)
    scale, run = scale or Scale(), run or Run()
    for name, size in (("batch_size", batch_size), ("validation_batch_size", validation_batch_size)):
        if size is not None:
            check_positive(name, size)
    check_counts(epochs=epochs, initial_epoch=initial_epoch, steps=steps_per_epoch, val_steps=validation_steps)
    model = as_model(model, safe_mode=safe_mode)
    display = make_display(verbose)
    driver_callbacks, worker_callbacks = split_callbacks(callbacks)

    quiet()
    floatx = current_floatx()
    given, held_out = _opened(open_data(x, y, sample_weight, floatx), validation_data, validation_split, floatx)
    steps_per_epoch = steps_within(given, steps_per_epoch, batch_size)
    common: dict[str, Any] = {"scale": scale, "seed": run.seed, "floatx": floatx}
    train = train_orders(
        given,
        batch_size=batch_size,
        shuffle=shuffle,
        class_weight=class_weight,
        steps_per_epoch=steps_per_epoch,
        **common,
    )
    validate = None
    if held_out is not None:
        size = validation_batch_size or batch_size or 32
        validate = validation_orders(held_out, batch_size=size, steps=validation_steps, **common)

    in_process = runs_here(scale)
    read_ahead([train, validate])
    room = Room()
    if not in_process or not in_memory([train, validate]):
        room = connect(scale, in_process=in_process)
    packed = None if in_process else pack_for_workers(model, worker_callbacks)
    folder = _folder(run)
    orders = Orders(
        train,
        validate,
        epochs,
        initial_epoch,
        steps_per_epoch,
        validation_freq,
        scale,
        run,
        folder,
        room,
        token=uuid.uuid4().hex,
        widest=scale,
    )
    found: list[Event] = []
    orders = resumed(orders, found.append)
    remove_abandoned()
    folder.make()
    folder.claim(orders.token)
    log, interrupt = RunLog(folder), Interrupt()
    handlers: list[Callable[[Event], None]] = [log, display, _warn_of_unserializable(), _warn_of_monitor(run.monitor)]
    handlers += [callback.dispatch for callback in driver_callbacks] + ([on_event] if on_event else [])
    try:
        outcome, live_model = _trained(orders, model, worker_callbacks, packed, handlers, found, interrupt)
    finally:
        display.close()
        log.close()
        remove_abandoned()  # of workers that were killed
    if outcome.left:
        raise interrupt.exception(f"The run was interrupted; it can go on from {redacted(folder.path)}.")
    build = None if is_model(model) or isinstance(model, ModelFile) else model
    params = {**outcome.params, "verbose": verbose}
    return Result(outcome.history, outcome.epoch, params, folder.path, live_model, build)


def _warn_of_unserializable() -> Callable[[Event], None]:
    """Return a handler that warns at the first checkpoint without a model's architecture."""
    is_warned = False

    def handle(event: Event) -> None:
        nonlocal is_warned
        if isinstance(event, events.CheckpointSaved) and event.unserializable and not is_warned:
            is_warned = True
            warnings.warn(
                f"Keras cannot serialise the model ({event.unserializable}). Its checkpoints hold the weights and the "
                "optimizer, and no architecture: load them into a model that your own function builds.",
                stacklevel=1,
            )

    return handle


def _warn_of_monitor(monitor: str) -> Callable[[Event], None]:
    """Return a handler that warns after the first epoch if there is no such metric."""
    is_done = monitor == Run.monitor

    def handle(event: Event) -> None:
        nonlocal is_done
        if not is_done and isinstance(event, events.EpochEnded):
            is_done = True
            if monitor not in event.logs:
                warnings.warn(
                    f"`Run.monitor` must be a metric of the training; got {monitor!r}.{nearest(monitor, event.logs)} "
                    f"Metrics: {listed(event.logs)}. No checkpoint is kept as the best one.",
                    stacklevel=1,
                )

    return handle


def _opened(given: Given, validation_data: Any, validation_split: float, floatx: str) -> tuple[Given, Given | None]:
    """The data to train on, and that to validate with."""
    if validation_data is not None:
        return given, open_validation(validation_data, floatx)
    if not validation_split:
        return given, None
    if not isinstance(given, Rows):
        raise OptionError(
            f"`validation_split` is for arrays and sources, whose rows are known; got {validation_split} with a "
            f"{given.described}. Give `validation_data`."
        )
    return given.split(validation_split)


def _trained(
    orders: Orders,
    model: Any,
    callbacks: list[Any],
    packed: Packed | None,
    handlers: Sequence[Callable[[Event], None]],
    found: Sequence[Event],
    interrupt: Interrupt,
) -> tuple[Outcome, Any]:
    """Trains by orders; the chief's outcome, and the model if it is in this process.

    Args:
        orders: Of the first attempt.
        model: As the user gave it.
        callbacks: Those that run on workers.
        packed: Model and callbacks for workers in processes of their own; None where this process is the worker.
        handlers: Take each event.
        found: Events of before.
        interrupt: What signals do meanwhile.
    """
    gathered = Gathering([interrupt.watch, *handlers])
    for event in found:
        gathered.send(event)

    def attempt(orders: Orders) -> tuple[Outcome, Any]:
        if packed is None:
            return fit_here(orders, model, callbacks, gathered, interrupt)
        return fit_on_workers(orders, model, callbacks, packed, gathered, interrupt)

    status, logs = "failed", {}
    try:
        with interrupt.handled():
            outcome, live_model = train_run(orders, attempt, gathered.send, interrupt)
        status = "interrupted" if outcome.left else "completed"
        logs = {name: values[-1] for name, values in outcome.history.items() if values}
    except (KeyboardInterrupt, SystemExit):
        status = "interrupted"
        raise
    except Exception as error:
        _write_traceback(orders.folder, error)
        raise
    finally:
        gathered.close(events.RunEnded(status=status, logs=logs))
    gathered.raise_failure()
    return outcome, live_model


def _write_traceback(folder: RunFolder, error: Exception) -> None:
    """Write all frames of an exception into the run's folder; best effort."""
    text = redacted("".join(traceback.format_exception(error)))
    if isinstance(error, UserCodeError) and error.full_traceback:
        text = error.full_traceback
    with contextlib.suppress(Exception):
        with folder.fs.open(folder / TRACEBACK_FILE, "w") as file:
            file.write(text)
        if isinstance(error, UserCodeError):
            error.traceback_file = folder / TRACEBACK_FILE


def _folder(run: Run) -> RunFolder:
    """The run's folder: one that holds nothing yet, or a run to go on with; without a name, one named by the time."""
    name = run.name or time.strftime("run-%Y%m%d-%H%M%S")
    for number in itertools.count(1):
        folder = RunFolder.under(run.storage, name if number == 1 else f"{name}-{number}")
        if folder.is_empty():
            return folder
        if run.name is not None:
            break
    if run.resume is not None and folder.is_run():
        return folder
    raise OptionError(
        f"A run needs a folder of its own; {folder.path!r} holds "
        + ("one already, and `resume` is None." if folder.is_run() else "something that is no run.")
        + " Give another `name`, or remove it."
    )
