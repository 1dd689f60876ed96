"""Cluster state for which Ray has no public API."""

from __future__ import annotations

import contextlib


def draining_nodes() -> set[str]:
    """Return the IDs of the nodes that are being drained."""
    from ray._private.state import state

    return set(state.get_draining_nodes())


def num_gpus_here() -> int:
    """Return the number of GPUs of this machine, without importing TensorFlow."""
    from ray._private.accelerators import NvidiaGPUAcceleratorManager

    return int(NvidiaGPUAcceleratorManager.get_current_node_num_accelerators())


def start_autoscaling_coordinator() -> None:
    """Start the autoscaling coordinator, so that Ray Train's controller need not wait for it."""
    with contextlib.suppress(ImportError):
        from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
            get_or_create_autoscaling_coordinator,
        )

        get_or_create_autoscaling_coordinator()


def max_cluster_resources() -> dict[str, float] | None:
    """Return the resources that an autoscaling cluster can grow to; None if unknown."""
    from ray._private.state import state

    try:
        return state.get_max_resources_from_cluster_config()
    except Exception:
        return None
