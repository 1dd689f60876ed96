"""Worker processes that run jobs, and the most informative of their exceptions.

A single worker runs in this process, in Ray Train's local mode. Several workers are processes, started by
`raykeras.compat.ray_train`; the driver then never imports TensorFlow.
"""

from __future__ import annotations

import contextlib
import math
import pickle
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from raykeras.compat.keras_api import KerasAPI
from raykeras.compat.ray_state import num_gpus_here
from raykeras.core.config import Scale
from raykeras.core.error_context import root_cause
from raykeras.core.errors import OptionError, RaykerasError, UserCodeError, WorkerLostError
from raykeras.core.temporary import TemporaryFolder
from raykeras.driver.placement import Reservation
from raykeras.worker.job_loop import JobExchange, JobResult, answer, run_jobs

_LOST_CONTACT = ("Unavailable", "Aborted", "Cancelled", "DeadlineExceeded", "Internal", "Unknown")
"""Exceptions of TensorFlow's collectives after another worker is lost, without "Error"."""

_POLL_S = 0.1

_OTHERS_FAIL_WITHIN_S = 1.0
"""How long workers get to report an exception that all of them raise."""

_LOSS_IS_NOTICED_WITHIN_S = 10.0
"""How long Ray Train gets to report the worker that was lost, if others report that they lost contact."""


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


class WorkerGroup:
    """Worker processes that Ray Train has placed and started, and that run one job after another.

    Args:
        scale: Number of workers and the GPUs of each.
        cpus_per_worker: Logical CPUs of each worker.
        reservation: Where to place the workers; None for where Ray Train places them.
        waits: Whether to wait indefinitely until the cluster can place the workers.
        devices: GPUs by rank, as in CUDA_VISIBLE_DEVICES, of workers that hold the reserved resources: the new ones
            stand by until they have ended, and hold none. None for workers that hold the resources.
    """

    def __init__(
        self,
        scale: Scale,
        cpus_per_worker: float,
        reservation: Reservation | None = None,
        *,
        waits: bool = True,
        devices: Mapping[int, str | None] | None = None,
    ) -> None:
        self._scale, self._reservation, self._waits, self._devices = scale, reservation, waits, devices
        self._cpus_per_worker = cpus_per_worker
        if reservation is not None:
            reservation.acquire()
        self._name = f".ray_train_{uuid.uuid4().hex}"  # unique, or Ray Train would restore an earlier run
        self._exchange = JobExchange(scale.workers)
        self._number = 0
        self._is_in_order = True
        self._is_closed = threading.Event()
        self._failure: BaseException | None = None
        # In a thread, because Ray Train would handle Ctrl-C itself in the main thread.
        self._thread = threading.Thread(target=self._run_jobs, name="raykeras-workers", daemon=True)
        self._thread.start()

    @property
    def is_usable(self) -> bool:
        """Whether the workers can run another job."""
        return self._is_in_order and self._thread.is_alive()

    @property
    def is_running(self) -> bool:
        """Whether the workers are up, or being started."""
        return self._thread.is_alive()

    def answers(self) -> bool:
        """Whether the workers are up; a lost one is noticed only after a moment, unless they are asked."""
        try:
            self.run(answer, {})
        except RaykerasError:
            return False
        return True

    def run(self, work: Callable[[dict[str, Any]], Any], config: dict[str, Any], api: KerasAPI | None = None) -> Any:
        """Run `work(config)` on every worker, one call at a time.

        Args:
            work: Function of a module, so that it is pickled by name.
            config: Argument of `work`. Must be picklable.
            api: Keras package that `work` uses, if any.

        Returns:
            The value that `work` returns on rank 0.

        Raises:
            RaykerasError: If a worker raises an exception or is lost.
        """
        import ray
        from ray.exceptions import RayError

        number, self._number = self._number, self._number + 1
        self._is_in_order = False  # until all workers have finished
        self._exchange.put(number, work, config, api)
        results = self._await(self._exchange.results(number)) or {}
        failures = _failures(results)
        if not failures and (results := self._await(self._exchange.all_results(number)) or {}):
            try:
                value = ray.get(results[0].value)[0]
            except RayError as error:
                raise _worker_lost(f"The worker of rank 0 was lost with its result: {error}") from error
            self._is_in_order = True
            return value
        if failures:  # the other workers may wait for the failed one, or have failed as well
            all_results = self._await(self._exchange.all_results(number), timeout_s=_OTHERS_FAIL_WITHIN_S)
            failures |= _failures(all_results or {})
            self._is_in_order = all_results is not None and not any(map(_is_lost_contact, failures.values()))
        self._raise_failure(failures)

    def stand_by(self) -> WorkerGroup | None:
        """Start workers that take the place of these if they are lost; None if they cannot be placed beside them."""
        if self._reservation is None:
            return None
        devices = self._exchange.devices()
        return WorkerGroup(self._scale, self._cpus_per_worker, self._reservation, waits=self._waits, devices=devices)

    def close(self, *, wait_s: float = 0.0) -> None:
        """End the workers.

        Args:
            wait_s: Seconds to wait until they have ended.
        """
        from raykeras.compat import ray_train

        self._is_closed.set()
        with contextlib.suppress(Exception):  # the cluster was lost
            if self.is_usable:
                self._exchange.end(self._number)
            else:
                ray_train.stop(self._name)
        self._is_in_order = False
        self._thread.join(wait_s)

    def _await(self, results: Any, timeout_s: float = math.inf) -> dict[int, JobResult] | None:
        """Return the results that a reference stands for; None after the time, or once Ray Train's run has ended."""
        import ray
        from ray.exceptions import RayError

        end = time.monotonic() + timeout_s
        try:
            while not ray.wait([results], timeout=_POLL_S)[0]:
                if not self._thread.is_alive() or time.monotonic() > end:
                    return None
            return dict(ray.get(results))
        except RayError:  # `_run_jobs` ends the exchange after the workers
            self._thread.join(_LOSS_IS_NOTICED_WITHIN_S)
            return None

    def _run_jobs(self) -> None:
        """Have Ray Train run the loop of jobs on the workers, and keep its error."""
        from raykeras.compat import ray_train

        reservation, holds_resources = self._reservation, self._devices is None
        scaling_config = _scaling_config(self._scale, self._cpus_per_worker, holds_resources)
        try:
            with TemporaryFolder("train") as folder:
                run_config = _run_config(self._name, folder, self._waits)
                config = {"exchange": self._exchange, "devices": self._devices}
                if reservation is not None:
                    reservation.wait(self._is_closed, indefinitely=self._waits)
                bundles = None if reservation is None else reservation.bundles
                ray_train.run_on_workers(run_jobs, config, scaling_config, run_config, bundles)
        except BaseException as error:
            self._failure = error
        if reservation is not None:
            reservation.release()
        with contextlib.suppress(Exception):  # the cluster was lost
            self._exchange.close()

    def _raise_failure(self, failures: Mapping[int, BaseException]) -> NoReturn:
        """Raise the most informative error.

        Args:
            failures: Exceptions of the last job by rank.
        """
        from ray.exceptions import RayError, RayTaskError
        from ray.train import ControllerError, WorkerGroupError

        from raykeras.compat import ray_train

        if failures and all(map(_is_lost_contact, failures.values())):  # Ray Train will notice who was lost
            self._thread.join(_LOSS_IS_NOTICED_WITHIN_S)
        error = self._failure
        if isinstance(error, WorkerGroupError):
            raise most_severe({**failures, **ray_train.exceptions_of_workers(error)}) from None
        if failures:
            raise most_severe(failures) from None
        if isinstance(error, ray_train.PREEMPTION_ERRORS):
            raise _worker_lost(f"A node of the run was preempted: {error}") from None
        if isinstance(error, ControllerError):
            raise _worker_lost(f"Ray Train's controller failed: {error.controller_failure}") from error
        if isinstance(error, RayTaskError):
            raise RaykerasError(f"Ray Train failed: {error}") from error
        if isinstance(error, RayError):  # the controller's node was lost
            raise _worker_lost(f"Ray Train's controller was lost: {error}") from error
        raise error or _worker_lost("The workers ended.")


