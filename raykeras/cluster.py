"""The Ray that a run uses: connected to, or started on this machine.

Enters: a `Scale`. Leaves: a Ray that can give what the run needs, or a `ResourceError`; and, once the
workers run, the share of it that each of their streams may use to read.

A task that makes data takes a whole CPU, or, where all nodes have only parts of one to spare, such a part: it would
wait for the rest for ever. What is to spare can be seen only while no such task runs. So it is found out once for all
that read, before any does: with several workers by the first of them, once all have their places.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import tempfile
import time
from dataclasses import dataclass, replace
from typing import Any

from raykeras.blocks import TASK_NBYTES
from raykeras.errors import ResourceError
from raykeras.noise import quiet
from raykeras.options import Scale
from raykeras.reads import Consumer, Reading, configure

_STORE_SHARE = 0.5  # of the object store, for rows on their way
_LEAST_CPUS, _BUSY_S, _POLL_S = 0.01, 5.0, 0.05


@dataclass(frozen=True)
class Room:
    """Logical CPUs of what a run starts.

    Attributes:
        cpus_per_worker: Of each worker; none where it is a process that runs anyway.
        cpus_per_task: Of each task that makes data.
    """

    cpus_per_worker: float = 0.0
    cpus_per_task: float = 1.0


def room_beside(cpus_per_worker: float, num_workers: int) -> Room:
    """Room for tasks beside so many workers that are still to be started."""
    return Room(cpus_per_worker, _cpus_per_task(cpus_per_worker * num_workers))


def room_found(room: Room, rank: int) -> Room:
    """The room as the workers find it, who all must call this before any of them reads."""
    from ray.train.collective import broadcast_from_rank_zero

    return replace(room, cpus_per_task=broadcast_from_rank_zero(None if rank else _cpus_per_task()))


def reading(room: Room, num_workers: int, num_streams: int) -> Reading:
    """What one stream of one rank may use to read.

    Called where the workers run, since an autoscaled cluster has its nodes only when they do.

    Args:
        room: As they found it.
        num_workers: How many there are.
        num_streams: Of each worker.
    """
    import ray

    resources = ray.cluster_resources()
    cpus = resources.get("CPU", 1) - room.cpus_per_worker * num_workers
    tasks = max(1, int((cpus + 1e-6) // num_workers))
    share = resources.get("object_store_memory", 0) * _STORE_SHARE / num_workers / num_streams
    wanted = (tasks + 2) * TASK_NBYTES  # one table being made for each CPU, one waiting, one being used
    return Reading(tasks * room.cpus_per_task, int(min(wanted, share)), room.cpus_per_task)


def _cpus_per_task(to_be_taken: float = 0.0) -> float:
    """Logical CPUs that each task may take: one, or a part that some node has to spare.

    Args:
        to_be_taken: Logical CPUs that are still free, and will not be when the tasks run.
    """
    import ray
    from ray._private.state import available_resources_per_node

    until = time.monotonic() + _BUSY_S
    while True:
        free = [node.get("CPU", 0.0) for node in available_resources_per_node().values()]
        most = round(max(free, default=0.0), 4)  # in units of Ray's
        if most or not ray.cluster_resources().get("CPU"):
            left = round(min(most, sum(free) - to_be_taken), 4)
            if left <= 0:  # there is more to come; what will be left of this is not a whole one
                left = round(most % 1, 4) or 1.0
            return min(left, 1.0)
        if time.monotonic() > until:
            return _LEAST_CPUS  # others' tasks follow each other, but a part as small fits between any two
        time.sleep(_POLL_S)


def connect(scale: Scale, *, in_process: bool) -> Room:
    """Uses the Ray that is connected, or one that runs here, or starts one.

    Args:
        scale: The workers.
        in_process: Whether the only one is this process.

    Returns:
        What the workers, and the tasks beside them, take.

    Raises:
        ResourceError: If it can never give the workers, CPUs or GPUs.
    """
    import ray

    started = False
    if not ray.is_initialized():
        started = _start(scale)
    if in_process:
        room = Room(cpus_per_task=1.0 if started else _cpus_per_task())
        if started:
            # of all CPUs, so that the first task that reads waits for this process instead of starting in another one
            ray.remote(num_cpus=ray.cluster_resources()["CPU"])(_import_what_reads).remote()
    import ray.data  # sets log levels of its own when it is imported

    quiet()
    if in_process:
        return room
    _start_coordinator()
    limit = _most_resources() or ray.cluster_resources()
    num_cpus, num_gpus = float(limit.get("CPU", 0)), float(limit.get("GPU", 0))
    cpus_per_worker = scale.cpus_per_worker
    if cpus_per_worker is None:
        # data tasks wait for ever where workers hold all CPUs
        share = (num_cpus - 1) / scale.workers
        cpus_per_worker = min(1.0, share if share >= 1 else max(round(share - 0.005, 2), 0.01))
    _require(scale, cpus_per_worker, num_cpus, num_gpus, started)
    return room_beside(cpus_per_worker, scale.workers)


def num_gpus_here() -> int:
    """GPUs of this machine, asked without TensorFlow."""
    from ray._private.accelerators import NvidiaGPUAcceleratorManager

    return int(NvidiaGPUAcceleratorManager.get_current_node_num_accelerators())


def _start(scale: Scale) -> bool:
    """Connect to where RAY_ADDRESS or `ray start` says, else start Ray; return whether it did.

    Raises:
        ResourceError: Ray does not start, twice.
    """
    import ray

    try:
        return _started(scale)
    except Exception:  # Ray raises a bare one where a node takes longer than its limit
        ray.shutdown()
    try:
        return _started(scale)
    except Exception as error:
        ray.shutdown()
        logs = os.path.join(os.environ.get("RAY_TMPDIR", tempfile.gettempdir()), "ray", "session_latest", "logs")
        raise ResourceError(
            f"Ray must start, within a limit of its own; it did not, twice: {type(error).__name__}: "
            f"{str(error).strip().splitlines()[0] if str(error).strip() else 'no message'} Its logs are in {logs!r}. "
            "Free CPUs and memory, or start it beforehand by `ray start --head`."
        ) from error


def _started(scale: Scale) -> bool:
    import ray

    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    workers_cpus = math.ceil(scale.workers * (scale.cpus_per_worker or 1))
    try:
        ray.init(
            num_cpus=(os.cpu_count() or 1) + workers_cpus,
            include_dashboard=False,
            # rows that were used stay in memory for this long; by default a second's worth of reading
            _system_config={"free_objects_period_milliseconds": 100},
            **options,
        )
    except ValueError:  # where there is a cluster, its size is not ours to say
        ray.init(**options)
        return False
    return True


def _start_coordinator() -> None:
    """Begins to start the actor that Ray Train's controller would start, and wait for."""
    with contextlib.suppress(ImportError):
        from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
            get_or_create_autoscaling_coordinator,
        )

        get_or_create_autoscaling_coordinator()


def _import_what_reads() -> None:
    """What a task that reads imports, its context unpickled, which takes a second."""
    from ray.data import DataContext

    import raykeras.sources.parquet  # noqa: F401

    configure(DataContext.get_current().copy(), Reading(), Consumer())


def _most_resources() -> dict[str, float] | None:
    """What an autoscaling cluster may grow to; None where it does not say."""
    from ray._private.state import state

    try:
        return state.get_max_resources_from_cluster_config()
    except Exception:
        return None


def _require(scale: Scale, cpus_per_worker: float, num_cpus: float, num_gpus: float, started: bool) -> None:
    where = "this machine" if started else "the cluster, grown as far as it may,"
    for what, each, there in (
        ("CPUs", cpus_per_worker, num_cpus - 1),
        ("GPUs", scale.gpus_per_worker, num_gpus),
    ):
        if scale.least * each > there:
            spare = " beside one that is left for reading data" if what == "CPUs" else ""
            fits = int(there // each) if each else 0
            raise ResourceError(
                f"{scale.least} workers with {each:g} {what} each need {scale.least * each:g}; {where} has "
                f"{max(there, 0):g}{spare}. Try `workers={max(1, fits)}`, or a larger cluster."
            )
