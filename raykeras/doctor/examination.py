"""Check this machine, the storage of runs and a cluster."""

from __future__ import annotations

from raykeras.doctor import checks, node
from raykeras.doctor.checks import Check, Machine
from raykeras.doctor.storage import TrialFolder

_RAY_PORTS = (6379, 8265, 10001)
"""Default ports of `ray start --head`: its control store, the dashboard and clients."""


def examine(cluster: str | None, storage: str | None, timeout_s: float, *, imports_tensorflow: bool) -> list[Check]:
    """Return all checks, in the order in which to show them.

    Args:
        cluster: Address of the cluster; None to check this machine only.
        storage: Path or fsspec URL of the folder that contains all runs; None not to check it.
        timeout_s: Seconds that each node, the import of TensorFlow and the storage may take.
        imports_tensorflow: Whether to import TensorFlow, which takes seconds.
    """
    driver = Machine(**node.NodeProbe().report(timeout_s if imports_tensorflow else None))
    found = checks.machine_checks(driver)
    if cluster is None:
        found.append(_ports_check())
    folder = None if storage is None else TrialFolder(storage, timeout_s)
    problem = None if folder is None else folder.create()
    of_cluster: list[Check] = []
    try:
        if cluster is not None:
            from raykeras.doctor.cluster import cluster_checks

            of_cluster = cluster_checks(cluster, driver, storage, None if problem else folder, timeout_s)
    finally:
        if folder is not None and problem is None:
            problem = folder.remove()
    if storage is not None:
        found.append(checks.storage_check(storage, problem))
    return [*found, *of_cluster]


def _ports_check() -> Check:
    """Connect to a port of this machine, and to Ray's default ones."""
    address, probe = node.own_address(), node.NodeProbe()
    is_reachable = node.is_reachable((address, probe.listen(address)))
    probe.close()
    return checks.address_check(address, is_reachable, [port for port in _RAY_PORTS if _is_used(port)])


def _is_used(port: int) -> bool:
    return node.is_reachable(("127.0.0.1", port))
