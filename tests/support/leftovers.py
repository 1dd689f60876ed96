"""Find and kill processes that outlive the test session."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

SESSION = "RAYKERAS_TEST_SESSION"
"""Environment variable of every process that the tests start; its value is the session's folder."""

_TIMEOUT_S = 30.0
_POLL_S = 0.2


def end_processes(folder: str) -> list[str]:
    """Wait for the session's processes to end, kill the remaining ones, and return a description of each."""
    deadline = time.monotonic() + _TIMEOUT_S
    while (remaining := processes(folder)) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    for pid in remaining:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return [f"process {pid}: {command}" for pid, command in remaining.items()]


def processes(folder: str) -> dict[int, str]:
    """Return the command lines, by process id, of the processes whose environment or command names the folder."""
    marker, commands = f"{SESSION}={folder}".encode(), {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # the process has ended, or belongs to another user
            command = (path / "cmdline").read_bytes().replace(b"\0", b" ")
            is_named = marker in (path / "environ").read_bytes().split(b"\0") or folder.encode() in command
            if is_named and command and int(path.name) != os.getpid():
                commands[int(path.name)] = command.decode(errors="replace").strip()
    return commands
