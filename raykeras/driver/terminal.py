"""The progress output of a run as text: live lines on a terminal, a line per epoch elsewhere."""

from __future__ import annotations

import threading
from typing import IO, TYPE_CHECKING

from raykeras.core import events
from raykeras.core.errors import printable
from raykeras.core.events import Event
from raykeras.driver.run_state import RunState
from raykeras.driver.screen import INDENT, epoch_texts, failure_line, header, last_lines, live_lines, wrapped

if TYPE_CHECKING:
    from rich.text import Text

_REFRESHES_PER_S = 4


class Display:
    """An event handler that shows nothing."""

    def __call__(self, event: Event) -> None:
        """Show an event."""

    def close(self) -> None:
        """Restore the terminal."""


class LineDisplay(Display):
    """Prints one line per epoch and per failure or restart, and a summary."""

    def __init__(self, file: IO[str], monitor: str) -> None:
        self._file, self._state = file, RunState(monitor)

    def __call__(self, event: Event) -> None:
        self._update(event)
        if isinstance(event, events.RunStarted):
            self._print([header(event)])
        elif isinstance(event, events.EpochEnded):
            self._print(epoch_texts(event, self._state.epochs))
        elif isinstance(event, events.RunEnded):
            for line in last_lines(self._state):
                self._print([line])
        elif (text := failure_line(event)) is not None:
            self._print([text])

    def _update(self, event: Event) -> None:
        self._state(event)

    def _print(self, texts: list[str]) -> None:
        """Print texts in one line."""
        print(printable(" - ".join(texts)), file=self._file, flush=True)


class BarDisplay(LineDisplay):
    """Shows what the run does now on the last lines of a terminal, below the lines that `LineDisplay` prints."""

    def __init__(self, file: IO[str], monitor: str) -> None:
        from rich.console import Console
        from rich.live import Live

        super().__init__(file, monitor)
        self._lock = threading.Lock()  # of the state, which a thread of Rich reads
        self._console = Console(file=file, highlight=False, markup=False, emoji=False)
        self._live = Live(
            console=self._console,
            get_renderable=self._renderable,
            transient=True,
            refresh_per_second=_REFRESHES_PER_S,
        )
        self._is_live = False

    def __call__(self, event: Event) -> None:
        if isinstance(event, events.RunEnded):
            self.close()
        elif not self._is_live:
            self._is_live = True
            self._live.start()
        super().__call__(event)
        if self._is_live and not isinstance(event, events.BatchEnded):
            self._live.refresh()

    def close(self) -> None:
        if self._is_live:
            self._is_live = False
            self._live.stop()

    def _update(self, event: Event) -> None:
        with self._lock:
            self._state(event)

    def _print(self, texts: list[str]) -> None:
        lines = wrapped(map(printable, texts), self._console.width, indent=INDENT)
        self._console.print("\n".join(lines), soft_wrap=True)

    def _renderable(self) -> Text:
        from rich.text import Text

        with self._lock:
            lines = live_lines(self._state, self._console.width)
        text = Text("\n".join(map(printable, lines)), no_wrap=True, overflow="ellipsis")
        text.highlight_regex("━+", "green")
        text.highlight_regex("─+", "bright_black")
        return text
