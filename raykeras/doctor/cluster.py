"""Examine a Ray cluster: one actor on each node, which needs no CPU."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from raykeras.compat.quiet import quiet
from raykeras.compat.ray_state import may_grow
from raykeras.core import installed
from raykeras.doctor import checks, node
from raykeras.doctor.checks import Check, Machine
from raykeras.doctor.storage import TrialFolder

_TENSORFLOW_SHARE = 0.8  # of a node's time, so that it can still answer that the import took too long

_UNSEEN = "the driver does not find the file that the node wrote"


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
    import ray

    nodes, resources = _start_probes(), ray.cluster_resources()
    found = [checks.resources_check(len(nodes), resources.get("CPU", 0.0), resources.get("GPU", 0.0), may_grow())]
    found += _machine_checks(nodes, driver, timeout_s)
    if storage is not None and folder is not None:
        found += _storage_checks(nodes, storage, folder, timeout_s)
    found += _connection_checks(nodes, timeout_s)
    return [*found, *(checks.silence_check(n.name, timeout_s) for n in nodes if not n.answers)]


def _machine_checks(nodes: list[Node], driver: Machine, timeout_s: float) -> Iterator[Check]:
    """Yield the checks of each node by itself, and of its versions."""
    tensorflow_timeout_s = None if driver.tensorflow is None else timeout_s * _TENSORFLOW_SHARE
    reports = _ask(nodes, timeout_s, lambda n: n.probe.report.remote(tensorflow_timeout_s))
    for n in nodes:
        if n.name in reports:
            ray_gpus, store_nbytes = (n.resources.get(name, 0.0) for name in ("GPU", "object_store_memory"))
            machine = Machine(**reports[n.name], node=n.name, ray_gpus=ray_gpus, store_nbytes=store_nbytes)
            yield from checks.machine_checks(machine)
            yield checks.versions_check(machine, driver)


def _storage_checks(nodes: list[Node], storage: str, folder: TrialFolder, timeout_s: float) -> Iterator[Check]:
    """Yield whether each node finds the driver's file, and the driver the node's."""
    problems = _ask(nodes, timeout_s, lambda n: n.probe.visit.remote(folder.path, n.name))
    for name, problem in problems.items():
        if problem is None and not folder.has(name):
            problem = _UNSEEN
        yield checks.storage_check(storage, problem, name, is_shared=problem not in (node.NOT_THERE, _UNSEEN))


def _connection_checks(nodes: list[Node], timeout_s: float) -> Iterator[Check]:
    """Yield whether each node connects to a port of every node."""
    ports = _ask(nodes, timeout_s, lambda n: n.probe.listen.remote(n.address))
    listening = [n for n in nodes if n.name in ports]
    addresses = [(n.address, ports[n.name]) for n in listening]
    unreachable = _ask(nodes, timeout_s, lambda n: n.probe.unreachable.remote(addresses))
    for name, indices in unreachable.items():
        yield checks.connections_check(name, [listening[i].name for i in indices], len(listening))


def _start_probes() -> list[Node]:
    """Start an actor on every node that is alive."""
    import ray
    from ray.cloudpickle import register_pickle_by_value, unregister_pickle_by_value
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    alive = sorted((info for info in ray.nodes() if info["Alive"]), key=lambda info: info["NodeManagerHostname"])
    shared = Counter(info["NodeManagerHostname"] for info in alive)
    nodes = []
    for module in (node, installed):  # the nodes may have another raykeras, or none
        register_pickle_by_value(module)
    try:
        for info in alive:
            name = info["NodeManagerHostname"]
            strategy = NodeAffinitySchedulingStrategy(info["NodeID"], soft=False)
            probe = ray.remote(num_cpus=0, scheduling_strategy=strategy)(node.NodeProbe).remote()
            name = name if shared[name] == 1 else f"{name}-{info['NodeID'][:6]}"
            nodes.append(Node(name, info["NodeManagerAddress"], info["Resources"], probe))
    finally:
        for module in (node, installed):
            unregister_pickle_by_value(module)
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
