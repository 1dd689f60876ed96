"""Temporary folders that are removed even if their process is killed.

A process locks its folders while it lives; the operating system releases the locks however the process ends. Later
processes remove unlocked folders.
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

_Kind = Literal["artifacts", "checkpoint", "log", "model", "snapshot", "train", "unkept"]

_NAME = re.compile(rf"raykeras-({'|'.join(get_args(_Kind))})-\w{{8}}")


class TemporaryFolder(tempfile.TemporaryDirectory[str]):
    """A `tempfile.TemporaryDirectory` that `remove_abandoned` removes if this process is killed.

    Args:
        kind: What the folder is for; part of its name.
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
        """Lock the folder; return False if another process removed it first."""
        try:
            descriptor = os.open(self.name, os.O_RDONLY)
        except FileNotFoundError:
            return False
        self._unlock = weakref.finalize(self, os.close, descriptor)
        with contextlib.suppress(OSError):  # Without file locks, `remove_abandoned` removes nothing either.
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        return os.path.exists(self.name)


def remove_abandoned() -> None:
    """Remove the temporary folders of this user's killed processes; never raises."""
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
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError if the process is alive
        shutil.rmtree(path, ignore_errors=True)
    finally:
        os.close(descriptor)
