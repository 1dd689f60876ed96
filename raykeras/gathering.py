"""The driver's end of the event stream.

Enters: lists of events, from a thread of this process or from the run's desk. Leaves: each event, once
and in order, at every handler: the run's log, the display, the user's own.
"""

from __future__ import annotations

import contextlib
import csv
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

from raykeras import events
from raykeras.checkpoint import RunFolder
from raykeras.desk import Desk
from raykeras.errors import redacted
from raykeras.events import Event
from raykeras.logs import as_json, plain_number
from raykeras.storage_errors import is_temporary, retried
from raykeras.temporary import TemporaryFolder

LAST_WAIT_S = 60.0
"""How long the end of a run may be held up by its log."""

_EVENTS, _HISTORY = "events.jsonl", "history.csv"
_PAUSES_S = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
_TAIL_NBYTES = 1 << 20


class RunLog:
    """Writes `events.jsonl` and `history.csv` of a run; goes on in those that an earlier driver left.

    On storage that cannot append, after each epoch and at the end, by a thread that nothing waits for. A run neither
    fails nor ends otherwise because its log cannot be written.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._temporary = None if folder.is_local else TemporaryFolder("log")
        self._local = self._temporary.name if self._temporary else folder.path
        self._failure: Exception | None = None
        if self._temporary:
            retried(self._download)
        path = os.path.join(self._local, _EVENTS)
        _drop_partial_line(path)
        self._history = _read_history(os.path.join(self._local, _HISTORY))
        self._events = open(path, "a")  # noqa: SIM115
        self._upload = _Upload(folder, self._local) if self._temporary else None

    def __call__(self, event: Event) -> None:
        try:
            self._write(event)
        except OSError as error:  # such as a full disk
            self._failure = self._failure or error

    def close(self) -> None:
        """Uploads what is left; warns once if that fails, and says where it is instead. Never raises."""
        try:
            self._events.close()
        except OSError as error:
            self._failure = self._failure or error
        kept = self._local
        if self._upload is not None and self._temporary is not None:
            failure = self._upload.close()
            if failure is not None:
                self._failure = self._failure or failure
                kept = tempfile.mkdtemp(prefix="raykeras-kept-log-")
                os.rename(self._local, kept)
            self._temporary.cleanup()
        if self._failure is not None:
            text = (
                f"The events of the run in {self._folder.path!r} could not all be written there: "
                f"{type(self._failure).__name__}: {self._failure} What there is of them is in {kept!r}; the run itself "
                "is not affected."
            )
            warnings.warn(redacted(text), stacklevel=3)

    def _write(self, event: Event) -> None:
        self._events.write(redacted(json.dumps(event.as_dict(), default=str)) + "\n")
        if not isinstance(event, events.BatchEnded):
            self._events.flush()
        if isinstance(event, events.RunStarted | events.RunRestarted):  # later epochs are made anew
            first = event.initial_epoch if isinstance(event, events.RunStarted) else event.epoch or 0
            self._history = [row for row in self._history if int(row["epoch"]) < first]
        if isinstance(event, events.EpochEnded):
            self._history.append({"epoch": event.epoch, **as_json(event.logs)})
            self._write_history()
            if self._upload is not None:
                self._upload.request()

    def _write_history(self) -> None:
        names = list(dict.fromkeys(name for row in self._history for name in row))
        path = os.path.join(self._local, _HISTORY)
        with open(f"{path}.partial", "w", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(self._history)
        os.replace(f"{path}.partial", path)  # it may be uploaded meanwhile

    def _download(self) -> None:
        for name in (_EVENTS, _HISTORY):
            if self._folder.fs.exists(self._folder / name):
                self._folder.fs.get_file(self._folder / name, os.path.join(self._local, name))


class _Upload:
    """A thread that copies a run's log to its folder when asked to.

    Args:
        folder: The run's.
        local: Folder of this machine with the log.
    """

    def __init__(self, folder: RunFolder, local: str) -> None:
        self._folder, self._local = folder, local
        self._changed = threading.Condition()
        self._is_requested = False
        self._deadline: float | None = None  # of the last copy, once it is asked for
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._work, name="raykeras-upload", daemon=True)
        self._thread.start()

    def request(self) -> None:
        """Asks for a copy; returns at once."""
        with self._changed:
            self._is_requested = True
            self._changed.notify_all()

    def close(self) -> Exception | None:
        """Makes the last copy; returns what was wrong if that is not possible in `LAST_WAIT_S`."""
        with self._changed:
            self._is_requested, self._deadline = True, time.monotonic() + LAST_WAIT_S
            self._changed.notify_all()
        self._thread.join(LAST_WAIT_S)
        if self._thread.is_alive():
            return self._failure or TimeoutError(f"Writing took more than {LAST_WAIT_S:.0f} s.")
        return self._failure

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_requested)
                self._is_requested, is_last = False, self._deadline is not None
            self._copy()
            if is_last:
                return

    def _copy(self) -> None:
        """Copies until that succeeds, fails permanently, or the time for it is over."""
        for pause_s in itertools.chain(_PAUSES_S, itertools.repeat(_PAUSES_S[-1])):
            try:
                for name in filter(os.path.exists, (os.path.join(self._local, name) for name in (_EVENTS, _HISTORY))):
                    self._folder.fs.put_file(name, self._folder / os.path.basename(name))
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


def _read_history(path: str) -> list[dict[str, Any]]:
    """The rows of a `history.csv` that are whole; none where there is none."""
    if not os.path.exists(path):
        return []
    with open(path, newline="", errors="replace") as file:
        rows = csv.DictReader(line.replace("\0", "") for line in file)
        try:
            return [row for row in rows if _is_whole(row)]
        except csv.Error:
            return []


def _is_whole(row: dict[Any, Any]) -> bool:
    """Whether a row has an epoch, and a number or nothing for each metric."""
    try:
        values = [json.loads(value) if value.startswith("[") else float(value) for value in row.values() if value != ""]
        return int(row["epoch"]) >= 0 and all(plain_number(value) is not None for value in values)
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError):
        return False


def _drop_partial_line(path: str) -> None:
    """Removes the last line of a file where its writing was cut off, so that the next one is not added to it."""
    if not os.path.exists(path):
        return
    with open(path, "r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _TAIL_NBYTES))
        tail = file.read()
        if not tail.endswith(b"\n"):
            file.truncate(size - len(tail) + tail.rfind(b"\n") + 1)


class Gathering:
    """The driver's end of the event stream: a thread that hands each event to all handlers."""

    def __init__(self, handlers: Sequence[Callable[[Event], None]]) -> None:
        self.queue: queue.SimpleQueue[list[Event] | None] = queue.SimpleQueue()
        self._handlers = list(handlers)
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._gather, name="raykeras-gather", daemon=True)
        self._thread.start()

    def send(self, event: Event) -> None:
        """Hands on an event of this process."""
        self.queue.put([event])

    def close(self, last: Event) -> None:
        """Hands on what has come, and a last event."""
        self.queue.put([last])
        self.queue.put(None)
        self._thread.join()

    def raise_failure(self) -> None:
        """Raises what a handler raised; it was not called again after that."""
        if self._failure is not None:
            raise self._failure

    def _gather(self) -> None:
        while (batch := self.queue.get()) is not None:
            for event in batch:
                for handler in list(self._handlers):
                    try:
                        handler(event)
                    except Exception as error:
                        self._handlers.remove(handler)
                        self._failure = self._failure or error


@contextlib.contextmanager
def forwarding(desk: Desk, gathered: Gathering) -> Iterator[None]:
    """Moves events from the workers' desk to the driver's handlers, until all have come."""

    def forward() -> None:
        with contextlib.suppress(Exception):  # the desk's node is gone
            while (batch := desk.get()) is not None:
                gathered.queue.put(batch)

    thread = threading.Thread(target=forward, name="raykeras-forward", daemon=True)
    thread.start()
    try:
        yield
    finally:
        with contextlib.suppress(Exception):
            desk.end()
        thread.join()
        desk.close()
