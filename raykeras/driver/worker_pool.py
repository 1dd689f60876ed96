"""Workers that stay up between calls: the next call with the same scale uses them.

They end once they have been idle for `Scale.idle_timeout_s`, once anything in the cluster waits for resources, or when
a call needs other workers.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Any

from raykeras.compat.keras_api import KerasAPI
from raykeras.compat.ray_state import waits_for_resources
from raykeras.core.config import Scale
from raykeras.driver.placement import reserved_bundles
from raykeras.driver.worker_group import WorkerGroup

_LOG = logging.getLogger("raykeras")

_POLL_S = 0.5

_POLLS_IN_NEED = 3
"""How often in succession something must wait for resources: tasks that Ray is about to start wait as well."""

_END_WITHIN_S = 10.0

_idle: dict[int, tuple[Any, WorkerGroup]] = {}
"""What idle workers are for, and the workers, by the number of their last job in this process."""

_lock = threading.Lock()
_jobs = 0


def run_on_workers(
    work: Callable[[dict[str, Any]], Any],
    config: dict[str, Any],
    *,
    scale: Scale,
    cpus_per_worker: float,
    api: KerasAPI | None = None,
    waits: bool = True,
    stay: bool = True,
) -> Any:
    """Run `work(config)` on every worker.

    Args:
        work: Module-level function, so that it is pickled by name.
        config: Argument of `work`. Must be picklable.
        scale: Number of workers and the GPUs of each.
        cpus_per_worker: Logical CPUs of each worker.
        api: Keras package that `work` uses, if any.
        waits: Whether to wait indefinitely until the cluster can place the workers.
        stay: Whether the workers may stay up for the next call.

    Returns:
        The value that `work` returns on rank 0.

    Raises:
        RaykerasError: If a worker raises an exception or is lost.
    """
    bundles = reserved_bundles(scale, cpus_per_worker)
    purpose = (scale, cpus_per_worker, bundles, _environment())
    group = _take(purpose)
    if group is None:
        _LOG.debug("raykeras starts %d workers.", scale.workers)
        group = WorkerGroup(scale, cpus_per_worker, bundles, waits=waits)
    try:
        return group.run(work, config, api)
    finally:
        if stay and scale.idle_timeout_s and group.is_usable:
            _keep(purpose, group, scale.idle_timeout_s)
        else:
            group.close(wait_s=_END_WITHIN_S)


def end_idle_workers() -> None:
    """End all idle workers, and return once their resources are free."""
    _take(None)


def _take(purpose: Any) -> WorkerGroup | None:
    """Return idle workers for a purpose if there are any; end the others, whose resources may be needed."""
    with _lock:
        idle = list(_idle.values())
        _idle.clear()
    found = None
    for its_purpose, group in idle:
        if found is None and its_purpose == purpose and group.is_usable:
            found = group
        else:
            group.close()
    for _, group in idle:
        if group is not found:
            group.close(wait_s=_END_WITHIN_S)
    return found


def _keep(purpose: Any, group: WorkerGroup, timeout_s: float) -> None:
    global _jobs
    with _lock:
        _jobs += 1
        number = _jobs
        _idle[number] = purpose, group
    args = (number, time.monotonic() + timeout_s)
    threading.Thread(target=_end_when_due, args=args, name="raykeras-idle", daemon=True).start()


def _end_when_due(number: int, due: float) -> None:
    """End idle workers at a time, or earlier if their resources are needed."""
    polls_in_need = 0
    while number in _idle and time.monotonic() < due and polls_in_need < _POLLS_IN_NEED:
        time.sleep(_POLL_S)
        try:
            polls_in_need = polls_in_need + 1 if waits_for_resources() else 0
        except Exception:  # the cluster was lost
            break
    with _lock:
        _, group = _idle.pop(number, (None, None))
    if group is not None:
        _LOG.debug("raykeras ends idle workers%s.", " that others need" if polls_in_need else "")
        group.close()


def _environment() -> tuple[Any, ...]:
    """Return what workers get from this process only when they start, as values that can be compared."""
    import ray
    from ray import cloudpickle
    from ray.data import DataContext

    context = ray.get_runtime_context()
    variables = sorted((name, value) for name, value in os.environ.items() if name.startswith("RAY_TRAIN_"))
    return context.gcs_address, context.get_job_id(), tuple(variables), cloudpickle.dumps(DataContext.get_current())
