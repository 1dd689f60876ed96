"""Starts the workers of a run and waits for them.

Enters: the orders, the model, the callbacks. Leaves: the chief's `Outcome`, or one exception that
tells most. One worker runs in this process, through Ray Train's local mode; several are processes of
their own, through its `DataParallelTrainer`, and then this one never imports TensorFlow.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from typing import Any

from raykeras.callbacks import hand_back, into_artifacts
from raykeras.checkpoint import FOLDER
from raykeras.errors import OptionError, RaykerasError, UserCodeError, WorkerLostError, root_cause
from raykeras.events import EventSender
from raykeras.gathering import Gathering, forwarding
from raykeras.keras_api import api_of, likely_api
from raykeras.noise import import_tensorflow, quiet
from raykeras.orders import Orders, Outcome
from raykeras.transfer import load_model, put_back, save_model


def fit_here(orders: Orders, model: Any, callbacks: list[Any], gathered: Gathering) -> tuple[Outcome, Any]:
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
        put_back(model, api, outcome.variables)
        return outcome, model
    return outcome, kept[-1]


def fit_on_workers(orders: Orders, model: Any, callbacks: list[Any], gathered: Gathering) -> tuple[Outcome, Any]:
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
    resources = {"CPU": orders.cpus_per_worker, "GPU": scale.gpus_per_worker}
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
        with forwarding(pipe, gathered):
            outcome = trainer.fit().return_value
    except WorkerGroupError as error:
        raise _worst(error.worker_failures) from None
    except ControllerError as error:
        raise RaykerasError(f"Ray Train's controller failed: {error.controller_failure}") from error
    except RayTaskError as error:
        raise RaykerasError(f"Ray Train failed: {error}") from error
    hand_back(callbacks, outcome.callback_states, cloudpickle.loads)
    if is_model:
        put_back(model, api, outcome.variables)
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


def _worst(failures: Mapping[int, BaseException]) -> RaykerasError:
    """Of the workers' exceptions the one that tells most: others fail because one did."""
    ranked: list[tuple[int, int, RaykerasError]] = []
    for rank, failure in sorted(failures.items()):
        error = root_cause(failure)
        if not isinstance(error, RaykerasError):
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
