"""The number of workers of an elastic run, and when to change it.

Ray Train starts and places the workers. Its elastic policy is not used, because it leaves no CPU for read tasks and
stops workers in the middle of a step, which loses the steps since the last checkpoint. Here the workers save a
checkpoint and exit after the same step.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections.abc import Iterator

from raykeras.compat.ray_state import draining_nodes, free_resources_per_node
from raykeras.worker.coordinator import RunCoordinator
from raykeras.worker.job import TrainJob

_LOG = logging.getLogger("raykeras")


_SETTLED_S = 5.0  # start with fewer than the maximum once the capacity has not changed for this long


_WARN_S = 30.0


_POLL_S = 0.5


_CHECK_INTERVAL_S = 2.0


def wait_for_capacity(job: TrainJob) -> int:
    """Wait until the cluster can start at least the minimum number of workers of a run.

    Args:
        job: The job that the workers will run.

    Returns:
        The number of workers to start, in the `worker_range` of the requested scale.
    """
    import ray
    from ray.autoscaler.sdk import request_resources

    scale = job.requested_scale
    min_workers, max_workers = scale.worker_range
    bundle = scale.bundle(job.budget.cpus_per_worker)
    with contextlib.suppress(Exception):  # the cluster has no autoscaler
        request_resources(bundles=[bundle] * max_workers)
    last_workers, is_warned, start = -1, False, time.monotonic()
    changed_at = start
    while True:
        workers, now = min(capacity(job), max_workers), time.monotonic()
        if workers < min_workers:
            workers = min(capacity(job, allow_partial_cpu=True), min_workers)
        if workers != last_workers:
            last_workers, changed_at = workers, now
        if workers == max_workers or (workers >= min_workers and now - changed_at >= _SETTLED_S):
            return workers
        if not is_warned and now - start > _WARN_S:
            is_warned = True
            num_nodes = sum(node["Alive"] for node in ray.nodes())
            _LOG.warning(
                "raykeras is waiting for %d workers; the %d nodes have capacity for %d.",
                min_workers,
                num_nodes,
                workers,
            )
        time.sleep(_POLL_S)


@contextlib.contextmanager
def watched_capacity(job: TrainJob, coordinator: RunCoordinator) -> Iterator[None]:
    """Preempt the workers when a node drains or more workers fit, while the block runs."""
    closed = threading.Event()

    def watch() -> None:
        free_since: float | None = None
        while not closed.wait(_CHECK_INTERVAL_S):
            try:
                notes = coordinator.notes()
                worker_nodes = {facts.get("node_id") for facts in notes.values()}
                if worker_nodes & draining_nodes():
                    _LOG.warning("raykeras: a node is draining; the workers save a checkpoint and exit.")
                    return coordinator.request("leave")
                if len(notes) < job.scale.workers or job.scale.workers == job.requested_scale.workers:
                    continue
                free_since = (free_since or time.monotonic()) if capacity(job) > 0 else None
                if free_since and time.monotonic() - free_since >= job.grow_after_s:
                    return coordinator.request("leave")
            except Exception:  # the workers, or the cluster, have just ended
                return None

    thread = threading.Thread(target=watch, name="raykeras-elastic", daemon=True)
    thread.start()
    try:
        yield
    finally:
        closed.set()


def capacity(job: TrainJob, *, allow_partial_cpu: bool = False) -> int:
    """Return how many more workers could be started now, with one CPU left for read tasks.

    Args:
        job: The job that the workers would run.
        allow_partial_cpu: Whether a fraction of a CPU is enough for read tasks, where other tasks hold the rest of it.
    """
    import ray

    cpus_per_worker = job.budget.cpus_per_worker
    bundle = job.scale.bundle(cpus_per_worker)
    usable_nodes = {node["NodeID"] for node in ray.nodes() if node["Alive"]} - draining_nodes()
    total, reserved = 0, math.inf  # reserved: the fewest workers to leave out so that a read task fits on some node
    for node, resources in free_resources_per_node().items():
        if node not in usable_nodes:
            continue
        cpus = resources.get("CPU", 0.0)
        fits = min(int((resources.get(name, 0.0) + 1e-6) // amount) for name, amount in bundle.items())
        total += fits
        if cpus >= 1:
            task_cpus = (round(cpus % 1, 4) if allow_partial_cpu else 0) or 1
            missing_cpus = task_cpus - (cpus - fits * cpus_per_worker) - 1e-6
            reserved = min(reserved, max(0, math.ceil(missing_cpus / cpus_per_worker)))
    return total - (0 if reserved is math.inf else int(reserved))
