"""Judge what was found: each check passes, warns or fails, and says what to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raykeras.compat.versions import TESTED, is_older, is_tested
from raykeras.core import installed
from raykeras.core.errors import redacted

PASS, WARN, FAIL = "pass", "warn", "fail"

OLDEST_PYTHON = (3, 10)

_REQUIRED = ("ray", "tensorflow", "keras", "pyarrow")

_MIN_AVAILABLE_NBYTES = 2 << 30  # for a worker that imports TensorFlow, and Ray's own processes

_MIN_FREE_SHARE = 0.05  # of memory and disks: with less, Ray kills workers and stops spilling

_STORE_SHARE = 0.3  # of the memory that Ray's object store takes by default

_SHARED = "Use a folder that all machines share, or a URL such as `s3://bucket/runs`."


@dataclass(frozen=True)
class Check:
    """The outcome of one check.

    Attributes:
        name: What was checked.
        status: "pass", "warn" or "fail".
        found: What was found.
        remedy: What to do; empty if it passes.
        node: Name of the node; empty for this machine and for the cluster as a whole.
    """

    name: str
    status: str
    found: str
    remedy: str = ""
    node: str = ""


@dataclass(frozen=True)
class Machine:
    """What `raykeras.doctor.node.NodeProbe.report` found on a machine.

    Attributes:
        hostname: Its name.
        versions: Version of Python and of each package; None if it is not installed.
        tensorflow: Number of GPUs that TensorFlow sees ("gpus") and Keras' backend ("backend"), or the error of the
            import ("error"); None if TensorFlow was not imported.
        num_gpus: NVIDIA devices.
        memory_nbytes: Total and available memory; None if unknown.
        shm_nbytes: Size and free space of `/dev/shm`; None if there is none.
        temporary_folder: Where Ray keeps its files.
        temporary_nbytes: Size and free space of its filesystem.
        node: Name of the node; empty for this machine.
        ray_gpus: GPUs that Ray counts on the node; None for this machine.
        store_nbytes: Size of the node's object store; None for this machine.
    """

    hostname: str
    versions: Mapping[str, str | None]
    tensorflow: Mapping[str, Any] | None
    num_gpus: int
    memory_nbytes: Sequence[int] | None
    shm_nbytes: Sequence[int] | None
    temporary_folder: str
    temporary_nbytes: Sequence[int] | None
    node: str = ""
    ray_gpus: float | None = None
    store_nbytes: float | None = None

    @property
    def python(self) -> str:
        """Version of Python."""
        return str(self.versions["Python"])


def machine_checks(machine: Machine) -> list[Check]:
    """Return the checks of a machine by itself."""
    checks = [python_check(machine), packages_check(machine)]
    if machine.tensorflow is not None:
        checks.append(tensorflow_check(machine))
    return [*checks, gpus_check(machine), memory_check(machine), object_store_check(machine), disk_check(machine)]


def python_check(machine: Machine) -> Check:
    """Return whether Python is new enough."""
    if tuple(map(int, machine.python.split(".")[:2])) < OLDEST_PYTHON:
        oldest = ".".join(map(str, OLDEST_PYTHON))
        return Check("Python", FAIL, machine.python, f"Install Python {oldest} or later.", machine.node)
    return Check("Python", PASS, machine.python, node=machine.node)


def packages_check(machine: Machine) -> Check:
    """Return whether the packages are installed, in versions that raykeras is tested with."""
    missing = [package for package in _REQUIRED if machine.versions[package] is None]
    installed = {package: version for package, version in machine.versions.items() if version is not None}
    older = [package for package in TESTED if package in installed and is_older(package, installed[package])]
    untested = [package for package in TESTED if package in installed and not is_tested(package, installed[package])]
    found = ", ".join(f"{package} {version or 'missing'}" for package, version in _shown(machine).items())
    remedy = " ".join(f'"{package}{TESTED[package]}"' for package in [*missing, *untested])
    status = FAIL if missing or older else WARN if untested else PASS
    return Check("packages", status, found, remedy and f"raykeras is tested with: pip install {remedy}", machine.node)


def _shown(machine: Machine) -> dict[str, str | None]:
    """Return the packages to list: those that are required, and those that are installed."""
    packages = {name: version for name, version in machine.versions.items() if name != "Python"}
    return {name: version for name, version in packages.items() if version or name in _REQUIRED}


def tensorflow_check(machine: Machine) -> Check:
    """Return whether TensorFlow can be imported, and is Keras' backend."""
    answer = machine.tensorflow or {}
    if "error" in answer:
        remedy = "Run `python -c 'import tensorflow, keras'` there; reinstall the package that its error names."
        return Check("TensorFlow", FAIL, redacted(f"import fails: {answer['error']}"), remedy, machine.node)
    if answer["backend"] != "tensorflow":
        remedy = "Set KERAS_BACKEND=tensorflow, or `backend` in ~/.keras/keras.json."
        return Check("TensorFlow", FAIL, f"Keras' backend is {answer['backend']}", remedy, machine.node)
    return Check("TensorFlow", PASS, "can be imported; Keras uses it", node=machine.node)


