"""Runs one function on all workers.

Enters: a function and its arguments. Leaves: what the first worker returned, or one exception that
tells most. One worker runs in this process, through Ray Train's local mode; several are processes
of their own, through its `DataParallelTrainer`, and then this one never imports TensorFlow.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from raykeras.checkpoint import FOLDER, RunFolder
from raykeras.cluster import num_gpus_here
from raykeras.errors import RaykerasError, UserCodeError, WorkerLostError, root_cause
from raykeras.options import Scale

_POLL_VARIABLE, _POLL_S = "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2"
"""How often the controller looks at its workers: a checkpoint waits for a look, by default up to 2 s."""


def runs_here(scale: Scale) -> bool:
    """Whether the only worker can be this process."""
    return scale.workers == 1 and (not scale.gpus_per_worker or num_gpus_here() >= scale.gpus_per_worker)


def run_here(work: Callable[[], Any]) -> Any:
    """Runs `work` in this process."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    trainer = DataParallelTrainer(
        work,
        scaling_config=ScalingConfig(num_workers=0),
        run_config=RunConfig(name=FOLDER, storage_path=tempfile.gettempdir()),
    )
    return trainer.fit().return_value


def run_on_workers(
    work: Callable[[dict[str, Any]], Any],
    config: dict[str, Any],
    *,
    scale: Scale,
    cpus_per_worker: float,
    folder: RunFolder | None = None,
    keep: int | None = None,
) -> Any:
    """Runs `work(config)` on every worker.

    Args:
        work: A function of a module, so that it is pickled by name.
        config: Its argument; picklable.
        scale: How many workers.
        cpus_per_worker: Logical CPUs that each takes.
        folder: Where Ray Train keeps checkpoints that are reported.
        keep: How many of them.

    Raises:
        RaykerasError: What a worker raised, or that one went away.
    """
    import fsspec
    import pyarrow.fs
    from ray.exceptions import RayTaskError
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
    from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

    from raykeras.backend import TensorFlowBackendConfig

    filesystem, storage = None, folder.path if folder else tempfile.gettempdir()
    if folder and not folder.is_local:
        fs, storage = fsspec.core.url_to_fs(folder.path)
        filesystem = pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(fs))
    trainer = DataParallelTrainer(
        work,
        train_loop_config=config,
        backend_config=TensorFlowBackendConfig(),
        scaling_config=ScalingConfig(
            num_workers=scale.workers,
            use_gpu=scale.gpus_per_worker > 0,
            resources_per_worker={"CPU": cpus_per_worker, "GPU": scale.gpus_per_worker},
        ),
        run_config=RunConfig(
            name=FOLDER,
            storage_path=storage,
            storage_filesystem=filesystem,
            checkpoint_config=CheckpointConfig(num_to_keep=keep),
            failure_config=FailureConfig(max_failures=0),
        ),
    )
    try:
        with _polling():
            return trainer.fit().return_value
    except WorkerGroupError as error:
        raise worst(error.worker_failures) from None
    except ControllerError as error:
        raise RaykerasError(f"Ray Train's controller failed: {error.controller_failure}") from error
    except RayTaskError as error:
        raise RaykerasError(f"Ray Train failed: {error}") from error


@contextlib.contextmanager
def _polling() -> Iterator[None]:
    """Lets the controller look often, unless the user said how often."""
    given = os.environ.get(_POLL_VARIABLE)
    os.environ.setdefault(_POLL_VARIABLE, _POLL_S)
    try:
        yield
    finally:
        if given is None:
            del os.environ[_POLL_VARIABLE]


def worst(failures: Mapping[int, BaseException]) -> RaykerasError:
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
