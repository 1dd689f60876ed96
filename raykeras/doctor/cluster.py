"""Examine a Ray cluster: one actor on each node, which needs no CPU."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any

from raykeras.compat.quiet import quiet
from raykeras.compat.ray_state import max_cluster_resources
from raykeras.doctor import checks, node
from raykeras.doctor.checks import Check, Machine
from raykeras.doctor.storage import TrialFolder


@dataclasses.dataclass
class Node:
    """A node of the cluster.

    Attributes:
        name: Its name, with a part of its ID if another node has the same.
        address: Its IP address.
        resources: What Ray counts on it.
        probe: The actor on it.
        answers: Whether it has answered every question so far.
    """

    name: str
    address: str
    resources: Mapping[str, float]
    probe: Any
    answers: bool = True


def cluster_checks(
    address: str, driver: Machine, storage: str | None, folder: TrialFolder | None, timeout_s: float
) -> list[Check]:
    """Return the checks of a cluster and its nodes.

    Args:
        address: Address of the cluster, or "auto".
        driver: What was found on this machine.
        storage: The storage as the user named it, if it is to be checked.
        folder: The folder in it, with the driver's file; None if the driver could not write it.
        timeout_s: Seconds that a node may take to answer.
    """
    problem = _connect(address)
    if problem is not None:
        return [checks.connection_check(address, problem)]
    import ray

    try:
        return _checks_of_nodes(driver, storage, folder, timeout_s)
    finally:
        ray.shutdown()


def _connect(address: str) -> str | None:
    """Connect to a cluster; return what is wrong, or None."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit() and not node.is_reachable((host.strip("[]"), int(port))):
        return "nothing accepts connections there"  # Ray would wait for minutes
    import ray

    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:  # of several classes, such as RuntimeError if the versions differ
        return " ".join(str(error).split())
    quiet()
    return None


def _checks_of_nodes(driver: Machine, storage: str | None, folder: TrialFolder | None, timeout_s: float) -> list[Check]:
    nodes = _start_probes()
    limit = max_cluster_resources()
    found = [checks.resources_check(len(nodes), limit.get("CPU", 0.0), limit.get("GPU", 0.0))]
    is_quick = driver.tensorflow is None
    reports = _ask(nodes, timeout_s, lambda n: n.probe.report.remote(None if is_quick else timeout_s))
    for name, report in reports.items():
        resources = next(n.resources for n in nodes if n.name == name)
        machine = Machine(
            **report,
            node=name,
            ray_gpus=resources.get("GPU", 0.0),
            store_nbytes=resources.get("object_store_memory", 0.0),
        )
        found += [*checks.machine_checks(machine), checks.versions_check(machine, driver)]
    if storage is not None and folder is not None:
        problems = _ask(nodes, timeout_s, lambda n: n.probe.visit.remote(folder.path, n.name))
        for name, problem in problems.items():
            is_shared = problem is not None or folder.has(name)
            private = "the file that the node wrote is not there for the driver"
            found.append(checks.storage_check(storage, problem if is_shared else private, name, is_shared=False))
    ports = _ask(nodes, timeout_s, lambda n: n.probe.listen.remote(n.address))
    listening = [n for n in nodes if n.name in ports]
    addresses = [(n.address, ports[n.name]) for n in listening]
    unreachable = _ask(nodes, timeout_s, lambda n: n.probe.unreachable.remote(addresses))
    for name, indices in unreachable.items():
        found.append(checks.connections_check(name, [listening[i].name for i in indices], len(listening)))
    return [*found, *(checks.silence_check(n.name, timeout_s) for n in nodes if not n.answers)]


def _start_probes() -> list[Node]:
    """Start an actor on every node that is alive."""
    import ray
    from ray.cloudpickle import register_pickle_by_value, unregister_pickle_by_value
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    alive = sorted((info for info in ray.nodes() if info["Alive"]), key=lambda info: info["NodeManagerHostname"])
    shared = Counter(info["NodeManagerHostname"] for info in alive)
    nodes = []
    register_pickle_by_value(node)  # the nodes may have another raykeras, or none
    try:
        for info in alive:
            name = info["NodeManagerHostname"]
            strategy = NodeAffinitySchedulingStrategy(info["NodeID"], soft=False)
            probe = ray.remote(num_cpus=0, scheduling_strategy=strategy)(node.NodeProbe).remote()
            name = name if shared[name] == 1 else f"{name}-{info['NodeID'][:6]}"
            nodes.append(Node(name, info["NodeManagerAddress"], info["Resources"], probe))
    finally:
        unregister_pickle_by_value(node)
    return nodes


def _ask(nodes: list[Node], timeout_s: float, question: Any) -> dict[str, Any]:
    """Ask every node that has answered so far at the same time; return the answers by name.

    Args:
        nodes: The nodes; those that do not answer are marked.
        timeout_s: Seconds that each may take.
        question: Calls a method of a node's actor.
    """
    import ray

    pending = {question(n): n for n in nodes if n.answers}
    ready, _ = ray.wait(list(pending), num_returns=len(pending), timeout=timeout_s) if pending else ([], [])
    answers = {}
    for reference, n in pending.items():
        n.answers = reference in ready
        if n.answers:
            try:
                answers[n.name] = ray.get(reference)
            except ray.exceptions.RayError:  # the node or its process was lost
                n.answers = False
    return answers