def gpus_check(machine: Machine) -> Check:
    """Return whether TensorFlow and Ray see the GPUs that the machine has."""
    visible = (machine.tensorflow or {}).get("gpus")  # None if TensorFlow was not imported
    counts = {"NVIDIA's driver": machine.num_gpus, "TensorFlow": visible, "Ray": machine.ray_gpus}
    known = {who: round(count) for who, count in counts.items() if count is not None}
    found = ", ".join(f"{who} sees {count}" for who, count in known.items())
    if len(set(known.values())) > 1:
        if visible is not None and visible < max(known.values()):
            remedy = 'Install CUDA with `pip install "raykeras[gpu]"`; see that CUDA_VISIBLE_DEVICES hides none.'
            return Check("GPUs", FAIL if visible == 0 else WARN, found, remedy, machine.node)
        if machine.ray_gpus is not None and machine.ray_gpus != (machine.num_gpus if visible is None else visible):
            remedy = "Start the node with `ray start --num-gpus=NUMBER`, or leave the option out."
            return Check("GPUs", WARN, found, remedy, machine.node)
    if not any(known.values()):
        found = "none: models train on CPUs"
    return Check("GPUs", PASS, found, node=machine.node)


def memory_check(machine: Machine) -> Check:
    """Return whether there is memory for a worker."""
    if machine.memory_nbytes is None:
        return Check("memory", PASS, "unknown on this system", node=machine.node)
    total, available = machine.memory_nbytes
    found = f"{_gib(available)} of {_gib(total)} GiB available"
    if available < total * _MIN_FREE_SHARE:
        remedy = "Free memory: Ray kills workers when 95 % of it is used."
        return Check("memory", FAIL, found, remedy, machine.node)
    if available < _MIN_AVAILABLE_NBYTES:
        remedy = "Free memory: a worker and Ray need about 2 GiB, in addition to the model."
        return Check("memory", WARN, found, remedy, machine.node)
    return Check("memory", PASS, found, node=machine.node)


def object_store_check(machine: Machine) -> Check:
    """Return whether Ray's object store fits in shared memory."""
    if machine.shm_nbytes is None:
        return Check("object store", PASS, "this system has no /dev/shm", node=machine.node)
    size, free = machine.shm_nbytes
    wanted = machine.store_nbytes or (machine.memory_nbytes or (0, 0))[1] * _STORE_SHARE
    room = free if machine.store_nbytes is None else size  # a running store may use its part already
    found = f"/dev/shm has {_gib(room)} GiB; Ray's object store takes {_gib(wanted)} GiB"
    if room < wanted:
        remedy = (
            f"Start containers with `--shm-size={_gib(wanted * 1.1)}g`, or mount memory at /dev/shm: otherwise the "
            "store is on disk, and slow."
        )
        return Check("object store", WARN, found, remedy, machine.node)
    return Check("object store", PASS, found, node=machine.node)


def disk_check(machine: Machine) -> Check:
    """Return whether Ray can write to its temporary folder."""
    size, free = machine.temporary_nbytes or (0, 0)
    found = f"{machine.temporary_folder} has {_gib(free)} of {_gib(size)} GiB free"
    if free <= size * _MIN_FREE_SHARE:
        remedy = "Free space, or set RAY_TMPDIR: Ray writes no objects to a disk that is 95 % full."
        return Check("disk", WARN, found, remedy, machine.node)
    return Check("disk", PASS, found, node=machine.node)