def _failures(results: Mapping[int, JobResult]) -> dict[int, BaseException]:
    """Return the exceptions of failed workers by rank."""
    return {rank: pickle.loads(result.error) for rank, result in results.items() if result.error is not None}


def _scaling_config(scale: Scale, cpus_per_worker: float, holds_resources: bool) -> Any:
    from ray.train import ScalingConfig

    if not holds_resources:
        return ScalingConfig(num_workers=scale.workers, resources_per_worker={"CPU": 0})
    return ScalingConfig(
        num_workers=scale.workers,
        use_gpu=scale.gpus_per_worker > 0,
        resources_per_worker=scale.bundle(cpus_per_worker),
        placement_strategy=scale.placement.upper(),
        label_selector=None if scale.label_selector is None else dict(scale.label_selector),
    )


def _run_config(name: str, folder: str, waits: bool) -> Any:
    """Return Ray Train's configuration of a run that raykeras restarts.

    Args:
        name: Name of the run.
        folder: Folder for Ray Train's files. The workers write none.
        waits: Whether to wait indefinitely until the cluster can place the workers.
    """
    from ray.train import RunConfig

    from raykeras.compat.ray_train import no_restarts

    failure_config = no_restarts(controller_failure_limit=-1 if waits else 0)
    return RunConfig(name=name, storage_path=folder, failure_config=failure_config)


def _worker_lost(message: str) -> WorkerLostError:
    error = WorkerLostError(message)
    error.reason = message.splitlines()[0]
    return error


def most_severe(failures: Mapping[int, BaseException]) -> RaykerasError:
    """Return the most informative exception: when one worker fails, the others fail as a consequence.

    Errors of raykeras and of the user's code come first, then lost workers, and last workers that lost contact.

    Args:
        failures: The exception of each failed worker, by rank. At least one.
    """
    ranked: list[tuple[int, int, RaykerasError]] = []
    for rank, failure in sorted(failures.items()):
        error = root_cause(failure)
        is_consequence = _is_lost_contact(error)
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


def _is_lost_contact(failure: BaseException) -> bool:
    """Return whether an exception is one that TensorFlow raises if another worker is lost."""
    error = root_cause(failure)
    if not isinstance(error, UserCodeError):
        return False
    package, _, _ = error.cause.partition(".")
    return package == "tensorflow" and error.cause.rpartition(".")[2].removesuffix("Error") in _LOST_CONTACT


def _first_line(error: BaseException) -> str:
    """Return the line of a message that gives the cause: Ray's line with "because", or the first one."""
    text = str(getattr(error, "health_check_failure", error)).strip()
    lines = [line.strip() for line in text.splitlines()] or [type(error).__name__]
    return next((line for line in lines if "because" in line), lines[0])
