"""Cluster state for which Ray has no public API."""

from __future__ import annotations

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

MAX_RESOURCES = PrivateName(
    "ray._private.state:state.get_max_resources_from_cluster_config",
    "find the size that an autoscaling cluster can grow to",
    "the resources of a run are checked against the present nodes",
    parameters=(),
)

NUM_GPUS = PrivateName(
    "ray._private.accelerators:NvidiaGPUAcceleratorManager.get_current_node_num_accelerators",
    "count the GPUs of this machine without TensorFlow",
    "a single worker with GPUs runs in a process of its own",
    parameters=(),
)


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


def max_cluster_resources() -> dict[str, float]:
    """Return the resources that an autoscaling cluster can grow to; the present ones if that is unknown."""
    import ray

    largest = None
    if get := MAX_RESOURCES.find():
        try:
            largest = get()
        except Exception:  # the cluster's configuration has another form
            largest = None
    return dict(largest or ray.cluster_resources())
