"""Finds out that a worker hangs: a collective that waits for ever, a lost file system, a deadlock.

Enters: a beat whenever the training has come a step further. Leaves: when none came for too long, the stacks of all
threads in the run's folder, and the end of the process, so that the run can restart.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable

from raykeras.checkpoint import RunFolder

FOLDER = "stacks"
_LOOK_S = 1.0
_FIRST_STEP_S = 1800.0  # building and tracing a model may take minutes
_GRACE_S = 3.0  # for the other ranks, which wait for this one, to see the same


class Watch:
    """Watches one worker, from a thread.

    Args:
        timeout_s: Seconds without a beat after which it hangs; before the first beat, at least half an hour.
        folder: The run's.
        name: Of the stacks' file, such as "attempt-0-rank-1".
        tell: Called with one line that says what was found.
        leave: Ends the process; None where it must go on.
    """

    def __init__(
        self,
        timeout_s: float,
        folder: RunFolder,
        name: str,
        tell: Callable[[str], None],
        leave: Callable[[], None] | None,
    ) -> None:
        self._timeout_s, self._folder, self._name, self._tell, self._leave = timeout_s, folder, name, tell, leave
        self._limit_s = max(timeout_s, _FIRST_STEP_S)
        self._beat_at = time.monotonic()
        self._closed = threading.Event()
        threading.Thread(target=self._look, name="raykeras-watch", daemon=True).start()

    def beat(self) -> None:
        self._beat_at, self._limit_s = time.monotonic(), self._timeout_s

    def close(self) -> None:
        self._closed.set()

    def _look(self) -> None:
        while not self._closed.wait(min(_LOOK_S, self._timeout_s / 4)):
            limit_s = self._limit_s
            if time.monotonic() - self._beat_at < limit_s:
                continue
            path = f"{self._folder / FOLDER}/{self._name}.txt"
            text = f"no step for {limit_s:g} s; stacks of all its threads in {path}"
            stacks = _stacks()
            print(f"raykeras: {text}\n{stacks}", file=sys.stderr, flush=True)
            try:
                self._folder.fs.makedirs(self._folder / FOLDER, exist_ok=True)
                with self._folder.fs.open(path, "w") as file:
                    file.write(stacks)
                self._tell(text)
            finally:
                if self._leave is not None:
                    time.sleep(_GRACE_S)
                    self._leave()
            self._beat_at = time.monotonic()  # told of again only after as long


def _stacks() -> str:
    """Of all threads of this process, those in C functions too."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()


def end_process() -> None:
    """Ends a worker whose threads cannot be asked to."""
    os._exit(70)
