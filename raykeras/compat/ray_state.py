"""Cluster state for which Ray has no public API."""

from __future__ import annotations

import json
import time

from raykeras.compat.versions import PrivateName

FREE_PER_NODE = PrivateName(
    "ray._private.state:available_resources_per_node",
    "find the CPUs and GPUs that are free on each node",
    "those that are free in the cluster count as evenly spread over its nodes",
    parameters=(),
)

DRAINING = PrivateName(
    "ray._private.state:state.get_draining_nodes",
    "see which nodes are being drained",
    "the workers of a drained node are lost, and the run resumes from its last checkpoint",
    parameters=(),
)

CLUSTER_VALUE = PrivateName(
    "ray.experimental.internal_kv:_internal_kv_get",
    "see whether an autoscaler may add nodes",
    "a run that needs more than the present nodes have is refused",
    parameters=("key",),
)

NUM_GPUS = PrivateName(
    "ray._private.accelerators:NvidiaGPUAcceleratorManager.get_current_node_num_accelerators",
    "count the GPUs of this machine without TensorFlow",
    "a single worker with GPUs runs in a process of its own",
    parameters=(),
)

_AUTOSCALER_STARTS_WITHIN_S = 10.0

_POLL_S = 0.5


def free_resources_per_node() -> dict[str, dict[str, float]]:
    """Return the resources that are free on each live node, by the node's ID."""
    import ray

    if per_node := FREE_PER_NODE.find():
        return dict(per_node())
    total, free = ray.cluster_resources(), ray.available_resources()
    return {
        node["NodeID"]: {name: amount * free.get(name, 0.0) / total[name] for name, amount in node["Resources"].items()}
        for node in ray.nodes()
        if node["Alive"]
    }


def draining_nodes() -> set[str]:
    """Return the IDs of the nodes that are being drained."""
    draining = DRAINING.find()
    return set(draining()) if draining else set()


def waits_for_resources() -> bool:
    """Return whether tasks, actors or placement groups in the cluster wait for resources; False if that is unknown."""
    import ray

    if not ray.is_initialized():
        return False
    try:
        from ray.autoscaler.v2.sdk import get_cluster_status
    except ImportError:  # Ray does not document it
        return False
    demands = get_cluster_status(ray.get_runtime_context().gcs_address).resource_demands
    return bool(demands.placement_group_demand or demands.ray_task_actor_demand)


def num_gpus_here() -> int:
    """Return the number of GPUs of this machine, without importing TensorFlow."""
    num_gpus = NUM_GPUS.find()
    return int(num_gpus()) if num_gpus else 0


def may_grow() -> bool:
    """Return whether the cluster has an autoscaler that may add nodes; False if that is unknown.

    Without a configuration, Ray's autoscaler only observes the nodes, and names the type of each `node_` and its ID.
    """
    get, deadline = CLUSTER_VALUE.find(), time.monotonic() + _AUTOSCALER_STARTS_WITHIN_S
    if get is None:
        return False
    try:
        if get(b"__autoscaler_v2_enabled") == b"1":
            import ray
            from ray.autoscaler.v2.sdk import get_cluster_status

            status = get_cluster_status(ray.get_runtime_context().gcs_address)
            types = [node.ray_node_type_name for node in (*status.active_nodes, *status.idle_nodes)]
        else:
            while not (report := get(b"__autoscaling_status")) and time.monotonic() < deadline:
                time.sleep(_POLL_S)
            types = list(json.loads(report)["autoscaler_report"]["node_type_mapping"].values()) if report else []
    except Exception:  # the report has another form
        return False
    return any(not name.startswith("node_") for name in types)
