"""What `verbose` selects: how the progress of a run is shown, from its first phase on."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import IO

from raykeras.core import events
from raykeras.core.errors import OptionError
from raykeras.core.events import Event
from raykeras.driver.notebook import NotebookDisplay
from raykeras.driver.terminal import BarDisplay, Display, LineDisplay


def make_display(verbose: str | int = "auto", file: IO[str] | None = None, monitor: str = "val_loss") -> Display:
    """Return the display for a `verbose` argument.

    Args:
        verbose: 0 = silent, 1 = progress bar, 2 = one line per epoch. "auto" is 1 on a terminal and in a notebook, and
            2 elsewhere. A file that is no terminal has no bar.
        file: File to write to; stdout by default, or the notebook.
        monitor: Name of the metric that determines the best epoch.

    Raises:
        OptionError: If `verbose` is none of these.
    """
    check_verbose(verbose)
    if verbose == 0:
        return Display()
    if verbose != 2 and file is None and _is_notebook():
        return NotebookDisplay(monitor)
    file = file or sys.stdout
    return BarDisplay(file, monitor) if verbose != 2 and file.isatty() else LineDisplay(file, monitor)


def check_verbose(verbose: str | int) -> None:
    """Raise OptionError unless `verbose` is one of the values that Keras takes."""
    if isinstance(verbose, bool) or verbose not in ("auto", 0, 1, 2):
        raise OptionError(f'`verbose` must be "auto", 0, 1 or 2; got {verbose!r}.')


def _is_notebook() -> bool:
    """Return whether this is a Jupyter kernel, which can show HTML."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return type(shell).__name__ == "ZMQInteractiveShell"


class EarlyEvents:
    """The events before the log of a run is open: shown at once, and logged later.

    Args:
        show: Shows an event.

    Attributes:
        sent: The events.
    """

    def __init__(self, show: Callable[[Event], None]) -> None:
        self.sent: list[Event] = []
        self._show = show

    def begin(self, phase: str) -> None:
        """Begin a phase, a key of `events.PHASES`."""
        event = events.PhaseStarted(phase=phase)
        self.sent.append(event)
        self._show(event)

    def show(self, event: Event) -> None:
        """Show an event, unless it is one of these."""
        if not any(event is sent for sent in self.sent):
            self._show(event)
