"""Connect to Ray, or start it, and check that it can run the workers.

A data task requests one logical CPU, or a fraction where no node has a whole CPU to spare: otherwise the task is never
scheduled. The spare CPUs are visible only while no data task runs, so they are measured once, before the first read;
with several workers, rank 0 measures them again once all workers are placed.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import tempfile
from collections.abc import Mapping
from typing import Any

from raykeras.compat.patch import default_environment
from raykeras.compat.quiet import quiet
from raykeras.compat.ray_state import may_grow
from raykeras.core.config import Scale
from raykeras.core.errors import ResourceError
from raykeras.data.streaming.resources import CpuBudget, plan_budget, spare_cpus_per_task
from raykeras.driver import worker_pool
from raykeras.driver.nodes import check_versions
from raykeras.driver.placement import reserved_bundles

_MAX_MESSAGE = 500  # several lines of Ray's, as those with the versions of the cluster and of this process

_CPUS_ON_ADDED_NODES = 0.9
"""Logical CPUs of a worker on nodes of unknown size: less than one, so that a node of one CPU can also read data."""

_SETTINGS = {"RAY_free_objects_period_milliseconds": "100"}  # how long consumed rows stay in the object store


def connect(scale: Scale, *, in_process: bool) -> CpuBudget:
    """Connect to a Ray cluster, or start Ray on this machine if there is none.

    Args:
        scale: Number of workers and the resources of each.
        in_process: Whether the only worker is this process.

    Returns:
        The logical CPUs of each worker and of each data task.

    Raises:
        ResourceError: If Ray does not start; if its nodes cannot provide the workers, CPUs or GPUs, and no autoscaler
            may add others; if the placement group of this process has room for some of the workers only; or if a node
            has other versions than this process.
    """
    import ray

    started = False
    if not ray.is_initialized():
        started = _start(scale)
    check_versions()
    if in_process:
        budget = CpuBudget(cpus_per_task=1.0 if started else spare_cpus_per_task())
    import ray.data  # sets log levels on import

    quiet()
    if in_process:
        return budget
    if not started:
        _start_ray_data(ray.get_runtime_context().gcs_address)
    cpus_per_worker = _cpus_per_worker(scale, started)
    is_up = worker_pool.prepare(scale, cpus_per_worker)
    is_reserved = is_up or reserved_bundles(scale, cpus_per_worker) is not None  # and therefore not free anyway
    return plan_budget(cpus_per_worker, 0 if is_reserved else scale.workers)


def _start(scale: Scale) -> bool:
    """Connect to the cluster of RAY_ADDRESS or `ray start`, or start Ray, with one retry.

    Returns:
        Whether Ray was started.

    Raises:
        ResourceError: If both attempts fail.
    """
    import ray

    try:
        return _init_ray(scale)
    except Exception:  # Ray raises a bare `Exception` if a node takes too long to start
        ray.shutdown()
    try:
        return _init_ray(scale)
    except Exception as error:
        ray.shutdown()
        logs = os.path.join(os.environ.get("RAY_TMPDIR", tempfile.gettempdir()), "ray", "session_latest", "logs")
        raise ResourceError(
            f"Ray must start, or be reachable; it failed twice: {type(error).__name__}: "
            f"{' '.join(str(error).split())[:_MAX_MESSAGE] or 'no message'} Its logs are in {logs!r}. "
            "Free CPUs and memory, or start Ray beforehand with `ray start --head`."
        ) from error


def _init_ray(scale: Scale) -> bool:
    """Connect to a cluster, or start Ray; return whether it was started."""
    import ray

    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    workers_cpus = math.ceil(scale.workers * (scale.cpus_per_worker or 1))
    try:
        with default_environment(_SETTINGS):
            ray.init(num_cpus=(os.cpu_count() or 1) + workers_cpus, include_dashboard=False, **options)
    except ValueError:  # an existing cluster does not accept `num_cpus`
        ray.init(**options)
        return False
    return True


@functools.cache
def _start_ray_data(cluster: str) -> None:
    """Start Ray Data's actors on this node.

    They stay in the cluster, on the node of the process that uses Ray Data first. On a worker's node they would keep
    the autoscaler from removing it after the run.

    Args:
        cluster: Address of the cluster; called once for each.
    """
    import ray.data

    dataset = ray.data.from_items([0]).map_batches(_unchanged, num_cpus=0)
    dataset.context.enable_progress_bars = dataset.context.print_on_execution_start = False
    dataset.materialize()


def _unchanged(batch: Any) -> Any:
    return batch


def _cpus_per_worker(scale: Scale, started: bool) -> float:
    """Return the logical CPUs of each worker.

    Args:
        scale: Number of workers and the resources of each.
        started: Whether this process started Ray.

    Raises:
        ResourceError: If the present nodes cannot provide the workers, and no autoscaler may add others.
    """
    import ray

    present, cpus_per_worker, is_short_of_cpus = ray.cluster_resources(), scale.cpus_per_worker, False
    if cpus_per_worker is None:
        # leave a CPU for data tasks, which are never scheduled if workers hold all of them
        share = (present.get("CPU", 0.0) - 1) / scale.workers
        is_short_of_cpus = share < 1
        cpus_per_worker = max(round(share - 0.005, 2), 0.01) if is_short_of_cpus else 1.0
    message = _shortage(scale, cpus_per_worker, present, "this machine" if started else "the cluster")
    if (message or is_short_of_cpus) and not started and may_grow():
        return scale.cpus_per_worker or _CPUS_ON_ADDED_NODES
    if message:
        raise ResourceError(message)
    return cpus_per_worker


def _shortage(scale: Scale, cpus_per_worker: float, present: Mapping[str, float], where: str) -> str | None:
    """Return a message about the resource of which there is too little; None if there is enough of each."""
    min_workers, _ = scale.worker_range
    for name, per_worker in scale.bundle(cpus_per_worker).items():
        is_cpu, resource = name == "CPU", f"{name}s" if name in ("CPU", "GPU") else name
        available = present.get(name, 0.0) - is_cpu
        if min_workers * per_worker > available:
            reserved = ", not counting one that is reserved for reading data" if is_cpu else ""
            max_workers = int(available // per_worker) if per_worker else 0
            return (
                f"{min_workers} workers with {per_worker:g} {resource} each need "
                f"{min_workers * per_worker:g}; {where} has {max(available, 0):g}{reserved}. Try "
                f"`workers={max(1, max_workers)}`, or a larger cluster."
            )
    return None
