"""A folder in the storage of runs that the driver and the nodes write to, and that is removed at the end."""

from __future__ import annotations

import contextlib
import posixpath
import threading
import uuid
from collections.abc import Callable
from typing import Any

from raykeras.checkpoint.store import RunFolder, filesystem
from raykeras.doctor import node


class TrialFolder:
    """A new folder in the storage. Its methods return what is wrong, in one line; None if nothing is.

    Args:
        storage: Path or fsspec URL of the folder that contains all runs.
        timeout_s: Seconds that the storage may take to answer.
    """

    def __init__(self, storage: str, timeout_s: float) -> None:
        self.path = RunFolder.under(storage, f".doctor-{uuid.uuid4().hex}").path
        self._timeout_s = timeout_s
        self._new_parents: list[str] = []

    def create(self) -> str | None:
        """Create the folder, and write and read the driver's file."""

        def write() -> None:
            fs, path = filesystem(self.path)
            parent = posixpath.dirname(path)
            while RunFolder(self.path).is_local and parent not in ("", "/") and not fs.exists(parent):
                self._new_parents.append(parent)
                parent = posixpath.dirname(parent)
            fs.makedirs(path, exist_ok=True)
            node.write_and_read(f"{self.path}/driver")

        return _problem(write, self._timeout_s)

    def has(self, name: str) -> bool:
        """Return whether the driver finds a node's file."""
        return _problem(lambda: filesystem(self.path)[0].info(f"{self.path}/{name}"), self._timeout_s) is None

    def remove(self) -> str | None:
        """Remove the folder, and the folders above it that did not exist before."""

        def remove() -> None:
            fs, path = filesystem(self.path)
            fs.rm(path, recursive=True)
            for parent in self._new_parents:
                with contextlib.suppress(OSError):  # others write to it already
                    fs.rmdir(parent)

        return _problem(remove, self._timeout_s)


def _problem(call: Callable[[], Any], timeout_s: float) -> str | None:
    """Call a function in a thread; return its exception, or that it has not returned in time."""
    outcome: list[str | None] = [f"no answer within {timeout_s:g} s"]

    def run() -> None:
        try:
            call()
            outcome[0] = None
        except Exception as error:
            outcome[0] = node.one_line(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(timeout_s)
    return outcome[0]
