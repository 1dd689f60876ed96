"""The CPUs and the object store memory that a run's read tasks may use.

A read task takes one logical CPU or, if no node has a whole CPU to spare, the fraction that one has: a task that needs
more is never scheduled. This is determined once, before any process reads, while no read task holds CPUs.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

from raykeras.compat.ray_data import ReadLimits
from raykeras.compat.ray_state import free_resources_per_node
from raykeras.data.streaming.reader import TASK_NBYTES

_STORE_SHARE = 0.5  # fraction of the object store for rows that are read ahead


_MIN_CPUS, _BUSY_S, _POLL_S = 0.01, 5.0, 0.05


@dataclass(frozen=True)
class CpuBudget:
    """Logical CPUs of a run's workers and tasks.

    Attributes:
        cpus_per_worker: Logical CPUs of each worker; 0 if the worker is the calling process.
        cpus_per_task: Logical CPUs of each task that reads rows or makes batches, above 0 and at most 1.
    """

    cpus_per_worker: float = 0.0
    cpus_per_task: float = 1.0


def plan_budget(cpus_per_worker: float, num_workers: int) -> CpuBudget:
    """Return the budget for `num_workers` workers that have not been started yet, and for their tasks."""
    return CpuBudget(cpus_per_worker, spare_cpus_per_task(cpus_per_worker * num_workers))


def discover_budget(budget: CpuBudget, rank: int) -> CpuBudget:
    """Return the budget that is available now that the workers run.

    Every worker must call this, before any of them reads: rank 0 decides.
    """
    from ray.train.collective import broadcast_from_rank_zero

    return replace(budget, cpus_per_task=broadcast_from_rank_zero(None if rank else spare_cpus_per_task()))


def reading(budget: CpuBudget, num_workers: int, num_streams: int) -> ReadLimits:
    """Return what one stream of one rank may use to read.

    Must be called while the workers run: an autoscaled cluster has all its nodes only then.

    Args:
        budget: Logical CPUs of workers and tasks.
        num_workers: Number of workers.
        num_streams: Streams of each worker, such as training and validation data.
    """
    import ray

    resources = ray.cluster_resources()
    cpus = resources.get("CPU", 1) - budget.cpus_per_worker * num_workers
    tasks = max(1, int((cpus + 1e-6) // num_workers))
    share = resources.get("object_store_memory", 0) * _STORE_SHARE / num_workers / num_streams
    sufficient = (tasks + 2) * TASK_NBYTES  # one table being made per CPU, one waiting, one in use
    return ReadLimits(tasks * budget.cpus_per_task, int(min(sufficient, share)), budget.cpus_per_task)


def spare_cpus_per_task(reserved_cpus: float = 0.0) -> float:
    """Return the logical CPUs of a task: one, or the fraction that a node has to spare.

    Waits for up to 5 s while other tasks hold all CPUs.

    Args:
        reserved_cpus: Logical CPUs that are free now but will be taken when the tasks run.
    """
    import ray

    until = time.monotonic() + _BUSY_S
    while True:
        free = [node.get("CPU", 0.0) for node in free_resources_per_node().values()]
        most = round(max(free, default=0.0), 4)  # Ray counts resources in units of 0.0001
        if most or not ray.cluster_resources().get("CPU"):
            left = round(min(most, sum(free) - reserved_cpus), 4)
            if left <= 0:  # the cluster will grow; on the present nodes only the fractions of CPUs will be left
                left = round(most % 1, 4) or 1.0
            return min(left, 1.0)
        if time.monotonic() > until:
            return _MIN_CPUS  # small enough to be scheduled between the tasks of others
        time.sleep(_POLL_S)
