"""The user's call: checks it, starts Ray and Ray Train, gathers events, returns a `Result`.

Enters: what `fit` is called with. Leaves: a `Result`, and the run's folder. One worker runs in this
process, through Ray Train's local mode; several are processes of their own, and then this one never
imports TensorFlow.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import queue
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from raykeras import events
from raykeras.callbacks import DriverCallback, hand_back, into_artifacts
from raykeras.checkpoint import FOLDER, RunFolder
from raykeras.cluster import Cluster, connect, num_gpus_here
from raykeras.columns import Role, resolve
from raykeras.display import make_display
from raykeras.errors import OptionError, RaykerasError, UserCodeError, WorkerLostError
from raykeras.events import Event, EventSender
from raykeras.keras_api import KerasAPI, api_of, current_floatx, likely_api
from raykeras.noise import import_tensorflow, quiet
from raykeras.options import Run, Scale
from raykeras.orders import DataOrders, Orders, Outcome
from raykeras.plan import default_num_shards, window_rows_for
from raykeras.result import Result
from raykeras.sources import OpenSource, Source
from raykeras.sources.arrays import ArrayReader, from_arrays

_WHOLE_SHARD = 1 << 62  # a window without end: rows in memory cost nothing to shuffle
_QUEUE_WAIT_S = 0.2


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
            each worker, under the strategy. Or a compiled model, which is trained in place.
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
    batch_size = _batch_size("batch_size", 32 if batch_size is None else batch_size, scale)
    validation_batch_size = _batch_size("validation_batch_size", validation_batch_size or batch_size, scale)
    _check_counts(epochs=epochs, initial_epoch=initial_epoch, steps=steps_per_epoch, val_steps=validation_steps)
    display = make_display(verbose)
    driver_callbacks, worker_callbacks = _split_callbacks(callbacks)

    quiet()
    floatx = current_floatx()
    source, sequences = _as_source(x, y, sample_weight)
    opened = source.open()
    validation: tuple[Source, OpenSource, tuple[Role, ...]] | None = None
    if validation_data is not None:
        validation_source, validation_sequences = _as_validation(validation_data)
        validation = (validation_source, validation_source.open(), validation_sequences)
    elif validation_split:
        opened, held_out = _split(opened, validation_split)
        validation = (source, held_out, sequences)
    layout = resolve(source, opened, class_weight=class_weight, floatx=floatx, sequences=sequences)

    in_process = scale.workers == 1 and (not scale.gpus_per_worker or num_gpus_here() >= scale.gpus_per_worker)
    every = [opened] + ([validation[1]] if validation else [])
    cluster = Cluster(os.cpu_count() or 1, 0, 0, 1)
    if not in_process or not all(each.reader.in_memory for each in every):
        cluster = connect(scale, in_process=in_process)
    if not in_process:
        for each in every:
            if isinstance(each.reader, ArrayReader):
                each.reader.share()
    reading = cluster.reading(scale, len(every))
    num_shards = default_num_shards(scale.workers)

    by_index = opened.reader.in_memory and layout.transform is None
    window_rows = _WHOLE_SHARD if by_index else window_rows_for(layout.row_nbytes)
    if not isinstance(shuffle, bool):
        window_rows = _positive("shuffle", shuffle)
    train = DataOrders(
        opened,
        layout,
        "shuffled" if shuffle else "source",
        batch_size,
        num_shards,
        window_rows,
        run.seed,
        reading,
    )
    validate: DataOrders | None = None
    if validation is not None:
        source_, opened_, sequences_ = validation
        if validation_steps is not None:
            opened_ = opened_.slice(0, min(opened_.num_rows, validation_steps * validation_batch_size))
        layout_ = resolve(source_, opened_, floatx=floatx, sequences=sequences_)
        rows = window_rows_for(layout_.row_nbytes)
        validate = DataOrders(opened_, layout_, "sharded", validation_batch_size, num_shards, rows, run.seed, reading)
    folder = RunFolder.under(run.storage, run.name or time.strftime("run-%Y%m%d-%H%M%S"))
    if folder.exists() and folder.fs.ls(folder.path):
        raise OptionError(
            f"A run needs a folder of its own; {folder.path!r} holds one already. Give another `name`, or remove it."
        )
    orders = Orders(train, validate, epochs, initial_epoch, steps_per_epoch, validation_freq, scale, run, folder)
    folder.make()
    log = _RunLog(folder)
    handlers: list[Callable[[Event], None]] = [log, display]
    handlers += [callback.dispatch for callback in driver_callbacks] + ([on_event] if on_event else [])
    gathered = _Gathering(handlers)
    status, logs = "failed", {}
    try:
        train_it = _fit_here if in_process else _fit_on_workers
        outcome, live_model = train_it(orders, model, worker_callbacks, cluster, gathered)
        status, logs = "completed", {name: values[-1] for name, values in outcome.history.items() if values}
    finally:
        gathered.close(events.RunEnded(status=status, logs=logs))
        display.close()
        log.close()
    gathered.raise_failure()
    return Result(outcome.history, outcome.epoch, outcome.params, folder.path, live_model)


def _fit_here(
    orders: Orders, model: Any, callbacks: list[Any], cluster: Cluster, gathered: _Gathering
) -> tuple[Outcome, Any]:
    """One worker in this process, through Ray Train's local mode."""
    from ray import cloudpickle
    from ray.train import RunConfig, ScalingConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    import_tensorflow()
    from raykeras import worker

    is_model = not _is_build_function(model)
    api = api_of(model) if is_model else likely_api(cloudpickle.dumps(model))
    rebuild = is_model and orders.scale.replicas > 1  # its variables must be made under the strategy
    saved = save_model(model, api) if rebuild else None
    kept: list[Any] = []

    def build_and_keep() -> Any:
        made = load_model(saved, api) if saved is not None else model if is_model else model()
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
        trainer = DataParallelTrainer(
            work,
            scaling_config=ScalingConfig(num_workers=0),
            run_config=RunConfig(name=FOLDER, storage_path=tempfile.gettempdir()),
        )
        outcome = trainer.fit().return_value
    finally:
        sender.close()
    if outcome.variables is not None:
        _put_back(model, api, outcome.variables)
        return outcome, model
    return outcome, kept[-1]


