"""Workers that stay up between calls, and workers that stand by for those that are lost.

The next call with the same scale uses workers that stay up. They end once they have been idle for
`Scale.idle_timeout_s`, once anything in the cluster waits for resources, or when a call needs other workers. Workers
stand by once a training has run for some time. They have imported everything, and stay up if the training loses its
workers.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Any

from raykeras.compat.keras_api import KerasAPI
from raykeras.compat.ray_state import waits_for_resources
from raykeras.core.config import Scale
from raykeras.core.errors import WorkerLostError
from raykeras.driver.placement import Reservation, reserved_bundles
from raykeras.driver.worker_group import WorkerGroup

_LOG = logging.getLogger("raykeras")

_SPARES_AFTER_S = 30.0
"""How long a training runs before others stand by: starting them takes some seconds of each worker's CPU."""

_POLL_S = 0.5

_POLLS_IN_NEED = 3
"""How often in succession something must wait for resources: tasks that Ray is about to start wait as well."""

_USED_WITHIN_S = 60.0
"""How long workers that the next call or restart will use stay up for it, whatever `Scale.idle_timeout_s` is."""

_END_WITHIN_S = 10.0

_idle: dict[int, tuple[Any, WorkerGroup]] = {}
"""What idle workers are for, and the workers, in the order in which they became idle."""

_lock = threading.Lock()
_num_kept = 0


def run_on_workers(
    work: Callable[[dict[str, Any]], Any],
    config: dict[str, Any],
    *,
    scale: Scale,
    cpus_per_worker: float,
    api: KerasAPI | None = None,
    waits: bool = True,
    stay: bool = True,
    spares: bool = False,
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
        spares: Whether to start workers that take the place of these if they are lost.

    Returns:
        The value that `work` returns on rank 0.

    Raises:
        RaykerasError: If a worker raises an exception or is lost.
    """
    from raykeras.compat.ray_train import can_place_in_bundles

    purpose = _purpose(scale, cpus_per_worker)
    group = _take(purpose)
    if group is None:
        _LOG.debug("raykeras starts %d workers.", scale.workers)
        bundles = reserved_bundles(scale, cpus_per_worker)
        reservation = Reservation(scale, cpus_per_worker, bundles) if can_place_in_bundles() else None
        group = WorkerGroup(scale, cpus_per_worker, reservation, waits=waits)
    standing_by = _Spares(group) if spares else None
    left, timeout_s = group, scale.idle_timeout_s if stay else 0.0
    try:
        return group.run(work, config, api)
    except WorkerLostError:
        if standing_by is not None and not group.is_usable and (taken := standing_by.take()):
            left, timeout_s = taken, max(timeout_s, _USED_WITHIN_S)
        raise
    finally:
        if standing_by is not None:
            standing_by.close()
        if left is not group:
            group.close()
        if timeout_s and left.is_usable:
            _keep(purpose, left, timeout_s)
        else:
            left.close(wait_s=_END_WITHIN_S)


def prepare(scale: Scale, cpus_per_worker: float) -> bool:
    """End idle workers that a call will not use, and return whether some are up that it will.

    Args:
        scale: Scale of the call.
        cpus_per_worker: Logical CPUs of each worker.
    """
    purpose = _purpose(scale, cpus_per_worker)
    group = _take(purpose)
    if group is not None:
        _keep(purpose, group, max(scale.idle_timeout_s, _USED_WITHIN_S))
    return group is not None


class _Spares:
    """Workers that stand by for others, started after some time."""

    def __init__(self, group: WorkerGroup) -> None:
        self._group = group
        self._spares: WorkerGroup | None = None
        self._lock = threading.Lock()
        self._timer = threading.Timer(_SPARES_AFTER_S, self._start)
        self._timer.daemon = True
        self._timer.start()

    def _start(self) -> None:
        with self._lock, contextlib.suppress(Exception):  # the workers have just been lost
            if self._group.is_running:
                _LOG.debug("raykeras starts workers that stand by.")
                self._spares = self._group.stand_by()

    def take(self) -> WorkerGroup | None:
        """Return the workers if they are usable."""
        self._timer.cancel()
        with self._lock:
            if self._spares is None or not self._spares.is_usable:
                return None
            spares, self._spares = self._spares, None
            return spares

    def close(self) -> None:
        """End the workers, unless they were taken."""
        self._timer.cancel()
        with self._lock:
            if self._spares is not None:
                self._spares.close()


def _take(purpose: Any) -> WorkerGroup | None:
    """Return idle workers for a purpose if there are any; end the others, whose resources may be needed."""
    with _lock:
        idle = list(_idle.values())
        _idle.clear()
    found = None
    for its_purpose, group in idle:
        if found is None and its_purpose == purpose and group.is_usable and group.answers():
            found = group
        else:
            group.close()
    for _, group in idle:
        if group is not found:
            group.close(wait_s=_END_WITHIN_S)
    return found


def _keep(purpose: Any, group: WorkerGroup, timeout_s: float) -> None:
    global _num_kept
    with _lock:
        _num_kept += 1
        number = _num_kept
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


def _purpose(scale: Scale, cpus_per_worker: float) -> Any:
    """Return what workers get from this process only when they start, as values that can be compared."""
    import ray
    from ray import cloudpickle
    from ray.data import DataContext

    context, group = ray.get_runtime_context(), ray.util.get_current_placement_group()
    variables = sorted((name, value) for name, value in os.environ.items() if name.startswith("RAY_TRAIN_"))
    cluster = context.gcs_address, context.get_job_id(), group and group.id
    return scale, cpus_per_worker, cluster, variables, cloudpickle.dumps(DataContext.get_current())
