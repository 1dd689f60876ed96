"""Place workers in the placement group of the caller, such as that of a Ray Tune trial.

Ray Train's workers reserve a placement group of their own. A trial that has reserved its workers' resources would wait
forever for the same resources again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from raykeras.core.config import Scale
from raykeras.core.errors import ResourceError

if TYPE_CHECKING:
    from raykeras.compat.ray_train import ReservedBundles


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
    worker = {"CPU": cpus_per_worker, "GPU": float(scale.gpus_per_worker)}
    first, *others = group.bundle_specs
    occupied = context.get_assigned_resources()
    free = [{name: amount - occupied.get(name, 0.0) for name, amount in first.items()}, *others]
    indices = assign(free, worker, scale.workers)
    if not indices:
        return None
    if len(indices) < scale.workers:
        needs = {name: amount for name, amount in worker.items() if amount}
        raise ResourceError(
            f"The placement group of this process must have room for all {scale.workers} workers or for none; got "
            f"{[first, *others]}, in which {len(indices)} fit beside this process. In Ray Tune, reserve "
            f"`tune.PlacementGroupFactory([{first}] + [{needs}] * {scale.workers})` for each trial."
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
