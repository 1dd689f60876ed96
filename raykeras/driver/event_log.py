"""The driver's end of the event stream: the dispatch of events to handlers, and the log of a run."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import glob
import itertools
import json
import os
import queue
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from raykeras.checkpoint.store import RunFolder
from raykeras.core import events
from raykeras.core.errors import redacted
from raykeras.core.events import Event
from raykeras.core.logs import as_json, plain_number
from raykeras.core.plain_values import plain_value
from raykeras.core.storage_errors import is_temporary
from raykeras.core.temporary import TemporaryFolder
from raykeras.driver.record import RECORD_FILE
from raykeras.driver.stored_events import EVENTS_FILE
from raykeras.worker.coordinator import RunCoordinator

LAST_WAIT_S = 60.0
"""How long the last upload of the log may delay the end of a run."""


HISTORY_FILE = "history.csv"


_PARTIAL = ".partial"


_BATCHES_S = 1.0
"""Batches within this time share a line, so that the log of a long run stays small."""


_PAUSES_S = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)


_TAIL_NBYTES = 1 << 20


class RunLog:
    """An event handler that writes `events.jsonl` and `history.csv` of a run, and continues existing ones.

    On remote storage, which cannot append, the files are written to a temporary folder and uploaded by a thread at the
    start, after each epoch and at the end. A failure to write the log never fails the run. Once another driver has
    taken over the folder, this one stops writing at the end of its epoch.

    Args:
        folder: Folder of the run.
        token: The token with which this driver claimed the folder.

    Attributes:
        local: The local folder of the files.
    """

    def __init__(self, folder: RunFolder, token: str) -> None:
        self._folder, self._token = folder, token
        self._is_ours = True
        self._temporary = None if folder.is_local else TemporaryFolder("log")
        self.local = self._temporary.name if self._temporary else folder.path
        self._failure: Exception | None = None
        self._writers: list[Callable[[Event], None]] = []
        self._batches: events.BatchEnded | None = None  # not written yet
        self._batches_at = 0.0  # when batches were written last
        if self._temporary:
            self._download()
        for name in (EVENTS_FILE, HISTORY_FILE):
            _drop_partial_line(os.path.join(self.local, name))
        self._history = _read_history(os.path.join(self.local, HISTORY_FILE))
        self._events = open(os.path.join(self.local, EVENTS_FILE), "a")  # noqa: SIM115
        self._uploader = _Uploader(folder, self.local, token) if self._temporary else None

    def add(self, writer: Callable[[Event], None]) -> None:
        """Call a function with each event, which writes other files to `local`. They are uploaded as well."""
        self._writers.append(writer)

    def __call__(self, event: Event) -> None:
        try:
            if self._uploader is None and isinstance(event, _UPLOADED):
                self._is_ours = self._folder.is_claimed_by(self._token)
            if not self._is_ours:
                return
            self._write(event)
        except OSError as error:  # for example, the disk is full
            self._failure = self._failure or error
        for writer in list(self._writers):
            try:
                writer(event)
            except Exception as error:
                self._writers.remove(writer)
                self._failure = self._failure or error
        if self._uploader is not None and isinstance(event, _UPLOADED):
            self._uploader.request()

    def close(self) -> None:
        """Upload the rest. If the log is incomplete, warn once and name the local copy. Never raises."""
        try:
            if self._is_ours:
                self._write_batches()
            self._events.close()
        except OSError as error:
            self._failure = self._failure or error
        local_copy = self.local
        if self._uploader is not None and self._temporary is not None:
            failure = self._uploader.close()
            if failure is not None:
                self._failure = self._failure or failure
                local_copy = tempfile.mkdtemp(prefix="raykeras-kept-log-")
                os.rename(self.local, local_copy)
            self._temporary.cleanup()
        if self._failure is not None:
            message = (
                f"Some files of the run's log could not be written to {self._folder.path!r}: "
                f"{type(self._failure).__name__}: {self._failure} Those that were written are in {local_copy!r}. The "
                "run itself is not affected."
            )
            warnings.warn(redacted(message), stacklevel=3)

    def _write(self, event: Event) -> None:
        if isinstance(event, events.RunStarted | events.RunRestarted | events.RunEnded):
            for missing in events.missing_epochs(event.history, {int(row["epoch"]) for row in self._history}):
                self._write(missing)
            event = dataclasses.replace(event, history={})
        if isinstance(event, events.BatchEnded):
            self._batches = event if self._batches is None else events.merge(self._batches, event)
            if abs(event.time - self._batches_at) >= _BATCHES_S:  # clocks may be set back
                self._write_batches()
            return
        self._write_batches()
        self._write_line(event)
        if isinstance(event, events.RunStarted | events.RunRestarted):  # later epochs are trained again
            first = event.initial_epoch if isinstance(event, events.RunStarted) else event.epoch or 0
            self._history = [row for row in self._history if int(row["epoch"]) < first]
        if isinstance(event, events.EpochEnded):
            self._history.append({"epoch": event.epoch, **as_json(event.logs)})
            self._write_history()

    def _write_batches(self) -> None:
        """Write the batches since the last line of batches."""
        if self._batches is not None:
            self._write_line(self._batches)
            self._batches_at = self._batches.time
            self._batches = None

    def _write_line(self, event: Event) -> None:
        self._events.write(json.dumps(plain_value(event.as_dict())) + "\n")
        self._events.flush()

    def _write_history(self) -> None:
        names = list(dict.fromkeys(name for row in self._history for name in row))
        path = os.path.join(self.local, HISTORY_FILE)
        with open(path + _PARTIAL, "w", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(self._history)
        os.replace(path + _PARTIAL, path)  # atomic, since the file may be uploading

    def _download(self) -> None:
        for name in (EVENTS_FILE, HISTORY_FILE, RECORD_FILE):
            self._folder.download(name, os.path.join(self.local, name))


_UPLOADED = (events.RunStarted, events.RunRestarted, events.WorkerFailed, events.EpochEnded, events.RunEnded)
"""Events after which the log is uploaded, and before which a local one is checked to be this driver's."""


