"""The progress of a run in a notebook: a table of its epochs that is updated in place."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from raykeras.core import events
from raykeras.core.events import Event
from raykeras.core.html import line, table
from raykeras.core.logs import Logs
from raykeras.driver.goodput import duration
from raykeras.driver.run_state import RunState
from raykeras.driver.screen import failure_line, header, last_lines, live_lines, number_text, ordered
from raykeras.driver.terminal import Display

_INTERVAL_S = 0.25  # between updates while batches end

_MAX_ROWS = 20  # shown; those of the first epochs make room

_MAX_METRICS = 10  # in a table; those of the validation get their own if there are more

_WIDTH = 100  # of the live lines, in characters


class NotebookDisplay(Display):
    """Shows a run as HTML: in a widget if ipywidgets is installed, else by updates of the cell's output.

    Args:
        monitor: Name of the metric that determines the best epoch.
        show: Shows HTML, and returns a function that replaces it.
    """

    def __init__(self, monitor: str, show: Callable[[str], Callable[[str], None]] | None = None) -> None:
        self._state = RunState(monitor)
        self._show = show or _show_in_cell
        self._notes: list[str] = []
        self._update: Callable[[str], None] | None = None
        self._updated_at = 0.0

    def __call__(self, event: Event) -> None:
        self._state(event)
        if isinstance(event, events.RunStarted):
            self._notes.append(header(event))
        elif isinstance(event, events.RunEnded):
            self._notes += last_lines(self._state)
        elif (text := failure_line(event)) is not None:
            self._notes.append(text)
        now = time.monotonic()
        if isinstance(event, events.BatchEnded) and now - self._updated_at < _INTERVAL_S:
            return
        self._updated_at = now
        text = run_html(self._state, self._notes)
        if self._update is None:
            self._update = self._show(text)
        else:
            self._update(text)

    def close(self) -> None:
        """Leave no live lines if `fit` ends before training."""
        if self._update is not None and not self._state.status:
            self._update(run_html(self._state, self._notes, is_live=False))


def run_html(state: RunState, notes: Sequence[str], is_live: bool = True) -> str:
    """Return the state of a run as HTML: notes, the newest epochs, and what it does now."""
    parts = [line(text) for text in notes]
    if state.finished:
        num_tables = len(_columns([event.logs for event in state.finished.values()]))
        epochs = sorted(state.finished)[-(_MAX_ROWS // num_tables) :]
        logs = [state.finished[epoch].logs for epoch in epochs]
        seconds = [state.finished[epoch].seconds for epoch in epochs]
        parts.append(epochs_tables(epochs, logs, state.best, seconds))
    if is_live:
        parts += [line(text) for text in live_lines(state, _WIDTH)]
    return "".join(parts)


def epochs_tables(epochs: Sequence[int], logs: Sequence[Logs], best: int | None, seconds: Sequence[float] = ()) -> str:
    """Return tables of finished epochs as HTML, with the best one in bold: one, or several if there are many metrics.

    Args:
        epochs: The epochs, from 0.
        logs: Metrics of each.
        best: The best one; None if unknown.
        seconds: Duration of each; empty if unknown.
    """
    bold = epochs.index(best) if best in epochs else None
    tables: list[str] = []
    for names in _columns(logs):
        rows = [
            [str(epoch + 1), *(number_text(values[name]) if name in values else "" for name in names)]
            for epoch, values in zip(epochs, logs, strict=True)
        ]
        if seconds and not tables:
            names = [*names, "time"]
            rows = [[*row, duration(value)] for row, value in zip(rows, seconds, strict=True)]
        tables.append(table(["epoch", *names], rows, bold=bold))
    return "".join(tables)


def _columns(logs: Sequence[Logs]) -> list[list[str]]:
    """Return the metrics of each table."""
    names = ordered({name: None for values in logs for name in values})
    if len(names) <= _MAX_METRICS:
        return [names]
    parts = [[name for name in names if name.startswith("val_") == is_validation] for is_validation in (False, True)]
    return [part[i : i + _MAX_METRICS] for part in parts for i in range(0, len(part), _MAX_METRICS)]


def _show_in_cell(text: str) -> Callable[[str], None]:
    """Show HTML in the output of the cell that runs, and return a function that replaces it."""
    from IPython.display import HTML, display

    try:
        import ipywidgets
    except ImportError:
        handle = display(HTML(text), display_id=True)
        return lambda changed: handle.update(HTML(changed))
    widget: Any = ipywidgets.HTML(text)
    display(widget)
    return lambda changed: setattr(widget, "value", changed)