def versions_check(machine: Machine, driver: Machine) -> Check:
    """Return whether a node has the same versions as the driver.

    `Difference.is_minor` says what may differ.
    """
    different = installed.differences(driver.versions, machine.versions)
    if not different:
        return Check("versions", PASS, "the same as here", node=machine.node)
    status = WARN if all(difference.is_minor for difference in different) else FAIL
    return Check("versions", status, ", ".join(map(str, different)), installed.remedy(different), machine.node)


def address_check(address: str, is_reachable: bool, used_ports: Sequence[int]) -> Check:
    """Return whether processes of this machine reach each other, and `ray start --head` finds its ports free.

    Args:
        address: The machine's address that others use.
        is_reachable: Whether a port of the address can be connected to.
        used_ports: Default ports of Ray that are taken.
    """
    if not is_reachable:
        remedy = "Let the firewall or VPN accept connections of the machine to itself: Ray's processes use them."
        return Check("ports", FAIL, f"{address} does not accept connections from itself", remedy)
    if used_ports:
        ports = " and ".join(map(str, used_ports))
        remedy = "If it is Ray, check it with `--cluster auto`; otherwise `ray start --head` needs `--port`."
        return Check("ports", WARN, f"{address} is reachable; {ports} in use", remedy)
    return Check("ports", PASS, f"{address} is reachable; Ray's default ports are free")


def connections_check(node: str, unreachable: Sequence[str], num_nodes: int) -> Check:
    """Return whether a node reaches all others.

    Args:
        node: Name of the node.
        unreachable: Names of the nodes that it does not reach.
        num_nodes: Number of nodes that were tried, including itself.
    """
    if unreachable:
        found = f"cannot connect to {', '.join(unreachable)}"
        remedy = "Open all ports between the nodes: TensorFlow and Ray choose free ones."
        return Check("ports", FAIL, found, remedy, node)
    return Check("ports", PASS, f"connects to {'itself' if num_nodes == 1 else f'all {num_nodes} nodes'}", node=node)


def storage_check(storage: str, error: str | None, node: str = "", *, is_shared: bool = True) -> Check:
    """Return whether a machine can use the storage of runs.

    Args:
        storage: The path or URL as the user named it.
        error: What went wrong; None if a file was written, read and removed.
        node: Name of the node; empty for this machine.
        is_shared: Whether the machine sees what others wrote.
    """
    storage = redacted(storage)
    if error is None:
        return Check("storage", PASS, f"{storage}: a file was written, read and removed", node=node)
    remedy = "See that the URL is right, and that the machine may write there."
    if error.startswith(("ImportError", "ModuleNotFoundError")):
        remedy = 'Install the filesystem, such as `pip install "raykeras[s3]"` or `"raykeras[gcs]"`.'
    elif not is_shared:
        remedy = _SHARED
    return Check("storage", FAIL, redacted(f"{storage}: {error}"), remedy, node)


def connection_check(address: str, problem: str) -> Check:
    """Return that a cluster cannot be connected to."""
    remedy = (
        "Run it on a node of the cluster, with the cluster's Python, Ray and token (RAY_AUTH_MODE); `ray status` shows "
        "whether it runs."
    )
    return Check("cluster", FAIL, redacted(f"cannot connect to {address}: {problem}"), remedy)


def silence_check(node: str, timeout_s: float) -> Check:
    """Return that a node does not answer."""
    remedy = "See with `ray status` whether it is lost or overloaded; remove it, or set a longer --timeout-s."
    return Check("node", FAIL, f"no answer within {timeout_s:g} s", remedy, node)


def resources_check(num_nodes: int, num_cpus: float, num_gpus: float, may_grow: bool) -> Check:
    """Return whether a cluster can run anything.

    Args:
        num_nodes: Nodes that are alive.
        num_cpus: Logical CPUs of these nodes.
        num_gpus: Their GPUs.
        may_grow: Whether an autoscaler may add nodes.
    """
    nodes = "1 node" if num_nodes == 1 else f"{num_nodes} nodes"
    found = f"{nodes}; {num_cpus:g} CPUs and {num_gpus:g} GPUs"
    if may_grow:
        return Check("cluster", PASS, f"{found}; an autoscaler may add nodes")
    if num_cpus < 1:
        return Check("cluster", FAIL, found, "Add nodes: reading data takes at least one CPU, and a worker another.")
    if num_cpus < 2:
        return Check("cluster", WARN, found, "Add CPUs: with one, reading data and training take turns.")
    return Check("cluster", PASS, found)


def _gib(nbytes: float) -> str:
    return f"{nbytes / (1 << 30):.1f}"
