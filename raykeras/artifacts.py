"""The files that callbacks write on the chief, and where the run keeps them.

Enters: a folder of this machine, into which callbacks write. Leaves: the same files under the run's
`artifacts/`, on whatever storage, each told of once it is there.
"""

from __future__ import annotations

import functools
import os

from raykeras.checkpoint import RunFolder
from raykeras.storage_errors import retried
from raykeras.temporary import TemporaryFolder

FOLDER = "artifacts"


class Artifacts:
    """A run's artifacts; on the chief only.

    Args:
        run: The run's folder.

    Attributes:
        path: Folder of this machine for relative paths.
    """

    def __init__(self, run: RunFolder) -> None:
        self._run = run
        self._staging = None if run.is_local else TemporaryFolder("artifacts")
        self.path = self._staging.name if self._staging else run / FOLDER
        self._seen: dict[str, tuple[int, int]] = {}
        if self._staging and run.fs.exists(run / FOLDER):  # of an interrupted run, which goes on
            run.fs.get(f"{run / FOLDER}/", f"{self.path}/", recursive=True)

    def collect(self) -> list[str]:
        """Stores files that are new, or have changed since; their paths on the run's storage."""
        stored = []
        for parent, _, names in sorted(os.walk(self.path)):
            for name in sorted(names):
                path = os.path.join(parent, name)
                status = os.stat(path)
                version = (status.st_mtime_ns, status.st_size)
                if self._seen.get(path) == version:
                    continue
                self._seen[path] = version
                target = f"{self._run / FOLDER}/{os.path.relpath(path, self.path)}"
                if self._staging:
                    retried(functools.partial(self._put, path, target))
                stored.append(target)
        return stored

    def _put(self, path: str, target: str) -> None:
        self._run.fs.makedirs(os.path.dirname(target), exist_ok=True)
        self._run.fs.put_file(path, target)

    def close(self) -> None:
        if self._staging:
            self._staging.cleanup()
