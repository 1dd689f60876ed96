"""Temporary folders that do not outlive their process by much, even if it is killed.

Enters: what a folder is for. Leaves: the folder, removed at the end of its use; and those of killed processes,
removed by a later one. Each folder is locked while its process lives: the system releases the lock, however it ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
import weakref
from typing import Literal, get_args

_Kind = Literal["artifacts", "checkpoint", "log", "model", "snapshot", "unkept"]

_NAME = re.compile(rf"raykeras-({'|'.join(get_args(_Kind))})-\w{{8}}")


class TemporaryFolder(tempfile.TemporaryDirectory[str]):
    """A `tempfile.TemporaryDirectory` that `remove_abandoned` removes if this process is killed.

    Args:
        kind: What it is for; part of its name.
    """

    def __init__(self, kind: _Kind) -> None:
        locked = False
        while not locked:
            super().__init__(prefix=f"raykeras-{kind}-", ignore_cleanup_errors=True)
            locked = self._lock()

    def cleanup(self) -> None:
        super().cleanup()
        self._unlock()

    def _lock(self) -> bool:
        """Locks it; False if another process removed it before."""
        try:
            descriptor = os.open(self.name, os.O_RDONLY)
        except FileNotFoundError:
            return False
        self._unlock = weakref.finalize(self, os.close, descriptor)
        with contextlib.suppress(OSError):  # a filesystem without locks, on which nothing is ever abandoned
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        return os.path.exists(self.name)


def remove_abandoned() -> None:
    """Removes the temporary folders of this user's processes that were killed; never raises."""
    with contextlib.suppress(OSError), os.scandir(tempfile.gettempdir()) as entries:
        for entry in entries:
            if not _NAME.fullmatch(entry.name):
                continue
            with contextlib.suppress(OSError):
                if entry.is_dir(follow_symlinks=False) and entry.stat(follow_symlinks=False).st_uid == os.getuid():
                    _remove_if_unlocked(entry.path)


def _remove_if_unlocked(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises BlockingIOError where its process lives
        shutil.rmtree(path, ignore_errors=True)
    finally:
        os.close(descriptor)
