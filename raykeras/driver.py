"""The user's call: checks it, gives the orders, gathers events, returns a `Result`.

Enters: what `fit` is called with. Leaves: a `Result`, and the run's folder.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from raykeras import events
from raykeras.arguments import (
    as_source,
    as_validation,
    check_batch_size,
    check_counts,
    check_positive,
    split_callbacks,
    split_rows,
)
from raykeras.checkpoint import RunFolder
from raykeras.cluster import connect
from raykeras.columns import Role
from raykeras.display import make_display
from raykeras.errors import OptionError
from raykeras.events import Event
from raykeras.gathering import Gathering, RunLog
from raykeras.group import runs_here
from raykeras.keras_api import current_floatx
from raykeras.launch import fit_here, fit_on_workers
from raykeras.noise import quiet
from raykeras.options import Run, Scale
from raykeras.orders import DataOrders, Orders
from raykeras.plan import default_num_shards, window_rows_for
from raykeras.result import Result
from raykeras.sources import OpenSource, Source
from raykeras.sources.arrays import ArrayReader
from raykeras.specs import check_weights, resolve
from raykeras.transfer import is_model

_WHOLE_SHARD = 1 << 62  # a window without end: rows in memory cost nothing to shuffle


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
    scale: Scale | None = None,
    run: Run | None = None,
    on_event: Callable[[Event], None] | None = None,
) -> Result:
    """Trains a Keras model, as `Model.fit` does, on one machine or many.

    Args:
        model: A function without arguments that builds and compiles the model; it is called once on
            each worker, under the strategy. Or a compiled model, which is trained in place. Or a
            checkpoint, or the path of one or of a `.keras` file, to train on from.
        x: A source (`raykeras.parquet`, `raykeras.npy`), an array (rows first), or a dict of arrays
            by input name.
        y: Array, or dict of arrays by output name; with a source, part of the source.
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
        steps_per_epoch: Batches of an epoch; the data goes on where it stopped and starts over.
        validation_steps: Batches of a validation, always the first ones.
        validation_batch_size: Rows of a validation batch; `batch_size` by default.
        validation_freq: Validate every so many epochs, or in these epochs.
        scale: Workers, GPUs and replicas.
        run: Storage, name, seed and checkpoints.
        on_event: Called in this process with each event.

    Returns:
        The history and the way to the model and its checkpoints.

    Raises:
        ValidationError: If what was asked for cannot be done; says why and what to do.
        ResourceError: If the cluster can never give what was asked for.
        UserCodeError: If the user's own code raised on a worker.
    """
    scale, run = scale or Scale(), run or Run()
    batch_size = check_batch_size("batch_size", 32 if batch_size is None else batch_size, scale)
    validation_batch_size = check_batch_size("validation_batch_size", validation_batch_size or batch_size, scale)
    check_counts(epochs=epochs, initial_epoch=initial_epoch, steps=steps_per_epoch, val_steps=validation_steps)
    is_model(model)  # raises if it is nothing that could be one
    display = make_display(verbose)
    driver_callbacks, worker_callbacks = split_callbacks(callbacks)

    quiet()
    floatx = current_floatx()
    source, sequences = as_source(x, y, sample_weight)
    opened = source.open()
    validation: tuple[Source, OpenSource, tuple[Role, ...]] | None = None
    if validation_data is not None:
        validation_source, validation_sequences = as_validation(validation_data)
        validation = (validation_source, validation_source.open(), validation_sequences)
    elif validation_split:
        opened, held_out = split_rows(opened, validation_split)
        validation = (source, held_out, sequences)
    layout = resolve(source, opened, class_weight=class_weight, floatx=floatx, sequences=sequences)
    check_weights(opened, layout)

    in_process = runs_here(scale)
    every = [opened] + ([validation[1]] if validation else [])
    cpus_per_worker = 0.0
    if not in_process or not all(each.reader.in_memory for each in every):
        cpus_per_worker = connect(scale, in_process=in_process)
    if not in_process:
        for each in every:
            if isinstance(each.reader, ArrayReader):
                each.reader.share()
    num_shards = default_num_shards(scale.workers)

    by_index = opened.reader.in_memory and layout.transform is None
    window_rows = _WHOLE_SHARD if by_index else window_rows_for(layout.row_nbytes)
    if not isinstance(shuffle, bool):
        window_rows = check_positive("shuffle", shuffle)
    train = DataOrders(
        opened,
        layout,
        "shuffled" if shuffle else "source",
        batch_size,
        num_shards,
        window_rows,
        run.seed,
    )
    validate: DataOrders | None = None
    if validation is not None:
        source_, opened_, sequences_ = validation
        if validation_steps is not None:
            opened_ = opened_.slice(0, min(opened_.num_rows, validation_steps * validation_batch_size))
        layout_ = resolve(source_, opened_, floatx=floatx, sequences=sequences_)
        check_weights(opened_, layout_)
        rows = window_rows_for(layout_.row_nbytes)
        validate = DataOrders(opened_, layout_, "sharded", validation_batch_size, num_shards, rows, run.seed)
    folder = RunFolder.under(run.storage, run.name or time.strftime("run-%Y%m%d-%H%M%S"))
    if folder.exists() and folder.fs.ls(folder.path):
        raise OptionError(
            f"A run needs a folder of its own; {folder.path!r} holds one already. Give another `name`, or remove it."
        )
    orders = Orders(
        train, validate, epochs, initial_epoch, steps_per_epoch, validation_freq, scale, run, folder, cpus_per_worker
    )
    folder.make()
    log = RunLog(folder)
    handlers: list[Callable[[Event], None]] = [log, display]
    handlers += [callback.dispatch for callback in driver_callbacks] + ([on_event] if on_event else [])
    gathered = Gathering(handlers)
    status, logs = "failed", {}
    try:
        train_it = fit_here if in_process else fit_on_workers
        outcome, live_model = train_it(orders, model, worker_callbacks, gathered)
        status, logs = "completed", {name: values[-1] for name, values in outcome.history.items() if values}
    finally:
        gathered.close(events.RunEnded(status=status, logs=logs))
        display.close()
        log.close()
    gathered.raise_failure()
    return Result(outcome.history, outcome.epoch, outcome.params, folder.path, live_model)