def _fit_on_workers(
    orders: Orders, model: Any, callbacks: list[Any], cluster: Cluster, gathered: _Gathering
) -> tuple[Outcome, Any]:
    """Workers in processes of their own, through Ray Train."""
    import fsspec
    import pyarrow.fs
    from ray import cloudpickle
    from ray.exceptions import RayTaskError
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
    from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError
    from ray.util.queue import Queue

    from raykeras.backend import TensorFlowBackendConfig

    scale = orders.scale
    is_model = not _is_build_function(model)
    if is_model:
        api = api_of(model)
        build = cloudpickle.dumps((save_model(model, api), api))
    else:
        build = cloudpickle.dumps(model)
        api = likely_api(build)
    into_artifacts(callbacks, orders.folder / "artifacts")
    task = cloudpickle.dumps((orders, api, build, is_model, cloudpickle.dumps(callbacks)))

    pipe = Queue(actor_options={"num_cpus": 0})
    filesystem, storage = None, orders.folder.path
    if not orders.folder.is_local:
        fs, storage = fsspec.core.url_to_fs(orders.folder.path)
        filesystem = pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(fs))
    resources = {"CPU": cluster.cpus_per_worker, "GPU": scale.gpus_per_worker}
    trainer = DataParallelTrainer(
        _work,
        train_loop_config={"task": task, "pipe": pipe},
        backend_config=TensorFlowBackendConfig(),
        scaling_config=ScalingConfig(
            num_workers=scale.workers, use_gpu=scale.gpus_per_worker > 0, resources_per_worker=resources
        ),
        run_config=RunConfig(
            name=FOLDER,
            storage_path=storage,
            storage_filesystem=filesystem,
            checkpoint_config=CheckpointConfig(num_to_keep=orders.run.keep),
            failure_config=FailureConfig(max_failures=0),
        ),
    )
    try:
        with _forwarding(pipe, gathered):
            outcome = trainer.fit().return_value
    except WorkerGroupError as error:
        raise _worst(error.worker_failures) from None
    except ControllerError as error:
        raise RaykerasError(f"Ray Train's controller failed: {error.controller_failure}") from error
    except RayTaskError as error:
        raise RaykerasError(f"Ray Train failed: {error}") from error
    hand_back(callbacks, outcome.callback_states, cloudpickle.loads)
    if is_model:
        _put_back(model, api, outcome.variables)
        return outcome, model
    return outcome, None


def _work(config: dict[str, Any]) -> Outcome | None:
    """What Ray Train runs on each worker: the first line that imports TensorFlow."""
    quiet()
    import_tensorflow()
    import ray.train
    from ray import cloudpickle

    from raykeras import worker

    rank = ray.train.get_context().get_world_rank()
    orders, api, build, is_model, callbacks = cloudpickle.loads(config["task"])

    def built() -> Any:
        loaded = cloudpickle.loads(build)
        return load_model(*loaded) if is_model else loaded()

    sender = EventSender(config["pipe"].put) if rank == 0 else None
    try:
        outcome = worker.run(
            orders,
            rank=rank,
            api=api,
            build=built,
            callbacks=cloudpickle.loads(callbacks),
            send=sender.send if sender else print,
            save=worker.save_through_ray_train(orders, rank),
            dumps=cloudpickle.dumps,
            return_variables=is_model,
        )
    finally:
        if sender:
            sender.close()
    return outcome if rank == 0 else None


