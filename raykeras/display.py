"""What the user sees of a run while it goes on.

Enters: the driver's events, in order. Leaves: on a terminal, one progress bar for each epoch; on a
pipe or in a job's log, one line for each.
"""

from __future__ import annotations

import sys
from typing import IO, Any

import numpy as np

from raykeras import events
from raykeras.errors import OptionError, redacted
from raykeras.events import Event
from raykeras.logs import Logs

_MAX_SHOWN = 4  # values of a metric that has several


def make_display(verbose: str | int = "auto", file: IO[str] | None = None) -> Display:
    """The display for a `verbose` argument.

    Args:
        verbose: 0 silent, 1 a progress bar, 2 a line an epoch; "auto" is 1 on a terminal, else 2.
        file: Where to write; stdout by default.
    """
    file = file or sys.stdout
    if isinstance(verbose, bool) or verbose not in ("auto", 0, 1, 2):
        raise OptionError(f'`verbose` must be "auto", 0, 1 or 2; got {verbose!r}.')
    if verbose == "auto":
        verbose = 1 if file.isatty() else 2
    return {0: Display, 1: BarDisplay, 2: LineDisplay}[int(verbose)](file)


class Display:
    """Shows nothing."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file

    def __call__(self, event: Event) -> None:
        """Shows an event."""

    def close(self) -> None:
        """Leaves the terminal as it was."""


class LineDisplay(Display):
    """A line an epoch, at once readable in a log."""

    def __init__(self, file: IO[str]) -> None:
        super().__init__(file)
        self._params: dict[str, Any] = {}
        self._path = ""

    def __call__(self, event: Event) -> None:
        if isinstance(event, events.RunStarted):
            self._params, self._path = event.params, event.path
            self._line(header(event))
        elif isinstance(event, events.EpochEnded):
            self._line(epoch_line(event, self._params))
        elif isinstance(event, events.RunEnded):
            if event.status == "completed":
                self._line(f"completed; checkpoints in {self._path}/checkpoints")
            elif self._path:
                self._line(f"{event.status}; to go on: --resume {self._path}, or Run(storage=…, name=…) as before")
        elif (text := trouble(event)) is not None:
            self._line(text)

    def _line(self, text: str) -> None:
        print(redacted(text), file=self._file, flush=True)


class BarDisplay(LineDisplay):
    """One progress bar for the running epoch, above it a line for each finished one."""

    def __init__(self, file: IO[str]) -> None:
        super().__init__(file)
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._progress = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[logs]}"),
            console=Console(file=file),
            transient=True,
        )
        self._task: Any = None

    def __call__(self, event: Event) -> None:
        if isinstance(event, events.EpochStarted):
            self._begin(event)
        elif isinstance(event, events.BatchEnded):
            if self._task is None:  # an epoch that goes on
                self._begin(event)
            logs = f"{metrics(event.logs)}  {event.rows_per_s:,.0f} rows/s  data wait {event.data_wait:.0%}"
            self._progress.update(self._task, completed=event.step, logs=logs, refresh=True)
        elif isinstance(event, events.EpochEnded | events.RunEnded | events.WorkerFailed):
            self.close()
        super().__call__(event)

    def _begin(self, event: Event) -> None:
        self.close()
        self._progress.start()
        epoch = f"{(event.epoch or 0) + 1}/{self._params.get('epochs', '?')}"
        self._task = self._progress.add_task("", total=self._params.get("steps"), epoch=epoch, logs="")

    def close(self) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
            self._progress.stop()
            self._task = None


def header(event: events.RunStarted) -> str:
    """`2 workers × 1 replica  1,500 rows, batch 32  runs/digits`."""
    each = event.replicas // event.workers
    rows, batch = event.params.get("num_rows"), event.params.get("batch_size")
    return (
        f"{_count(event.workers, 'worker')} × {_count(each, 'replica')}"
        f"{'' if rows is None else f'  {rows:,} rows, batch {batch}'}  {event.path}{_begins(event)}"
    )


def _begins(event: events.RunStarted) -> str:
    if not event.initial_epoch and not event.initial_step:
        return ""
    return f"  from epoch {event.initial_epoch + 1}" + (f", step {event.initial_step}" if event.initial_step else "")


def trouble(event: Event) -> str | None:
    """What is told of an event that has to do with a failure; None of others."""
    if isinstance(event, events.WorkerFailed):
        who = "a worker" if event.rank is None else f"the worker of rank {event.rank}"
        return f"{who} failed{event.node and f' on {event.node}'}: {event.cause}; {event.next}"
    if isinstance(event, events.RunRestarted):
        where = f"epoch {(event.epoch or 0) + 1}, step {event.step}"
        return f"{_count(event.workers, 'worker')} went on from {where}"
    if isinstance(event, events.WorldResized):
        return f"there is room for {_count(event.workers, 'worker')}, after {event.before}"
    if isinstance(event, events.CheckpointDamaged):
        return f"a checkpoint is not used: {event.cause}"
    if isinstance(event, events.StorageFailed):
        return f"a checkpoint could not be written, again in {event.retry_s:g} s: {event.cause}"
    return None


def epoch_line(event: events.EpochEnded, params: dict[str, Any]) -> str:
    """`epoch 1/5  1.9s  47 steps  loss 0.4321  …  12,345 rows/s  data wait 3%`."""
    return "  ".join(
        [
            f"epoch {(event.epoch or 0) + 1}/{params.get('epochs', '?')}",
            f"{event.seconds:.1f}s",
            _count(event.step or 0, "step"),
            metrics(event.logs),
            f"{event.rows_per_s:,.0f} rows/s",
            f"data wait {event.data_wait:.0%}",
        ]
    )


def metrics(logs: Logs) -> str:
    """Loss first, then the others, validation's last, with four digits as Keras shows them."""
    names = sorted(logs, key=lambda name: (name.startswith("val_"), not name.endswith("loss")))
    return "  ".join(f"{name} {_number(logs[name])}" for name in names)


def _number(value: Any) -> str:
    if isinstance(value, np.ndarray):
        shown = " ".join(map(_number, value.flat[:_MAX_SHOWN]))
        return f"[{shown}{' …' if value.size > _MAX_SHOWN else ''}]"
    return f"{value:.4e}" if 0 < abs(value) < 1e-3 else f"{value:.4f}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