class _Uploader:
    """A thread that uploads the log of a run on request.

    Args:
        folder: Folder of the run.
        local: Local folder that contains the log.
        token: As for `RunLog`.
    """

    def __init__(self, folder: RunFolder, local: str, token: str) -> None:
        self._folder, self._local, self._token = folder, local, token
        self._changed = threading.Condition()
        self._is_requested = False
        self._deadline: float | None = None  # of the last upload, once `close` has requested it
        self._failure: Exception | None = None
        self._uploaded: dict[str, tuple[int, int]] = {}  # size and modification time by name
        self._thread = threading.Thread(target=self._work, name="raykeras-upload", daemon=True)
        self._thread.start()

    def request(self) -> None:
        """Request an upload, and return at once."""
        with self._changed:
            self._is_requested = True
            self._changed.notify_all()

    def close(self) -> Exception | None:
        """Upload once more, for at most `LAST_WAIT_S`; return the failure, or None."""
        with self._changed:
            self._is_requested, self._deadline = True, time.monotonic() + LAST_WAIT_S
            self._changed.notify_all()
        self._thread.join(LAST_WAIT_S)
        if self._thread.is_alive():
            return self._failure or TimeoutError(f"The upload took more than {LAST_WAIT_S:.0f} s.")
        return self._failure

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_requested)
                self._is_requested, is_last = False, self._deadline is not None
            self._upload()
            if is_last:
                return

    def _upload(self) -> None:
        """Upload the files. Retry temporary failures; at the end of a run, until the deadline."""
        for pause_s in itertools.chain(_PAUSES_S, itertools.repeat(_PAUSES_S[-1])):
            try:
                self._upload_changed()
            except Exception as error:
                self._failure = error
            else:
                self._failure = None
                return
            with self._changed:
                if not is_temporary(self._failure):
                    return
                if self._deadline is None:
                    self._changed.wait_for(lambda: self._deadline is not None, pause_s)
                elif time.monotonic() < self._deadline:
                    self._changed.wait(_PAUSES_S[0])
                else:
                    return

    def _upload_changed(self) -> None:
        """Upload the files that changed since they were uploaded last, unless another driver has taken over."""
        if not self._folder.is_claimed_by(self._token):
            return
        for name in sorted(glob.glob("**", root_dir=self._local, recursive=True)):
            path = os.path.join(self._local, name)
            if not os.path.isfile(path) or name.endswith(_PARTIAL):
                continue
            status = os.stat(path)
            version = (status.st_size, status.st_mtime_ns)
            if self._uploaded.get(name) != version:
                if "/" in name:
                    self._folder.fs.makedirs(self._folder / os.path.dirname(name), exist_ok=True)
                self._uploaded.pop(name, None)  # a request that fails may leave anything
                self._folder.fs.put_file(path, self._folder / name)
                self._uploaded[name] = version


