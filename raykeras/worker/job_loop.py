"""Worker processes that run one job after another, because starting new ones takes seconds.

The driver puts a job into an actor, every worker takes it from there, and the actor collects what they return.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import socket
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from raykeras.compat.keras_api import KerasAPI
from raykeras.compat.quiet import import_tensorflow, quiet
from raykeras.core.errors import RaykerasError
from raykeras.worker.coordinator import local_actor_options

if TYPE_CHECKING:
    from raykeras.worker.process_state import ProcessState  # imports TensorFlow


@dataclass(frozen=True)
class JobResult:
    """What one worker made of a job. Picklable without the packages of the user's code.

    Attributes:
        value: A list with a reference to the return value of rank 0; empty for other ranks and after a failure.
        error: The pickled exception of a failed worker; None if it succeeded.
    """

    value: list[Any]
    error: bytes | None = None


class JobExchange:
    """Handle of the actor through which a driver gives jobs to its workers. Picklable.

    Args:
        num_ranks: Number of workers.
    """

    def __init__(self, num_ranks: int) -> None:
        import ray

        self._actor = ray.remote(**local_actor_options(num_ranks))(_JobExchangeActor).remote(num_ranks)

    def join(self, rank: int, address: str, devices: str | None) -> list[str]:
        """Wait until all workers have called this; return their addresses by rank.

        Args:
            rank: Rank of the calling worker.
            address: Its address.
            devices: Its GPUs, as in CUDA_VISIBLE_DEVICES.
        """
        import ray

        return list(ray.get(self._actor.join.remote(rank, address, devices)))

    def devices(self) -> dict[int, str | None]:
        """Return the GPUs of all workers by rank, as in CUDA_VISIBLE_DEVICES, once all have joined."""
        import ray

        return dict(ray.get(self._actor.devices.remote()))

    def put(self, number: int, work: Callable[[Any], Any], config: Any, api: KerasAPI | None) -> None:
        """Give a job to all workers.

        Args:
            number: Number of the job, from 0.
            work: Function that every worker calls, defined in a module.
            config: Argument of `work`.
            api: Keras package that `work` uses, if any.
        """
        import ray

        # in the object store, because object references inside a pickle are never released
        self._actor.put.remote(number, [ray.put((work, config, api))])

    def end(self, number: int) -> None:
        """Tell the workers to end instead of running the job of this number."""
        import ray

        if ray.is_initialized():
            self._actor.put.remote(number, None)

    def next(self, number: int) -> tuple[Callable[[Any], Any], Any, KerasAPI | None] | None:
        """Wait for a job, and return what `put` got; None at the end."""
        import ray

        job = ray.get(self._actor.next.remote(number))
        return None if job is None else ray.get(job[0])

    def finish(self, number: int, rank: int, result: JobResult) -> None:
        """Record what a worker made of a job."""
        import ray

        ray.get(self._actor.finish.remote(number, rank, result))

    def results(self, number: int) -> Any:
        """Return a reference to a dict of `JobResult` by rank, complete once a worker failed or all have finished."""
        return self._actor.results.remote(number)

    def all_results(self, number: int) -> Any:
        """Return the same, complete once all workers have finished. The actor then forgets the job."""
        return self._actor.all_results.remote(number)

    def close(self) -> None:
        """Kill the actor."""
        import ray

        if ray.is_initialized():  # or `kill` would start Ray
            ray.kill(self._actor)


def run_jobs(config: dict[str, Any]) -> None:
    """Run jobs on this worker of Ray Train until the driver ends it.

    TensorFlow is imported here, not in Ray Train's controller.

    Args:
        config: "exchange" is the `JobExchange` of the workers; "devices" maps each rank to its GPUs, as in
            CUDA_VISIBLE_DEVICES; None for those that Ray assigns.
    """
    import ray.train
    from ray.exceptions import RayError

    exchange, rank, devices = config["exchange"], ray.train.get_context().get_world_rank(), config["devices"]
    if devices is not None and (visible := devices[rank]) is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible
    quiet()
    import_tensorflow()
    state: ProcessState | None = None
    for number in itertools.count():
        try:
            job = exchange.next(number)
            if job is not None and state is None:
                state = _join(exchange, rank)
        except RayError:  # the driver has ended
            return
        if job is None or state is None:
            return
        exchange.finish(number, rank, _result(job, rank, state))
        if job[0] is not answer:
            del job
            state.restore()


def answer(config: Any) -> None:
    """Do nothing: a job that shows whether all workers are up."""


def _join(exchange: JobExchange, rank: int) -> ProcessState:
    """Set TF_CONFIG, from which TensorFlow knows the other workers; the ports must be free just before it starts."""
    from raykeras.worker.process_state import ProcessState

    addresses = exchange.join(rank, _free_address(), os.environ.get("CUDA_VISIBLE_DEVICES"))
    if len(addresses) > 1:
        cluster = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": rank}}
        os.environ["TF_CONFIG"] = json.dumps(cluster)
    return ProcessState()


def _free_address() -> str:
    """Return the address of this node with a port that is free."""
    import ray

    host = ray.util.get_node_ip_address()
    is_ipv6 = ":" in host
    with socket.socket(socket.AF_INET6 if is_ipv6 else socket.AF_INET) as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    return f"[{host}]:{port}" if is_ipv6 else f"{host}:{port}"


def _result(job: tuple[Callable[[Any], Any], Any, KerasAPI | None], rank: int, state: ProcessState) -> JobResult:
    """Run one job."""
    import ray
    from ray import cloudpickle

    work, config, api = job
    try:
        if api is not None:
            state.add(api)
        value = work(config)
        return JobResult([ray.put(value)] if rank == 0 else [])
    except Exception as error:
        try:
            return JobResult([], cloudpickle.dumps(error))
        except Exception:  # the exception holds what cannot be pickled
            return JobResult([], cloudpickle.dumps(RaykerasError(f"{type(error).__name__}: {error}")))


class _JobExchangeActor:
    """The actor behind `JobExchange`; its methods are the same."""

    def __init__(self, num_ranks: int) -> None:
        self._num_ranks = num_ranks
        self._jobs: defaultdict[int, _Job] = defaultdict(_Job)
        self._joined: dict[int, tuple[str, str | None]] = {}
        self._have_joined = asyncio.Event()

    async def join(self, rank: int, address: str, devices: str | None) -> list[str]:
        self._joined[rank] = (address, devices)
        if len(self._joined) == self._num_ranks:
            self._have_joined.set()
        await self._have_joined.wait()
        return [address for _, (address, _) in sorted(self._joined.items())]

    async def devices(self) -> dict[int, str | None]:
        await self._have_joined.wait()
        return {rank: devices for rank, (_, devices) in self._joined.items()}

    async def put(self, number: int, task: list[Any] | None) -> None:
        self._jobs[number].task = task
        self._jobs[number].is_put.set()

    async def next(self, number: int) -> list[Any] | None:
        job = self._jobs[number]
        await job.is_put.wait()
        return job.task

    async def finish(self, number: int, rank: int, result: JobResult) -> None:
        job = self._jobs[number]
        job.results[rank] = result
        if len(job.results) == self._num_ranks:
            job.task = None  # releases it
            job.is_finished.set()
        if job.is_finished.is_set() or result.error is not None:
            job.is_decided.set()

    async def results(self, number: int) -> dict[int, JobResult]:
        await self._jobs[number].is_decided.wait()
        return self._jobs[number].results

    async def all_results(self, number: int) -> dict[int, JobResult]:
        await self._jobs[number].is_finished.wait()
        return self._jobs.pop(number).results


class _Job:
    """A job in the actor."""

    def __init__(self) -> None:
        self.task: list[Any] | None = None
        self.results: dict[int, JobResult] = {}
        self.is_put, self.is_decided, self.is_finished = asyncio.Event(), asyncio.Event(), asyncio.Event()
