"""Processes that the tests started and that outlive the session."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

SESSION = "RAYKERAS_TEST_SESSION"
"""Names the session's folder in the environment of every process that the tests start."""

_TIMEOUT_S = 30.0
_POLL_S = 0.2


def end_processes(folder: str) -> list[str]:
    """Waits for the session's processes to end, kills those that do not, and describes them."""
    deadline = time.monotonic() + _TIMEOUT_S
    while (left := processes(folder)) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return [f"process {pid}: {command}" for pid, command in left.items()]


def processes(folder: str) -> dict[int, str]:
    """Command lines, by process id, of the processes whose environment or command names the folder."""
    marker, found = f"{SESSION}={folder}".encode(), {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended, or belongs to another user
            command = (path / "cmdline").read_bytes().replace(b"\0", b" ")
            named = marker in (path / "environ").read_bytes().split(b"\0") or folder.encode() in command
            if named and command and int(path.name) != os.getpid():
                found[int(path.name)] = command.decode(errors="replace").strip()
    return found
