"""Run a function on all workers, and raise the most informative of their exceptions.

A single worker runs in this process, in Ray Train's local mode. Several workers are processes, started by
`raykeras.compat.ray_train`; the driver then never imports TensorFlow.
"""

from __future__ import annotations

import sys
import tempfile
import threading
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from raykeras.checkpoint.store import RunFolder
from raykeras.compat.ray_state import num_gpus_here
from raykeras.core.config import Scale
from raykeras.core.error_context import root_cause
from raykeras.core.errors import OptionError, RaykerasError, UserCodeError, WorkerLostError
from raykeras.driver.placement import reserved_bundles

_LOST_CONTACT = ("Unavailable", "Aborted", "Cancelled", "DeadlineExceeded", "Internal", "Unknown")
"""Exceptions of TensorFlow's collectives after another worker is lost, without "Error"."""


def runs_here(scale: Scale) -> bool:
    """Return whether there is one worker and it can be this process."""
    return bool(scale.workers == 1) and (not scale.gpus_per_worker or num_gpus_here() >= scale.gpus_per_worker)


def check_strategy_scope(function: str) -> None:
    """Refuse a call in the scope of a strategy, in which the strategy of this process cannot be entered.

    Args:
        function: Name of the function that the user called.

    Raises:
        OptionError: A scope is open.
    """
    tf = sys.modules.get("tensorflow")
    if tf is not None and tf.distribute.has_strategy():
        name = type(tf.distribute.get_strategy()).__name__
        raise OptionError(
            f"`{function}` must be called outside of `strategy.scope()`, because it creates the strategy; got a call "
            f"in the scope of a {name}. Move the call out of the `with` block; the model may stay in it."
        )


def run_here(work: Callable[[], Any]) -> Any:
    """Run `work` in this process, as Ray Train's only worker; return its value."""
    from raykeras.compat import ray_train

    return ray_train.run_here(work)


def run_on_workers(
    work: Callable[[dict[str, Any]], Any],
    config: dict[str, Any],
    *,
    scale: Scale,
    cpus_per_worker: float,
    folder: RunFolder | None = None,
    waits: bool = True,
) -> Any:
    """Run `work(config)` on every worker.

    Args:
        work: Module-level function, so that it is pickled by name.
        config: Argument of `work`. Must be picklable.
        scale: Number of workers and the GPUs of each.
        cpus_per_worker: Logical CPUs of each worker.
        folder: Folder for Ray Train's files, on storage that all workers can reach.
        waits: Whether to wait indefinitely until the cluster can place the workers.

    Returns:
        The value that `work` returns on rank 0.

    Raises:
        RaykerasError: If a worker raises an exception or is lost.
    """
    from ray.exceptions import RayError, RayTaskError
    from ray.train import ControllerError, ScalingConfig, WorkerGroupError

    from raykeras.compat import ray_train

    run_config, bundles = _run_config(folder, waits), reserved_bundles(scale, cpus_per_worker)
    scaling_config = ScalingConfig(
        num_workers=scale.workers,
        use_gpu=scale.gpus_per_worker > 0,
        resources_per_worker={"CPU": cpus_per_worker, "GPU": scale.gpus_per_worker},
    )
    try:
        return _in_thread(lambda: ray_train.run_on_workers(work, config, scaling_config, run_config, bundles))
    except WorkerGroupError as error:
        raise most_severe(ray_train.exceptions_of_workers(error)) from None
    except ray_train.PREEMPTION_ERRORS as error:
        raise _worker_lost(f"A node of the run was preempted: {error}") from None
    except ControllerError as error:
        raise _worker_lost(f"Ray Train's controller failed: {error.controller_failure}") from error
    except RayTaskError as error:
        raise RaykerasError(f"Ray Train failed: {error}") from error
    except RayError as error:  # the controller's node was lost
        raise _worker_lost(f"Ray Train's controller was lost: {error}") from error


def _run_config(folder: RunFolder | None, waits: bool) -> Any:
    """Return Ray Train's configuration of a run that raykeras restarts; see `run_on_workers`."""
    import fsspec
    import pyarrow.fs
    from ray.train import RunConfig

    from raykeras.compat.ray_train import no_restarts

    filesystem, storage = None, folder.path if folder else tempfile.gettempdir()
    if folder and not folder.is_local:
        fs, storage = fsspec.core.url_to_fs(folder.path)
        filesystem = pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(fs))
    return RunConfig(
        name=f".ray_train_{uuid.uuid4().hex}",  # unique, or Ray Train would restore an earlier run
        storage_path=storage,
        storage_filesystem=filesystem,
        failure_config=no_restarts(controller_failure_limit=-1 if waits else 0),
    )


def _worker_lost(message: str) -> WorkerLostError:
    error = WorkerLostError(message)
    error.reason = message.splitlines()[0]
    return error


def _in_thread(function: Callable[[], Any]) -> Any:
    """Call a function in a thread, because Ray Train would handle Ctrl-C itself in the main thread."""
    result: dict[str, Any] = {}

    def run() -> None:
        try:
            result["value"] = function()
        except BaseException as error:
            result["error"] = error

    thread = threading.Thread(target=run, name="raykeras-train", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.1)
    if "error" in result:
        raise result["error"]
    return result["value"]


def most_severe(failures: Mapping[int, BaseException]) -> RaykerasError:
    """Return the most informative exception: when one worker fails, the others fail as a consequence.

    Errors of raykeras and of the user's code come first, then lost workers, and last workers that lost contact.

    Args:
        failures: The exception of each failed worker, by rank. At least one.
    """
    ranked: list[tuple[int, int, RaykerasError]] = []
    for rank, failure in sorted(failures.items()):
        error = root_cause(failure)
        is_consequence = isinstance(error, UserCodeError) and _is_lost_contact(error.cause)
        if isinstance(error, RaykerasError) and not is_consequence:
            ranked.append((0, rank, error))
            continue
        lost = WorkerLostError(f"The worker of rank {rank} was lost: {_first_line(failure)}")
        lost.rank, lost.reason = rank, _first_line(failure)
        if is_consequence:
            lost = WorkerLostError(f"The worker of rank {rank} lost contact with another worker: {_first_line(error)}")
            lost.rank, lost.reason = None, _first_line(error)
        ranked.append((2 if is_consequence else 1, rank, lost))
    return min(ranked, key=lambda entry: entry[:2])[2]


def _is_lost_contact(cause: str) -> bool:
    """Return whether an exception, by its qualified name, is one that TensorFlow raises if another worker is lost."""
    package, _, _ = cause.partition(".")
    return package == "tensorflow" and cause.rpartition(".")[2].removesuffix("Error") in _LOST_CONTACT


def _first_line(error: BaseException) -> str:
    """Return the line of a message that gives the cause: Ray's line with "because", or the first one."""
    text = str(getattr(error, "health_check_failure", error)).strip()
    lines = [line.strip() for line in text.splitlines()] or [type(error).__name__]
    return next((line for line in lines if "because" in line), lines[0])