def save_model(model: Any, api: KerasAPI) -> tuple[bytes, dict[str, Any]]:
    """A compiled model as the bytes of its `.keras` file, and the user's own objects in it."""
    api.build_optimizer(model)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.keras")
        model.save(path)
        with open(path, "rb") as file:
            return file.read(), _custom_objects(model, api)


def load_model(saved: tuple[bytes, dict[str, Any]], api: KerasAPI) -> Any:
    """The reverse of `save_model`."""
    data, custom_objects = saved
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.keras")
        with open(path, "wb") as file:
            file.write(data)
        return api.module.models.load_model(path, custom_objects=custom_objects)


def _custom_objects(model: Any, api: KerasAPI) -> dict[str, Any]:
    """The user's own classes and functions that a model is made of, by name."""
    found: dict[str, Any] = {}

    def add(value: Any) -> None:
        if isinstance(value, Mapping):
            for part in value.values():
                add(part)
        elif isinstance(value, list | tuple):
            for part in value:
                add(part)
        elif value is not None and not isinstance(value, str | int | float | bool):
            kind = value if isinstance(value, type) or hasattr(value, "__code__") else type(value)
            if kind.__module__.split(".")[0] not in ("keras", "tf_keras", "builtins", "tensorflow", "numpy"):
                found[kind.__name__] = kind

    add(model)
    add(list(model._flatten_layers()))
    for name in ("loss", "optimizer", "metrics"):
        add(getattr(model, name, None))
    config = getattr(model, "_compile_config", None)
    add(getattr(config, "config", None))
    return found


def _put_back(model: Any, api: KerasAPI, values: Sequence[np.ndarray] | None) -> None:
    """Trained variables into the user's own model."""
    api.build_optimizer(model)
    for variable, value in zip(api.variables(model), values or (), strict=True):
        variable.assign(value)


class _RunLog:
    """Writes `events.jsonl` and `history.csv` of a run. On storage that cannot append, at its end."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._local = folder.path if folder.is_local else tempfile.mkdtemp(prefix="raykeras-log-")
        self._events = open(os.path.join(self._local, "events.jsonl"), "a")  # noqa: SIM115
        self._history: list[dict[str, Any]] = []

    def __call__(self, event: Event) -> None:
        self._events.write(json.dumps(event.as_dict(), default=str) + "\n")
        if not isinstance(event, events.BatchEnded):
            self._events.flush()
        if isinstance(event, events.EpochEnded):
            self._history.append({"epoch": event.epoch, **event.logs})
            self._write_history()
            self._upload()

    def close(self) -> None:
        self._events.close()
        self._upload()

    def _write_history(self) -> None:
        names = list(dict.fromkeys(name for row in self._history for name in row))
        with open(os.path.join(self._local, "history.csv"), "w", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(self._history)

    def _upload(self) -> None:
        if self._folder.is_local:
            return
        if not self._events.closed:
            self._events.flush()
        for name in os.listdir(self._local):
            self._folder.fs.put_file(os.path.join(self._local, name), self._folder / name)


class _Gathering:
    """The driver's end of the event stream: a thread that hands each event to all handlers."""

    def __init__(self, handlers: Sequence[Callable[[Event], None]]) -> None:
        self.queue: queue.SimpleQueue[list[Event] | None] = queue.SimpleQueue()
        self._handlers = list(handlers)
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._gather, name="raykeras-gather", daemon=True)
        self._thread.start()

    def close(self, last: Event) -> None:
        """Hands on what has come, and a last event."""
        self.queue.put([last])
        self.queue.put(None)
        self._thread.join()

    def raise_failure(self) -> None:
        """Raises what a handler raised; it was not called again after that."""
        if self._failure is not None:
            raise self._failure

    def _gather(self) -> None:
        while (batch := self.queue.get()) is not None:
            for event in batch:
                for handler in list(self._handlers):
                    try:
                        handler(event)
                    except Exception as error:
                        self._handlers.remove(handler)
                        self._failure = self._failure or error


