"""Questions to the other nodes of a cluster before workers start; whether they have the versions of the driver."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from raykeras.compat.versions import warn_once
from raykeras.core import installed
from raykeras.core.errors import ResourceError

_ANSWER_WITHIN_S = 60.0

_compared: set[str] = set()
"""The IDs of the nodes whose versions are known to be usable."""


def check_versions() -> None:
    """Compare the versions of each other node with those of this process, once for each node.

    Raises:
        ResourceError: A difference is not minor; a minor one is a warning.
    """
    import ray
    from ray.cloudpickle import register_pickle_by_value, unregister_pickle_by_value

    nodes = [node for node in other_nodes() if node["NodeID"] not in _compared]
    if not nodes:
        return
    register_pickle_by_value(installed)
    try:
        answers = ask(nodes, installed.installed_versions)
    finally:
        unregister_pickle_by_value(installed)
    here = installed.installed_versions()
    for node, versions in answers:
        if different := installed.differences(here, versions):
            found = f"node {node['NodeManagerHostname']} has {', '.join(map(str, different))}"
            remedy = installed.remedy(different).rstrip(".")
            if not all(difference.is_minor for difference in different):
                raise ResourceError(
                    f"All nodes of a cluster must have the driver's versions; {found}. {remedy}. "
                    f"`raykeras doctor --cluster {ray.get_runtime_context().gcs_address}` compares all nodes."
                )
            # the caller of a public function, which has a decorator
            warn_once(f"All nodes of a cluster should have the driver's versions; {found}. {remedy}.", stacklevel=6)
        _compared.add(node["NodeID"])


def other_nodes() -> list[dict[str, Any]]:
    """Return what Ray knows of each live node but this one."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    return [node for node in ray.nodes() if node["Alive"] and node["NodeID"] != here]


def ask(nodes: list[dict[str, Any]], function: Callable[..., Any], *arguments: Any) -> list[tuple[dict[str, Any], Any]]:
    """Call a function on nodes at the same time.

    Args:
        nodes: Nodes, as `other_nodes` returns them.
        function: The function.
        *arguments: Its arguments.

    Returns:
        Each node that answers within a minute, with what the function returned there.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    if not nodes:
        return []
    task = ray.remote(num_cpus=0, max_retries=0)(function)
    answers = {}
    for node in nodes:
        strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        answers[task.options(scheduling_strategy=strategy).remote(*arguments)] = node
    ready, _ = ray.wait(list(answers), num_returns=len(answers), timeout=_ANSWER_WITHIN_S)
    found = []
    for answer in ready:
        try:
            found.append((answers[answer], ray.get(answer)))
        except ray.exceptions.RayError:  # the node was lost, or cannot run the function
            continue
    return found
