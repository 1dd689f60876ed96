"""The events of a run, read from the log in its folder."""

from __future__ import annotations

import json
from collections.abc import Iterator

from raykeras.checkpoint.store import RunFolder
from raykeras.core.events import Event, from_dict

EVENTS_FILE = "events.jsonl"


class StoredEvents:
    """Reads a log that may still grow.

    Args:
        folder: The run's folder.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._offset = 0

    def read_new(self) -> list[Event]:
        """Return the events that were written since the last call.

        Raises:
            CheckpointError: The storage cannot be read.
        """
        data = self._folder.read(EVENTS_FILE, self._offset)
        end = data.rfind(b"\n") + 1  # the last line may be incomplete
        self._offset += end
        return list(parse_events(data[:end].decode(errors="replace")))


def parse_events(text: str) -> Iterator[Event]:
    """Yield the events in the lines of a log, which may come from anyone; lines that are not valid are skipped."""
    for line in text.split("\n"):
        try:
            event = from_dict(json.loads(line))
        except (ValueError, RecursionError):
            continue
        if event is not None:
            yield event