@contextlib.contextmanager
def _forwarding(pipe: Any, gathered: _Gathering) -> Iterator[None]:
    """Moves events from Ray's queue to the driver's, until all have come."""
    from ray.util.queue import Empty

    done = threading.Event()

    def forward() -> None:
        while True:
            finished = done.is_set()
            try:
                gathered.queue.put(pipe.get(timeout=_QUEUE_WAIT_S))
            except Empty:
                if finished:
                    return
            except Exception:  # the queue's node is gone
                return

    thread = threading.Thread(target=forward, name="raykeras-forward", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        pipe.shutdown(force=True)


def _worst(failures: Mapping[int, BaseException]) -> RaykerasError:
    """Of the workers' exceptions the one that tells most: others fail because one did."""
    ranked: list[tuple[int, int, RaykerasError]] = []
    for rank, failure in sorted(failures.items()):
        error: Any = failure
        while error is not None and not isinstance(error, RaykerasError):
            error = getattr(error, "_base_exc", None) or getattr(error, "cause", None) or error.__cause__
        if error is None:
            lost = WorkerLostError(f"The worker of rank {rank} went away: {str(failure).strip().splitlines()[0]}")
            ranked.append((2, rank, lost))
        else:
            follows = isinstance(error, UserCodeError) and error.cause.startswith("tensorflow.")
            ranked.append((1 if follows else 0, rank, error))
    return min(ranked, key=lambda entry: entry[:2])[2]


def _is_build_function(model: Any) -> bool:
    if hasattr(model, "fit") and hasattr(model, "train_step"):
        return False
    if not callable(model):
        raise OptionError(f"`model` must be a compiled model or a function that builds one; got {model!r}.")
    return True


def _split_callbacks(callbacks: Any) -> tuple[list[DriverCallback], list[Any]]:
    if callbacks is None:
        return [], []
    every = list(callbacks) if isinstance(callbacks, list | tuple) else [callbacks]
    for callback in every:
        if isinstance(callback, type) or not hasattr(callback, "on_epoch_end"):
            raise OptionError(f"`callbacks` must be callback objects; got {callback!r}.")
    return (
        [c for c in every if isinstance(c, DriverCallback)],
        [c for c in every if not isinstance(c, DriverCallback)],
    )


def _as_source(x: Any, y: Any, sample_weight: Any) -> tuple[Source, tuple[Role, ...]]:
    """What the user passed as x, y and sample_weight, as a source; and the roles that are lists."""
    if isinstance(x, Source):
        for name, value in (("y", y), ("sample_weight", sample_weight)):
            if value is not None:
                raise OptionError(f"`{name}` is part of the source; give it there: `rk.parquet(..., {name}=...)`.")
        return x, ()
    return from_arrays(x, y, sample_weight), ()


def _as_validation(data: Any) -> tuple[Source, tuple[Role, ...]]:
    if isinstance(data, Source):
        return data, ()
    if isinstance(data, tuple) and len(data) in (2, 3):
        return _as_source(data[0], data[1], data[2] if len(data) == 3 else None)
    raise OptionError(
        "`validation_data` must be a source, (x, y) or (x, y, sample_weight); got "
        f"{type(data).__name__}{f' of {len(data)}' if isinstance(data, tuple) else ''}."
    )


def _split(opened: OpenSource, fraction: float) -> tuple[OpenSource, OpenSource]:
    """As `keras.src.trainers.data_adapters.array_slicing.train_validation_split`: the last rows."""
    if not 0 < fraction < 1:
        raise OptionError(f"`validation_split` must be above 0 and below 1; got {fraction!r}.")
    at = int(np.floor(opened.num_rows * (1 - fraction)))
    if at == 0 or at == opened.num_rows:
        raise OptionError(
            f"`validation_split={fraction}` must leave rows on both sides; of {opened.num_rows} it leaves {at} to "
            "train on. Give `validation_data`."
        )
    return opened.slice(0, at), opened.slice(at, opened.num_rows)


def _batch_size(name: str, value: Any, scale: Scale) -> int:
    size = _positive(name, value)
    if size < scale.num_replicas:
        raise OptionError(
            f"`{name}` must be at least the number of replicas, since it is the global batch; got {size} and "
            f"{scale.num_replicas}. Try `{name}={scale.num_replicas}`, or fewer workers."
        )
    return size


def _positive(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise OptionError(f"`{name}` must be a whole number of at least 1; got {value!r}.")
    return int(value)


def _check_counts(*, epochs: Any, initial_epoch: Any, steps: Any, val_steps: Any) -> None:
    _positive("epochs", epochs)
    if isinstance(initial_epoch, bool) or not isinstance(initial_epoch, int) or not 0 <= initial_epoch < epochs:
        raise OptionError(
            f"`initial_epoch` must be at least 0 and below `epochs`; got {initial_epoch!r} and {epochs!r}."
        )
    for name, value in (("steps_per_epoch", steps), ("validation_steps", val_steps)):
        if value is not None:
            _positive(name, value)
