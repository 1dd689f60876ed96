"""Runs one function on all workers.

Enters: a function and its arguments. Leaves: what the first worker returned, or one exception that
tells most. One worker runs in this process, through Ray Train's local mode; several are processes
of their own, through `raykeras.trainer`, and then this one never imports TensorFlow.
"""

from __future__ import annotations

import tempfile
import threading
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from raykeras.checkpoint import RunFolder
from raykeras.cluster import num_gpus_here
from raykeras.errors import RaykerasError, UserCodeError, WorkerLostError, root_cause
from raykeras.options import Scale

_LOST_CONTACT = tuple(
    f"tensorflow.python.framework.errors_impl.{name}Error"
    for name in ("Unavailable", "Aborted", "Cancelled", "DeadlineExceeded", "Internal", "Unknown")
)
"""What a collective raises when another worker is gone."""


def runs_here(scale: Scale) -> bool:
    """Whether the only worker can be this process."""
    return bool(scale.workers == 1) and (not scale.gpus_per_worker or num_gpus_here() >= scale.gpus_per_worker)


def run_here(work: Callable[[], Any]) -> Any:
    """Runs `work` in this process."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    trainer = DataParallelTrainer(
        work,
        scaling_config=ScalingConfig(num_workers=0),
        run_config=RunConfig(name="raykeras", storage_path=tempfile.gettempdir()),
    )
    return trainer.fit().return_value


def run_on_workers(
    work: Callable[[dict[str, Any]], Any],
    config: dict[str, Any],
    *,
    scale: Scale,
    cpus_per_worker: float,
    folder: RunFolder | None = None,
    waits: bool = True,
) -> Any:
    """Runs `work(config)` on every worker.

    Args:
        work: A function of a module, so that it is pickled by name.
        config: Its argument; picklable.
        scale: How many workers.
        cpus_per_worker: Logical CPUs that each takes.
        folder: On storage that all workers reach, for Ray Train's own files.
        waits: Whether to wait for ever for the cluster to have room for them.

    Raises:
        RaykerasError: What a worker raised, or that one went away.
    """
    import fsspec
    import pyarrow.fs
    from ray.exceptions import RayError, RayTaskError
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.api.exceptions import ControllerError, PreemptionError, WorkerGroupError

    from raykeras.trainer import TensorFlowBackendConfig, WorkersTrainer

    filesystem, storage = None, folder.path if folder else tempfile.gettempdir()
    if folder and not folder.is_local:
        fs, storage = fsspec.core.url_to_fs(folder.path)
        filesystem = pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(fs))
    trainer = WorkersTrainer(
        work,
        train_loop_config=config,
        backend_config=TensorFlowBackendConfig(),
        scaling_config=ScalingConfig(
            num_workers=scale.workers,
            use_gpu=scale.gpus_per_worker > 0,
            resources_per_worker={"CPU": cpus_per_worker, "GPU": scale.gpus_per_worker},
        ),
        run_config=RunConfig(
            name=f".ray_train_{uuid.uuid4().hex}",  # a new one each time, or it would look for what it did before
            storage_path=storage,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(
                max_failures=0, max_preemption_failures=0, controller_failure_limit=-1 if waits else 0
            ),
        ),
    )
    try:
        return _in_thread(trainer.fit).return_value
    except WorkerGroupError as error:
        raise worst(error.worker_failures) from None
    except PreemptionError as error:
        raise _lost(f"A node of the run was taken away: {error}") from None
    except ControllerError as error:
        raise _lost(f"Ray Train's controller failed: {error.controller_failure}") from error
    except RayTaskError as error:
        raise RaykerasError(f"Ray Train failed: {error}") from error
    except RayError as error:  # the controller's node is gone
        raise _lost(f"Ray Train's controller went away: {error}") from error


def _lost(message: str) -> WorkerLostError:
    lost = WorkerLostError(message)
    lost.reason = message.splitlines()[0]
    return lost


def _in_thread(function: Callable[[], Any]) -> Any:
    """Runs a function in a thread, so that the main one handles Ctrl-C: Ray Train would, in its own way."""
    done: dict[str, Any] = {}

    def run() -> None:
        try:
            done["value"] = function()
        except BaseException as error:
            done["error"] = error

    thread = threading.Thread(target=run, name="raykeras-train", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.1)
    if "error" in done:
        raise done["error"]
    return done["value"]


def worst(failures: Mapping[int, BaseException]) -> RaykerasError:
    """Of the workers' exceptions the one that tells most: others fail because one did."""
    ranked: list[tuple[int, int, RaykerasError]] = []
    for rank, failure in sorted(failures.items()):
        error = root_cause(failure)
        follows = isinstance(error, UserCodeError) and error.cause.startswith(_LOST_CONTACT)
        if isinstance(error, RaykerasError) and not follows:
            ranked.append((0, rank, error))
            continue
        lost = WorkerLostError(f"The worker of rank {rank} went away: {_first_line(failure)}")
        lost.rank, lost.reason = rank, _first_line(failure)
        if follows:
            lost = WorkerLostError(f"The worker of rank {rank} lost contact with another one: {_first_line(error)}")
            lost.rank, lost.reason = None, _first_line(error)
        ranked.append((2 if follows else 1, rank, lost))
    return min(ranked, key=lambda entry: entry[:2])[2]


def _first_line(error: BaseException) -> str:
    """What went wrong, in one line; of a worker's end what Ray says of its cause."""
    text = str(getattr(error, "health_check_failure", error)).strip()
    lines = [line.strip() for line in text.splitlines()] or [type(error).__name__]
    return next((line for line in lines if "because" in line), lines[0])
