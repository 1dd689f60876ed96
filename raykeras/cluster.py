"""The Ray that a run uses: connected to, or started on this machine.

Enters: a `Scale`. Leaves: a Ray that can give what the run needs, or a `ResourceError`; and, once the
workers run, the share of it that each of their streams may use to read.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from typing import Any

from raykeras.blocks import TASK_NBYTES
from raykeras.errors import ResourceError
from raykeras.noise import quiet
from raykeras.options import Scale
from raykeras.reads import Consumer, Reading, configure

_STORE_SHARE = 0.5  # of the object store, for rows on their way


def reading(scale: Scale, cpus_per_worker: float, num_streams: int, *, cpus_to_be_taken: float = 0.0) -> Reading:
    """What one stream of one rank may use to read.

    Called where the workers run, since an autoscaled cluster has its nodes only when they do.

    Args:
        scale, cpus_per_worker: The workers, and the logical CPUs of each, if they are processes of their own.
        num_streams: Of each worker.
        cpus_to_be_taken: Logical CPUs that are still free, and will not be.
    """
    import ray

    resources = ray.cluster_resources()
    taken = cpus_per_worker * scale.workers if scale.workers > 1 else 0
    cpus_per_task = cpus_per_data_task(cpus_to_be_taken)
    cpus = max(cpus_per_task, (resources.get("CPU", 1) - taken) // scale.workers)
    share = resources.get("object_store_memory", 0) * _STORE_SHARE / scale.workers / num_streams
    wanted = (cpus + 2) * TASK_NBYTES  # one table being made for each CPU, one waiting, one being used
    return Reading(cpus=cpus, store_nbytes=int(min(wanted, share)), cpus_per_task=cpus_per_task)


def cpus_per_data_task(to_be_taken: float = 0.0) -> float:
    """Logical CPUs of a task that makes data: one, or the part of one that is left where others hold parts.

    A task would wait for the rest of it for ever.

    Args:
        to_be_taken: Logical CPUs that are still free, and will not be when the tasks run.
    """
    from ray._private.state import available_resources_per_node

    free = [node.get("CPU", 0.0) for node in available_resources_per_node().values()]
    left = round(min(max(free, default=0.0), sum(free) - to_be_taken), 4)  # in units of Ray's
    return left if 0 < left < 1 else 1.0


def connect(scale: Scale, *, in_process: bool) -> float:
    """Uses the Ray that is connected, or one that runs here, or starts one.

    Returns:
        Logical CPUs that each worker takes.

    Raises:
        ResourceError: If it can never give the workers, CPUs or GPUs.
    """
    import ray

    started = False
    if not ray.is_initialized():
        started = _start(scale)
    if in_process and started:
        # of all CPUs, so that the first task that reads waits for this process instead of starting in another one
        ray.remote(num_cpus=ray.cluster_resources()["CPU"])(_import_what_reads).remote()
    import ray.data  # sets log levels of its own when it is imported

    quiet()
    if not in_process:
        _start_coordinator()
    limit = _most_resources() or ray.cluster_resources()
    num_cpus, num_gpus = float(limit.get("CPU", 0)), float(limit.get("GPU", 0))
    cpus_per_worker = scale.cpus_per_worker
    if cpus_per_worker is None:
        # data tasks wait for ever where workers hold all CPUs
        room = (num_cpus - 1) / scale.workers
        cpus_per_worker = min(1.0, room if room >= 1 else max(round(room - 0.005, 2), 0.01))
    if not in_process:
        _require(scale, cpus_per_worker, num_cpus, num_gpus, started)
    return cpus_per_worker


def num_gpus_here() -> int:
    """GPUs of this machine, asked without TensorFlow."""
    from ray._private.accelerators import NvidiaGPUAcceleratorManager

    return int(NvidiaGPUAcceleratorManager.get_current_node_num_accelerators())


def _start(scale: Scale) -> bool:
    """Connects to where RAY_ADDRESS or `ray start` says, else starts Ray; whether it did."""
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
