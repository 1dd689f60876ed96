"""Hosts of a cluster as network namespaces, joined by a switch that can cut hosts off, and lose and delay packets.

It needs root, `ip` and `/dev/net/tun`. The hosts share this machine's processes and files.
"""

from __future__ import annotations

import contextlib
import fcntl
import heapq
import itertools
import multiprocessing
import os
import random
import secrets
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

_TUNSETIFF, _IFF_TAP, _IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
_MTU = 9000
_BROADCAST = b"\xff" * 6
_PORT = 6379


def is_possible() -> bool:
    """Return whether this machine and user can make network namespaces."""
    if os.geteuid() or not os.path.exists("/dev/net/tun"):
        return False
    name = f"rk{os.getpid()}"
    done = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False)
    subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)
    return done.returncode == 0


class Hosts:
    """Hosts `10.77.0.1`, `10.77.0.2`, …, while the `with` block runs; the first is the head of a Ray cluster.

    Args:
        num_hosts: Number of hosts.
        environment: Environment variables of their processes.
    """

    def __init__(self, num_hosts: int, environment: Mapping[str, str]) -> None:
        self._names = [f"rk{os.getpid()}-{index}" for index in range(num_hosts)]
        self._environment = {
            **os.environ,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            **environment,
        }
        self.head = f"{self._address(0)}:{_PORT}"

    def __enter__(self) -> Hosts:
        # a folder of its own for Ray, in which other processes would find the cluster's address
        self._ray_folder = tempfile.mkdtemp(prefix="ray")
        self._environment["RAY_TMPDIR"] = self._ray_folder
        taps = []
        for index, name in enumerate(self._names):
            _ip("netns", "add", name)
            taps.append(os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK))
            device = f"rk{os.getpid()}t{index}"
            fcntl.ioctl(taps[-1], _TUNSETIFF, struct.pack("16sH", device.encode(), _IFF_TAP | _IFF_NO_PI))
            _ip("link", "set", device, "netns", name, "name", "eth0")
            _ip("-n", name, "address", "add", f"{self._address(index)}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "mtu", str(_MTU), "up")
            _ip("-n", name, "link", "set", "lo", "up")
        self._control, control = multiprocessing.Pipe()
        self._switch = multiprocessing.get_context("fork").Process(target=_switch, args=(taps, control), daemon=True)
        self._switch.start()
        for tap in taps:
            os.close(tap)
        return self

    def __exit__(self, *error: object) -> None:
        for index in range(len(self._names)):
            self.kill(index)
        self._switch.kill()
        self._switch.join()
        for name in self._names:
            _ip("netns", "delete", name)
        shutil.rmtree(self._ray_folder, ignore_errors=True)

    def start_node(self, index: int, **options: Any) -> None:
        """Start Ray on a host, as head on the first one.

        Args:
            index: Number of the host.
            **options: Options of `ray start`.
        """
        options = {"node_ip_address": self._address(index), "object_store_memory": 200_000_000, **options}
        options |= {"disable_usage_stats": ""} if index == 0 else {"address": self.head}
        command = ["-m", "ray.scripts.scripts", "start", *(["--head", f"--port={_PORT}"] if index == 0 else [])]
        command += [
            f"--{key.replace('_', '-')}" + (f"={value}" if value != "" else "") for key, value in options.items()
        ]
        command += ["--include-dashboard=false"] if index == 0 else []
        done = self.run(index, [sys.executable, *command])
        if done.returncode:
            raise RuntimeError(done.stdout + done.stderr)

    def run(self, index: int, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        """Run a command on a host."""
        return subprocess.run(
            self._on(index, command), env=self._environment, capture_output=True, text=True, check=False, timeout=300
        )

    def start(self, index: int, command: Sequence[str], output: Path) -> subprocess.Popen[bytes]:
        """Start a command on a host; its output goes to a file."""
        with output.open("ab") as file:
            return subprocess.Popen(self._on(index, command), env=self._environment, stdout=file, stderr=file)

    def kill(self, index: int, name: str = "") -> None:
        """Kill the processes of a host with SIGKILL.

        Args:
            index: Number of the host.
            name: Only those whose command contains this.
        """
        for pid in self.processes(index, name):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def processes(self, index: int, name: str = "") -> list[int]:
        """Return the processes of a host whose command contains a name."""
        found = []
        for pid in _ip("netns", "pids", self._names[index]).split():
            with contextlib.suppress(OSError):
                if name in Path("/proc", pid, "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"):
                    found.append(int(pid))
        return found

    def network(self, cut: Sequence[int] = (), loss: float = 0.0, delay_s: float = 0.0) -> None:
        """Set what the network does.

        Args:
            cut: The hosts that no packet reaches or leaves.
            loss: Fraction of the packets that are lost.
            delay_s: Seconds that each packet takes longer.
        """
        self._control.send((set(cut), loss, delay_s))

    def _on(self, index: int, command: Sequence[str]) -> list[str]:
        return ["ip", "netns", "exec", self._names[index], *command]

    @staticmethod
    def _address(index: int) -> str:
        return f"10.77.0.{index + 1}"


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


def _switch(taps: Sequence[int], control: Connection) -> None:
    """Forward Ethernet frames between taps."""
    cut: set[int] = set()
    loss, delay_s = 0.0, 0.0
    ports: dict[bytes, int] = {}  # by MAC address
    delayed: list[tuple[float, int, int, bytes]] = []
    numbers, draw = itertools.count(), random.Random(0)
    poll = select.epoll()
    for tap in [*taps, control.fileno()]:
        poll.register(tap, select.EPOLLIN)
    while True:
        timeout = max(0.0, delayed[0][0] - time.monotonic()) if delayed else 1.0
        for file, _ in poll.poll(timeout):
            if file == control.fileno():
                cut, loss, delay_s = control.recv()
                continue
            source = taps.index(file)
            for frame in _frames(file):
                ports[frame[6:12]] = source
                target = ports.get(frame[:6])
                for port in range(len(taps)) if target is None or frame[:6] == _BROADCAST else [target]:
                    if port == source or {port, source} & cut or draw.random() < loss:
                        continue
                    if delay_s:
                        heapq.heappush(delayed, (time.monotonic() + delay_s, next(numbers), taps[port], frame))
                    else:
                        _send(taps[port], frame)
        while delayed and delayed[0][0] <= time.monotonic():
            _, _, tap, frame = heapq.heappop(delayed)
            _send(tap, frame)


def _frames(tap: int) -> Iterator[bytes]:
    with contextlib.suppress(BlockingIOError):
        for _ in range(100):
            yield os.read(tap, _MTU + 100)


def _send(tap: int, frame: bytes) -> None:
    with contextlib.suppress(OSError):  # the device's queue is full, or the device is down
        os.write(tap, frame)
