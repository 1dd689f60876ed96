"""Detect that a worker hangs, such as in a collective, a lost file system or a deadlock.

A worker without a heartbeat for too long writes the stacks of its threads into the run's folder and ends its process,
so that the run can restart.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable

from raykeras.checkpoint.store import RunFolder

FOLDER = "stacks"
"""Folder of the stacks in the run's folder."""

_POLL_S = 1.0
_FIRST_STEP_S = 1800.0  # building and tracing a model may take minutes
_GRACE_S = 3.0  # for the other ranks, which wait for this one, to write their stacks too


class Watchdog:
    """Watches one worker from a thread.

    Args:
        timeout_s: Seconds without a heartbeat after which the worker hangs; at least 1800 before the first one.
        folder: The run's folder.
        name: Name of the file for the stacks, without suffix, such as "attempt-0-rank-1".
        report: Called with one line that describes the hang.
        end: Ends the process; None if it must continue.
    """

    def __init__(
        self,
        timeout_s: float,
        folder: RunFolder,
        name: str,
        report: Callable[[str], None],
        end: Callable[[], None] | None,
    ) -> None:
        self._timeout_s, self._folder, self._name, self._report, self._end = timeout_s, folder, name, report, end
        self._limit_s = max(timeout_s, _FIRST_STEP_S)
        self._heartbeat_at = time.monotonic()
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name="raykeras-watchdog", daemon=True).start()

    def heartbeat(self) -> None:
        """Note that a step has ended."""
        self._heartbeat_at, self._limit_s = time.monotonic(), self._timeout_s

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(min(_POLL_S, self._timeout_s / 4)):
            limit_s = self._limit_s
            if time.monotonic() - self._heartbeat_at < limit_s:
                continue
            path = f"{self._folder / FOLDER}/{self._name}.txt"
            text = f"no step for {limit_s:g} s; stacks of all its threads in {path}"
            stacks = _stacks()
            print(f"raykeras: {text}\n{stacks}", file=sys.stderr, flush=True)
            with contextlib.suppress(Exception):  # of the storage, or of a coordinator that is gone
                self._report(text)
                self._folder.fs.makedirs(self._folder / FOLDER, exist_ok=True)
                with self._folder.fs.open(path, "w") as file:
                    file.write(stacks)
            if self._end is not None:
                time.sleep(_GRACE_S)
                self._end()
            self._heartbeat_at = time.monotonic()  # report again only after the same time


def _stacks() -> str:
    """Return the stacks of all threads of this process, including those in C functions."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()


def end_process() -> None:
    """End a worker's process at once, because its threads may hang."""
    os._exit(70)