def _read_history(path: str) -> list[dict[str, Any]]:
    """Return the valid rows of a `history.csv`; none if the file does not exist."""
    if not os.path.exists(path):
        return []
    with open(path, newline="", errors="replace") as file:
        rows = csv.DictReader(line.replace("\0", "") for line in file)
        try:
            return [row for row in rows if _is_valid(row)]
        except csv.Error:
            return []


def _is_valid(row: dict[Any, Any]) -> bool:
    """Return whether a row has an epoch, and numbers or nothing for each metric."""
    try:
        values = [json.loads(value) if value.startswith("[") else float(value) for value in row.values() if value != ""]
        return int(row["epoch"]) >= 0 and all(plain_number(value) is not None for value in values)
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError):
        return False


def _drop_partial_line(path: str) -> None:
    """Remove an incomplete last line from a file, so that nothing is appended to it."""
    if not os.path.exists(path):
        return
    with open(path, "r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _TAIL_NBYTES))
        tail = file.read()
        if not tail.endswith(b"\n"):
            file.truncate(size - len(tail) + tail.rfind(b"\n") + 1)


class EventDispatcher:
    """A thread that calls every handler with each event, once and in order.

    The end of an epoch that was lost with a worker is made up for, once it is known from a checkpoint or the outcome.
    A handler that raises is not called again.

    Args:
        handlers: Functions of an event.
        start: Number of epochs that ended before, and of steps in the next one.

    Attributes:
        queue: Accepts lists of events.
    """

    def __init__(self, handlers: Sequence[Callable[[Event], None]], start: tuple[int, int] = (0, 0)) -> None:
        self.queue: queue.SimpleQueue[list[Event] | None] = queue.SimpleQueue()
        self._handlers = list(handlers)
        self._start = start
        self._epochs = set(range(start[0]))  # that have ended
        self._has_started = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._dispatch, name="raykeras-dispatch", daemon=True)
        self._thread.start()

    def send(self, event: Event) -> None:
        """Enqueue an event of the driver."""
        self.queue.put([event])

    def close(self, last: Event) -> None:
        """Dispatch all events in the queue and a last one, and end the thread."""
        self.queue.put([last])
        self.queue.put(None)
        self._thread.join()

    def raise_failure(self) -> None:
        """Raise the first exception of a handler, if there was one."""
        if self._failure is not None:
            raise self._failure

    def _dispatch(self) -> None:
        while (batch := self.queue.get()) is not None:
            for event in itertools.chain.from_iterable(map(self._with_missing, batch)):
                for handler in list(self._handlers):
                    try:
                        handler(event)
                    except BaseException as error:  # `ray.tune.report` raises SystemExit
                        self._handlers.remove(handler)
                        self._failure = self._failure or error

    def _with_missing(self, event: Event) -> list[Event]:
        """Return an event, after the ends of epochs that were lost before it; nothing if a run starts again."""
        missing: list[events.EpochEnded] = []
        if isinstance(event, events.RunStarted):
            if self._has_started:
                return []
            self._has_started = True
            epoch, step = self._start  # workers that were lost before they started it may have got further
            event = dataclasses.replace(event, initial_epoch=epoch, initial_step=step)
        elif isinstance(event, events.EpochEnded):
            self._epochs.add(event.epoch or 0)
        elif isinstance(event, events.RunRestarted):
            missing = events.missing_epochs(event.history, self._epochs)
            self._epochs = set(range(event.epoch or 0))
        elif isinstance(event, events.RunEnded):
            missing = events.missing_epochs(event.history, self._epochs)
        return [*missing, event]


@contextlib.contextmanager
def forwarding(coordinator: RunCoordinator, dispatcher: EventDispatcher) -> Iterator[None]:
    """Forward events from the coordinator to the dispatcher while the block runs, and the rest of them at its end."""

    def forward() -> None:
        with contextlib.suppress(Exception):  # the coordinator's node was lost
            while (batch := coordinator.get()) is not None:
                dispatcher.queue.put(batch)

    thread = threading.Thread(target=forward, name="raykeras-forward", daemon=True)
    thread.start()
    try:
        yield
    finally:
        with contextlib.suppress(Exception):
            coordinator.end()
        thread.join()
        coordinator.close()
