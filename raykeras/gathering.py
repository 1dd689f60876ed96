"""The driver's end of the event stream.

Enters: lists of events, from a thread of this process or from the run's desk. Leaves: each event, once
and in order, at every handler: the run's log, the display, the user's own.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import queue
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from raykeras import events
from raykeras.checkpoint import RunFolder
from raykeras.desk import Desk
from raykeras.errors import redacted
from raykeras.events import Event
from raykeras.logs import as_json

_EVENTS, _HISTORY = "events.jsonl", "history.csv"


class RunLog:
    """Writes `events.jsonl` and `history.csv` of a run; goes on in those that an earlier driver left.

    On storage that cannot append, after each epoch and at the end.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._temporary = None if folder.is_local else tempfile.TemporaryDirectory(prefix="raykeras-log-")
        self._local = self._temporary.name if self._temporary else folder.path
        if not folder.is_local:
            for name in (_EVENTS, _HISTORY):
                if folder.fs.exists(folder / name):
                    folder.fs.get_file(folder / name, os.path.join(self._local, name))
        self._history = self._read_history()
        self._events = open(os.path.join(self._local, _EVENTS), "a")  # noqa: SIM115

    def __call__(self, event: Event) -> None:
        self._events.write(redacted(json.dumps(event.as_dict(), default=str)) + "\n")
        if not isinstance(event, events.BatchEnded):
            self._events.flush()
        if isinstance(event, events.RunStarted | events.RunRestarted):  # later epochs are made anew
            first = event.initial_epoch if isinstance(event, events.RunStarted) else event.epoch or 0
            self._history = [row for row in self._history if int(row["epoch"]) < first]
        if isinstance(event, events.EpochEnded):
            self._history.append({"epoch": event.epoch, **as_json(event.logs)})
            self._write_history()
            self._upload()

    def close(self) -> None:
        self._events.close()
        self._upload()
        if self._temporary is not None:
            self._temporary.cleanup()

    def _read_history(self) -> list[dict[str, Any]]:
        path = os.path.join(self._local, _HISTORY)
        if not os.path.exists(path):
            return []
        with open(path, newline="") as file:
            return list(csv.DictReader(file))

    def _write_history(self) -> None:
        names = list(dict.fromkeys(name for row in self._history for name in row))
        with open(os.path.join(self._local, _HISTORY), "w", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(self._history)

    def _upload(self) -> None:
        if self._folder.is_local:
            return
        if not self._events.closed:
            self._events.flush()
        for name in os.listdir(self._local):
            self._folder.fs.put_file(os.path.join(self._local, name), self._folder / name)


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
