"""Where workers are placed: in a placement group of raykeras, or in that of the caller, such as a Ray Tune trial.

A trial that has reserved its workers' resources would wait forever for the same resources again. A group of raykeras
outlives the workers, so that those that replace them after a failure need not wait for resources.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from raykeras.core.config import Scale
from raykeras.core.errors import ResourceError, WorkerLostError

if TYPE_CHECKING:
    from raykeras.compat.ray_train import ReservedBundles


_LOG = logging.getLogger("raykeras")

_POLL_S = 0.5

_LONG_WAIT_S = 30.0


class Reservation:
    """The resources of workers, in a placement group that exists as long as it has users.

    Args:
        scale: Number of workers and the GPUs of each.
        cpus_per_worker: Logical CPUs of each worker.
        bundles: The caller's reservation of these resources; None to reserve them.
    """

    def __init__(self, scale: Scale, cpus_per_worker: float, bundles: ReservedBundles | None = None) -> None:
        import ray

        from raykeras.compat.ray_train import ReservedBundles

        self._is_own = bundles is None
        if bundles is None:
            options: dict[str, Any] = {"strategy": scale.placement.upper()}
            if scale.label_selector is not None:
                options["bundle_label_selector"] = [dict(scale.label_selector)] * scale.workers
            group = ray.util.placement_group([scale.bundle(cpus_per_worker)] * scale.workers, **options)
            bundles = ReservedBundles(group, tuple(range(scale.workers)))
        self.bundles = bundles
        self._num_users, self._lock = 0, threading.Lock()

    def acquire(self) -> None:
        """Count one more user."""
        with self._lock:
            self._num_users += 1

    def release(self) -> None:
        """Count one user less, and free the resources after the last one."""
        import ray

        with self._lock:
            self._num_users -= 1
            is_over = self._num_users == 0
        if is_over and self._is_own and ray.is_initialized():
            with contextlib.suppress(Exception):  # the cluster was lost
                ray.util.remove_placement_group(self.bundles.group)

    def wait(self, is_cancelled: threading.Event, *, indefinitely: bool) -> None:
        """Wait until the cluster has reserved the resources; warn if it takes long.

        Args:
            is_cancelled: Ends the wait.
            indefinitely: Whether to wait as long as it takes.

        Raises:
            WorkerLostError: The cluster has not reserved them in time, or the wait was cancelled.
        """
        long_wait_at = time.monotonic() + _LONG_WAIT_S
        while not self.bundles.group.wait(_POLL_S):
            if is_cancelled.is_set():
                raise WorkerLostError("The workers were not placed, because the call has ended.")
            if time.monotonic() < long_wait_at:
                continue
            if not indefinitely:
                raise WorkerLostError("The workers could not be placed: resources that were free have been taken.")
            first, *others = self.bundles.group.bundle_specs
            _LOG.warning("raykeras is waiting for resources: %s for each of %d workers.", first, 1 + len(others))
            long_wait_at = math.inf


def reserved_bundles(scale: Scale, cpus_per_worker: float) -> ReservedBundles | None:
    """Return the bundles for the workers in the placement group of this process.

    Args:
        scale: Number of workers and the GPUs of each.
        cpus_per_worker: Logical CPUs of each worker.

    Returns:
        The group, and the bundle of each worker; None if there is no such group, it holds only this process, or the
        number of workers may change.

    Raises:
        ResourceError: If there is room for some of the workers only.
    """
    import ray

    from raykeras.compat.ray_train import ReservedBundles

    group = ray.util.get_current_placement_group()
    context = ray.get_runtime_context()
    if group is None or not context.should_capture_child_tasks_in_placement_group or scale.is_elastic:
        return None
    worker = scale.bundle(cpus_per_worker)
    first, *others = group.bundle_specs
    occupied = context.get_assigned_resources()
    free = [{name: amount - occupied.get(name, 0.0) for name, amount in first.items()}, *others]
    indices = assign(free, worker, scale.workers)
    if not indices:
        return None
    if len(indices) < scale.workers:
        raise ResourceError(
            f"The placement group of this process must have room for all {scale.workers} workers or for none; got "
            f"{[first, *others]}, in which {len(indices)} fit beside this process. In Ray Tune, reserve "
            f"`tune.PlacementGroupFactory([{first}] + [{worker}] * {scale.workers})` for each trial."
        )
    return ReservedBundles(group, tuple(indices))


def assign(bundles: Sequence[Mapping[str, float]], worker: Mapping[str, float], num_workers: int) -> list[int]:
    """Return the bundle of each worker, for as many as there is room; workers are spread over the bundles.

    Args:
        bundles: Free resources of each bundle.
        worker: Resources of each worker.
        num_workers: Number of workers.
    """
    rooms = [
        min(int((bundle.get(name, 0.0) + 1e-6) // amount) for name, amount in worker.items() if amount)
        for bundle in bundles
    ]
    slots = sorted((number, index) for index, room in enumerate(rooms) for number in range(room))
    return [index for _, index in slots[:num_workers]]
