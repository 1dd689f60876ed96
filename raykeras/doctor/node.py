"""What one machine has: versions, devices, memory, and access to storage and to other machines.

`NodeProbe` is sent to the nodes of a cluster by value and returns built-in types, so that it also works where raykeras
is missing or of another version. Therefore this module imports only the standard library, and
`raykeras.core.installed`, which is sent with it.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from raykeras.core.installed import installed_versions

NOT_THERE = "the file that the driver wrote is not there"

_IMPORT_TENSORFLOW = """
import json, tensorflow, keras
gpus = len(tensorflow.config.list_physical_devices("GPU"))
print(json.dumps({"gpus": gpus, "backend": keras.backend.backend()}))
"""

_CGROUP_FILES = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
"""Limit and use of a container's memory, in versions 2 and 1 of cgroups."""

_CONNECT_TIMEOUT_S = 5.0

_MAX_CONNECTIONS = 32  # at a time


class NodeProbe:
    """Answers questions about the machine that it is on."""

    _listener: socket.socket | None = None

    def report(self, tensorflow_timeout_s: float | None) -> dict[str, Any]:
        """Return what the machine has.

        Args:
            tensorflow_timeout_s: Seconds that the import of TensorFlow may take; None not to import it.

        Returns:
            The attributes of `raykeras.doctor.checks.Machine`.
        """
        temporary = os.environ.get("RAY_TMPDIR", tempfile.gettempdir())
        return {
            "hostname": socket.gethostname(),
            "versions": installed_versions(),
            "tensorflow": None if tensorflow_timeout_s is None else import_tensorflow(tensorflow_timeout_s),
            "num_gpus": len(glob.glob("/dev/nvidia[0-9]*")),
            "memory_nbytes": memory(),
            "shm_nbytes": disk("/dev/shm"),
            "temporary_folder": temporary,
            "temporary_nbytes": disk(temporary),
        }

    def visit(self, folder: str, name: str) -> str | None:
        """Find the driver's file in a folder of the storage, and write another one.

        Args:
            folder: Path or fsspec URL.
            name: Name of the file to write.

        Returns:
            What is wrong; None if nothing is.
        """
        try:
            if not exists(f"{folder}/driver"):
                return NOT_THERE
            write_and_read(f"{folder}/{name}")
        except Exception as error:
            return one_line(error)
        return None

    def listen(self, address: str) -> int:
        """Accept connections until `close` or the end of the process; return the port."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._listener = socket.create_server(("", 0), family=family, backlog=1024)
        return int(self._listener.getsockname()[1])

    def close(self) -> None:
        """Stop accepting connections."""
        if self._listener is not None:
            self._listener.close()

    def unreachable(self, addresses: Sequence[tuple[str, int]]) -> list[int]:
        """Return the indices of the addresses (host and port) that cannot be connected to."""
        with ThreadPoolExecutor(_MAX_CONNECTIONS) as pool:
            reached = list(pool.map(is_reachable, addresses))
        return [index for index, is_reached in enumerate(reached) if not is_reached]


def one_line(error: Exception) -> str:
    """Return the class and the first line of the message of an exception."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def import_tensorflow(timeout_s: float) -> dict[str, Any]:
    """Import TensorFlow and Keras in a process; return the number of GPUs and Keras' backend, or the error."""
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    if "RAY_JOB_ID" in environment or "RAY_RAYLET_PID" in environment:
        environment.pop("CUDA_VISIBLE_DEVICES", None)  # Ray hides GPUs from tasks that request none
    command = [sys.executable, "-c", _IMPORT_TENSORFLOW]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"not imported within {timeout_s:g} s"}
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    if done.returncode != 0:
        return {"error": lines[-1] if lines else f"the process ended with status {done.returncode}"}
    return dict(json.loads(lines[-1]))


def memory() -> tuple[int, int] | None:
    """Return the total and the available memory in bytes, of the container if there is a limit; None if unknown."""
    try:
        with open("/proc/meminfo") as file:
            kib = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in file)}
    except OSError:  # not Linux
        return None
    total, available = kib["MemTotal"] * 1024, kib["MemAvailable"] * 1024
    for limit_file, usage_file in _CGROUP_FILES:
        with contextlib.suppress(OSError, ValueError), open(limit_file) as limit, open(usage_file) as usage:
            limit_nbytes = int(limit.read())  # "max" without a limit
            if limit_nbytes < total:
                total, available = limit_nbytes, min(available, limit_nbytes - int(usage.read()))
    return total, max(available, 0)


def disk(folder: str) -> tuple[int, int] | None:
    """Return the total and the free space of a folder's filesystem in bytes; None if there is no such folder."""
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return None
    return usage.total, usage.free


def exists(path: str) -> bool:
    """Return whether a path or fsspec URL exists."""
    import fsspec

    fs, inside = fsspec.core.url_to_fs(path, use_listings_cache=False)
    return bool(fs.exists(inside))


def write_and_read(path: str) -> None:
    """Write a small file and read it again.

    Raises:
        OSError: Other contents were read.
    """
    import fsspec

    fs, inside = fsspec.core.url_to_fs(path, use_listings_cache=False)
    contents = os.urandom(16)
    fs.pipe_file(inside, contents)
    if fs.cat_file(inside) != contents:
        raise OSError(f"{path} has other contents than were written")


def own_address() -> str:
    """Return the address of this machine that others use; loopback without a network."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.connect(("192.0.2.1", 80))  # sends nothing: it only selects the interface
        return str(probe.getsockname()[0])
    return "127.0.0.1"


def is_reachable(address: tuple[str, int]) -> bool:
    """Return whether a host and port accept connections."""
    try:
        socket.create_connection(address, timeout=_CONNECT_TIMEOUT_S).close()
    except OSError:
        return False
    return True
