"""`raykeras.fit`: validate the arguments, train the model on its workers, and return a `Result`."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from raykeras.checkpoint.model_io import ModelFile, as_model, is_model
from raykeras.checkpoint.store import RunFolder
from raykeras.compat.keras_api import current_floatx
from raykeras.compat.quiet import quiet
from raykeras.compat.versions import check_installed
from raykeras.core.config import Run, Scale
from raykeras.core.errors import OptionError, redacted
from raykeras.core.events import Event
from raykeras.core.temporary import remove_abandoned
from raykeras.core.tracebacks import without_frames
from raykeras.data.inputs import (
    OpenData,
    Rows,
    check_positive,
    check_scale_and_run,
    open_data,
    open_validation,
    steps_within,
    train_spec,
    validation_spec,
)
from raykeras.data.streaming.resources import CpuBudget
from raykeras.driver.callback import split_callbacks
from raykeras.driver.cluster import connect
from raykeras.driver.decisions import EpochDecisions
from raykeras.driver.event_log import RunLog
from raykeras.driver.interrupt import Interrupt
from raykeras.driver.launch import pack_for_workers
from raykeras.driver.progress import EarlyEvents, make_display
from raykeras.driver.prometheus import PrometheusGauges
from raykeras.driver.record import RunRecord, call_record
from raykeras.driver.restarts import resumed
from raykeras.driver.result import Result
from raykeras.driver.run_warnings import missing_monitor_warner, unserializable_warner
from raykeras.driver.shared_paths import check_sources, check_storage
from raykeras.driver.tensorboard import TensorBoardLog
from raykeras.driver.trackers import split_trackers, tracking
from raykeras.driver.training import train_job
from raykeras.driver.worker_group import check_strategy_scope, runs_here
from raykeras.worker.callback_placement import unwrapped
from raykeras.worker.job import TrainJob

_RECORDED_OTHERWISE = (
    *("model", "x", "y", "sample_weight", "validation_data", "callbacks", "on_event"),  # `call_record` describes them
    *("scale", "run"),  # recorded with their defaults
)
"""Arguments of `fit` whose values are not copied to `run.json`."""


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
    """Train a Keras model for a fixed number of epochs, on one machine or on a Ray cluster.

    The arguments are those of `keras.Model.fit`, plus `scale`, `run` and `on_event`. The history and the weights are
    those of `Model.fit` over the same batches, on any number of workers and after any number of restarts. Layers that
    draw random numbers or compute statistics on each replica (Dropout, and BatchNormalization unless
    `synchronized=True`) may differ between numbers of workers.

    Args:
        model: Model to train. It can be:

            - A function without arguments that builds and compiles a model. It is called once on each worker, inside
              the scope of the distribution strategy.
            - A compiled model. It is trained in place.
            - A `raykeras.Checkpoint`, or the path of a checkpoint or of a `.keras` file, to continue training from.
        x: Input data. It can be:

            - A source, made by `raykeras.parquet`, `raykeras.npy` or `raykeras.dataset`.
            - An array, tensor or DataFrame with rows first; or a list or dict of these, for a model with several
              inputs.
            - A `tf.data.Dataset`, `keras.utils.PyDataset`, `tf_keras.utils.Sequence`, `torch.utils.data.DataLoader` or
              generator of batches, each `(inputs, targets)` or `(inputs, targets, sample_weights)`.
        y: Target data. Like `x`, an array, tensor or DataFrame, or a list or dict of these by output. Should not be
            specified if `x` is a source or yields batches, since the targets are then obtained from `x`.
        batch_size: Integer or `None`. Number of rows per gradient update, over all replicas of all workers. Defaults
            to 32. Ignored if `x` yields batches.
        epochs: Integer. Epoch at which to stop, counted from 0. With `initial_epoch`, or when a run is resumed, this is
            the final epoch and not the number of epochs to train, as in Keras.
        verbose: `"auto"`, 0, 1, or 2. Verbosity mode. 0 = silent, 1 = progress bar, 2 = one line per epoch. `"auto"`
            becomes 1 on a terminal and in a notebook, and 2 elsewhere.
        callbacks: List of `keras.callbacks.Callback` and `raykeras.DriverCallback` instances, or one of them. Keras
            callbacks run on the workers, with metrics reduced over all replicas; when training ends, your objects
            have the attributes of the chief's (rank 0). Wrap a callback in `raykeras.on_chief` to run it on the chief
            only. Driver callbacks and those of MLflow, Weights & Biases and Comet run in this process.
        validation_split: Float between 0 and 1. Fraction of the rows to validate on instead of training on them: the
            last rows of `x` and `y`, before shuffling. Not supported if `x` yields batches.
        validation_data: Data on which to evaluate the loss and the metrics at the end of each epoch. Overrides
            `validation_split`. It can be:

            - A tuple `(x_val, y_val)` or `(x_val, y_val, val_sample_weights)` of arrays, or `x_val` alone.
            - A source, or an object that yields batches, as for `x`.
        shuffle: Boolean or integer. `True` uses the rows in a new order in each epoch. The order depends on the seed
            and the epoch, not on the number of workers. `False` uses the order of the source. An integer is the size of
            the shuffle window in rows. If `x` is a `PyDataset` or `Sequence`, its batches are shuffled; other objects
            that yield batches keep their order.
        class_weight: Optional dictionary that maps class indices (integers) to weights (floats), or output names to
            such dictionaries, to weight the loss during training. Multiplied with the sample weights.
        sample_weight: Optional array of weights for the training rows, or a dict of arrays by output name. Should not
            be specified if `x` is a source or yields batches, which contain the weights.
        initial_epoch: Integer. Epoch at which to start training, counted from 0.
        steps_per_epoch: Integer or `None`. Number of steps (batches) per epoch; `None` means one pass over the data.
            A source continues from epoch to epoch where it stopped, and starts over when it ends. With arrays, or if
            `x` yields fewer batches, an epoch ends where the data ends, as in Keras 3. Required if `x` is infinite, or
            if its length is unknown and there are several workers.
        validation_steps: Integer or `None`. Number of batches to validate on; the same first batches each time. `None`
            uses all of them. A generator continues instead, and therefore needs `validation_steps`.
        validation_batch_size: Integer or `None`. Number of rows per validation batch, over all replicas. Defaults to
            `batch_size`.
        validation_freq: Integer, or list of integers. Validate every `validation_freq` epochs, or at the end of the
            listed epochs, counted from 1.
        safe_mode: Boolean. Whether to refuse a `.keras` file that contains code, such as that of a `Lambda` layer; as
            in `keras.saving.load_model`.
        scale: `raykeras.Scale`. Number of workers, and the GPUs and replicas of each. Defaults to one worker in this
            process.
        run: `raykeras.Run`. Where to store the run, when to save checkpoints, and how to handle failures.
        on_event: Function that is called in this process with each `raykeras.Event`.

    Returns:
        A `raykeras.Result`. Its `history` attribute is a record of training and validation metrics at successive
        epochs, as `History.history` in Keras. It also gives access to the trained model and the checkpoints.

    Raises:
        ValidationError: If an argument, the data or the model is invalid. The message says what to change.
        ResourceError: If the cluster can never provide the requested resources.
        UserCodeError: If the user's code (model, loss, callback, transform) raises an exception on a worker.
        WorkerLostError: If workers are lost more often than `run.max_failures` allows.
        CheckpointError: If a checkpoint belongs to another model, or cannot be read or written.
        BaseException: Whatever `should_stop` of a driver callback raises, after the run is saved.
        KeyboardInterrupt: On Ctrl-C, after the run is saved.
        SystemExit: On SIGTERM or SIGHUP, after the run is saved; the code is 128 plus the signal's number.
    """
    arguments = {name: value for name, value in locals().items() if name not in _RECORDED_OTHERWISE}
    check_installed()
    check_scale_and_run(scale, run)
    scale, run = scale or Scale(), run or Run()
    for name, size in (("batch_size", batch_size), ("validation_batch_size", validation_batch_size)):
        if size is not None:
            check_positive(name, size)
    check_counts(epochs=epochs, initial_epoch=initial_epoch, steps=steps_per_epoch, val_steps=validation_steps)
    model = as_model(model, safe_mode=safe_mode)
    driver_callbacks, worker_callbacks = split_callbacks(callbacks)
    display = make_display(verbose, monitor=run.monitor)
    with contextlib.closing(display):
        early = EarlyEvents(display)
        early.begin("metadata")
        quiet()
        floatx = current_floatx()
        data = open_data(x, y, sample_weight, floatx)
        train_data, val_data = _open_both(data, validation_data, validation_split, floatx)
        steps_per_epoch = steps_within(train_data, steps_per_epoch, batch_size)
        common: dict[str, Any] = {"scale": scale, "seed": run.seed, "floatx": floatx}
        train = train_spec(
            train_data,
            batch_size=batch_size,
            shuffle=shuffle,
            class_weight=class_weight,
            steps_per_epoch=steps_per_epoch,
            **common,
        )
        validation = None
        if val_data is not None:
            size = validation_batch_size or batch_size or 32
            validation = validation_spec(val_data, batch_size=size, steps=validation_steps, **common)

        in_process = runs_here(scale)
        trackers: list[Any] = []
        if in_process:
            check_strategy_scope("fit")
        else:
            trackers, worker_callbacks = split_trackers(worker_callbacks)
        specs = [train] if validation is None else [train, validation]
        for spec in specs:
            spec.read_ahead()
        budget = CpuBudget()
        if not in_process or any(spec.uses_ray_data for spec in specs):
            early.begin("cluster")
            budget = connect(scale, in_process=in_process)
            check_sources(data.opened for data in (train_data, val_data) if isinstance(data, Rows))
        packed = None if in_process else pack_for_workers(model, worker_callbacks)
        folder = _run_folder(run)
        if not in_process:
            check_storage(folder)
        job = TrainJob(
            train,
            validation,
            epochs,
            initial_epoch,
            steps_per_epoch,
            validation_freq,
            scale,
            run,
            folder,
            budget,
            token=uuid.uuid4().hex,
            requested_scale=scale,
        )
        resume_events: list[Event] = []
        job = resumed(job, resume_events.append)
        interrupt = Interrupt()
        decisions = EpochDecisions(driver_callbacks, run.checkpoint_every is not None, interrupt)
        job = dataclasses.replace(job, awaits_decisions=decisions.are_needed)
        remove_abandoned()
        folder.make()
        folder.claim(job.token)
        call = call_record(
            {**arguments, "scale": scale, "run": run},
            model=model,
            data=train_data,
            validation=val_data,
            callbacks=[*driver_callbacks, *trackers, *unwrapped(worker_callbacks)],
        )
        log = RunLog(folder, job.token)
        log.add(RunRecord(log.local, call))
        log.add(TensorBoardLog(log.local))
        handlers: list[Callable[[Event], None]] = [
            log,
            early.show,
            unserializable_warner(),
            missing_monitor_warner(run.monitor),
            PrometheusGauges(),
        ]
        handlers += [callback.dispatch for callback in driver_callbacks] + ([on_event] if on_event else [])
        first_events = [*early.sent, *resume_events]
        try:
            with tracking(trackers) as tracker_callbacks:
                handlers += [*(callback.dispatch for callback in tracker_callbacks), decisions]
                outcome, live_model = train_job(
                    job, model, worker_callbacks, packed, handlers, first_events, interrupt, decisions
                )
        finally:
            display.close()
            log.close()
            remove_abandoned()  # temporary folders of killed workers
    if outcome.preempted or interrupt.error is not None:
        raise interrupt.exception(f"The run was interrupted; it can be resumed from {redacted(folder.path)}.")
    build = None if is_model(model) or isinstance(model, ModelFile) else model
    params = {**outcome.params, "verbose": verbose}
    return Result(outcome.history, outcome.epoch, params, folder.path, live_model, build)


def _open_both(
    data: OpenData, validation_data: Any, validation_split: float, floatx: str
) -> tuple[OpenData, OpenData | None]:
    """Return the training data and the validation data."""
    if validation_data is not None:
        return data, open_validation(validation_data, floatx)
    if not validation_split:
        return data, None
    if not isinstance(data, Rows):
        raise OptionError(
            f"`validation_split` is only supported for arrays and sources; got {validation_split} with a "
            f"{data.type_name}. Pass `validation_data` instead."
        )
    return data.split(validation_split)


def _run_folder(run: Run) -> RunFolder:
    """Return an empty folder for a new run, or the folder of the run to resume.

    A run without a name is named after the current time.

    Raises:
        OptionError: If the named folder holds a run that must not be resumed, or other files.
    """
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
        f"A new run needs an empty folder; {folder.path!r} holds "
        + ("a run, and `resume` is None." if folder.is_run() else "files that do not belong to a run.")
        + " Choose another `name`, or remove the folder."
    )


def check_counts(*, epochs: Any, initial_epoch: Any, steps: Any, val_steps: Any) -> None:
    """Raise OptionError unless the epochs are at least 0 and the steps are at least 1 or None."""
    for name, value in (("epochs", epochs), ("initial_epoch", initial_epoch)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 0:
            raise OptionError(f"`{name}` must be a whole number of at least 0; got {value!r}.")
    for name, value in (("steps_per_epoch", steps), ("validation_steps", val_steps)):
        if value is not None:
            check_positive(name, value)
