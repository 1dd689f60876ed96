"""Write checkpoints in a background thread while training continues."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
import time
from collections.abc import Callable

from raykeras.checkpoint import store as checkpoint_store
from raykeras.checkpoint.snapshot import Snapshot
from raykeras.checkpoint.store import RunFolder
from raykeras.core import events
from raykeras.core.config import Run
from raykeras.core.errors import CheckpointError, RaykerasError
from raykeras.core.events import Event
from raykeras.core.storage_errors import is_storage_error, is_temporary

_BACKOFF_S = (0.5, 1, 2, 4, 8, 16, 30)
"""Seconds between the attempts to write a checkpoint; the last value repeats."""

_STOP_S = 30.0

_NICENESS = 10

LAST_WAIT_S = 120.0
"""Seconds that storage may fail once training has ended and only the last checkpoint remains to be written."""


class AsyncCheckpointWriter:
    """Writes checkpoints to a run's folder in a thread, one at a time.

    Args:
        folder: The run's folder.
        token: The token with which this driver claimed the folder.
        run: Sets how many checkpoints to keep, and which one is best.
        send: Receives events.
    """

    def __init__(self, folder: RunFolder, token: str, run: Run, send: Callable[[Event], None]) -> None:
        self._folder, self._token, self._run, self._send = folder, token, run, send
        self._changed = threading.Condition()
        self._waiting: tuple[str, Snapshot, events.CheckpointSaved] | None = None
        self._is_writing = self._is_failing = self._ended = False
        self._failure: RaykerasError | None = None
        self._thread = threading.Thread(target=self._work, name="raykeras-checkpoint", daemon=True)
        self._thread.start()

    @property
    def is_idle(self) -> bool:
        """Whether everything that was queued is written."""
        return not (self._waiting or self._is_writing)

    def put(self, name: str, snapshot: Snapshot, saved: events.CheckpointSaved, begun: float) -> None:
        """Queue a checkpoint, after waiting for the previous one to be written.

        While storage fails, it replaces the previous one instead of waiting.

        Args:
            name: Name of the checkpoint's folder.
            snapshot: The contents of the checkpoint.
            saved: The event to send once the checkpoint is saved.
            begun: When training stopped for the checkpoint, in seconds since the Unix epoch.

        Raises:
            CheckpointError: A checkpoint could not be written; no more will be.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._is_failing or self._failure or self.is_idle)
            if self._failure is not None:
                raise self._failure
            resumed = time.time()
            self._waiting = (name, snapshot, dataclasses.replace(saved, seconds=resumed - begun, resumed=resumed))
            self._changed.notify_all()

    def close(self) -> None:
        """Wait until the last checkpoint is written, and stop the thread.

        Raises:
            CheckpointError: A checkpoint could not be written, or not within `LAST_WAIT_S`.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._failure or self.is_idle, LAST_WAIT_S)
            unwritten = self._waiting or self._is_writing
            self._ended = True
            self._changed.notify_all()
        self._thread.join(_STOP_S)
        if self._failure is None and unwritten:
            raise CheckpointError(
                f"The last checkpoint could not be written to {self._folder.path!r} within {LAST_WAIT_S:.0f} s. Check "
                "the storage, and call `fit` again to resume the run."
            )
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """Finish the pending write and stop the thread; never raises."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        self._thread.join(_STOP_S)

    def _work(self) -> None:
        with contextlib.suppress(OSError, AttributeError):  # Of this thread only; training has priority.
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._ended)
                if self._waiting is None:
                    return
                self._is_writing = True
            failure = self._write_one()
            with self._changed:
                self._is_writing = self._is_failing = False
                self._failure = failure
                self._changed.notify_all()
                if failure is not None:
                    return

    def _write_one(self) -> RaykerasError | None:
        """Write the queued checkpoint, or the one that has replaced it; retry until it is written.

        Returns:
            None once it is written; otherwise an error after which no more checkpoints can be written.
        """
        for attempt in range(1 << 30):
            with self._changed:
                assert self._waiting is not None
                name, snapshot, saved = waiting = self._waiting
            try:
                self._store(name, snapshot)
            except Exception as error:
                if not is_temporary(error):
                    return _permanent_error(error)
                cause = _text(error)
            else:
                snapshot.release()
                self._send(saved)
                with self._changed:
                    if self._waiting is waiting:
                        self._waiting = None
                        return None
                continue
            pause = _BACKOFF_S[min(attempt, len(_BACKOFF_S) - 1)]
            self._send(events.StorageFailed(rank=0, epoch=saved.epoch, step=saved.step, cause=cause, retry_s=pause))
            with self._changed:
                self._is_failing = True
                self._changed.notify_all()
                if self._changed.wait_for(lambda: self._ended, pause):
                    return CheckpointError(f"A checkpoint could not be written: {cause}")
        return None

    def _store(self, name: str, snapshot: Snapshot) -> None:
        def write(folder: str) -> None:
            snapshot.write(folder)
            if not self._folder.is_claimed_by(self._token):
                raise CheckpointError(
                    f"A run must have a single driver; another driver has taken over {self._folder.path!r}, so this "
                    "one stops."
                )

        checkpoint_store.store(self._folder, name, write)
        checkpoint_store.prune(self._folder, self._run.keep, self._run.monitor)


def _permanent_error(error: Exception) -> RaykerasError:
    """Return the error to raise after a failure that retrying cannot fix."""
    if is_storage_error(error.__cause__ or error):
        return CheckpointError(
            f"{_text(error)} Retrying will not help: fix the cause, and call `fit` again to resume the run."
        )
    if isinstance(error, RaykerasError):
        return error
    return CheckpointError(f"A checkpoint could not be written: {_text(error)}")


def _text(error: Exception) -> str:
    return str(error) if isinstance(error, RaykerasError) else f"{type(error).__name__}: {error}"
