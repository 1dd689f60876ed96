"""The progress output of a run: a bar per epoch on a terminal, and a line per epoch elsewhere."""

from __future__ import annotations

import sys
from typing import IO, Any

import numpy as np

from raykeras.core import events
from raykeras.core.errors import OptionError, redacted
from raykeras.core.events import Event
from raykeras.core.logs import Logs

_MAX_SHOWN = 4  # values of a metric that is an array


def make_display(verbose: str | int = "auto", file: IO[str] | None = None) -> Display:
    """Return the display for a `verbose` argument.

    Args:
        verbose: 0 = silent, 1 = progress bar, 2 = one line per epoch. "auto" is 1 on a terminal and 2 elsewhere.
        file: File to write to; stdout by default.

    Raises:
        OptionError: If `verbose` is none of these.
    """
    file = file or sys.stdout
    if isinstance(verbose, bool) or verbose not in ("auto", 0, 1, 2):
        raise OptionError(f'`verbose` must be "auto", 0, 1 or 2; got {verbose!r}.')
    if verbose == "auto":
        verbose = 1 if file.isatty() else 2
    return {0: Display, 1: BarDisplay, 2: LineDisplay}[int(verbose)](file)


class Display:
    """An event handler that shows nothing."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file

    def __call__(self, event: Event) -> None:
        """Show an event."""

    def close(self) -> None:
        """Restore the terminal."""


class LineDisplay(Display):
    """Prints one line per epoch, and one per failure or restart."""

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
                self._line(f"{event.status}; to resume: --resume {self._path}, or the same Run(storage=…, name=…)")
        elif (text := failure_line(event)) is not None:
            self._line(text)

    def _line(self, text: str) -> None:
        print(redacted(text), file=self._file, flush=True)


class BarDisplay(LineDisplay):
    """Shows a progress bar for the current epoch, below one line per finished epoch."""

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
            if self._task is None:  # a resumed epoch, which has no `EpochStarted`
                self._begin(event)
            rate = [f"{event.rows_per_s:,.0f} rows/s", f"data wait {event.data_wait:.0%}"]
            logs = " - ".join([*metrics(event.logs), *rate])
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
    """Return, for example, `2 workers × 1 replica  1,500 rows, batch 32  runs/digits`."""
    local_replicas = event.replicas // event.workers
    rows, batch = event.params.get("num_rows"), event.params.get("batch_size")
    return (
        f"{_count(event.workers, 'worker')} × {_count(local_replicas, 'replica')}"
        f"{'' if rows is None else f'  {rows:,} rows, batch {batch}'}  {event.path}{_initial_position(event)}"
    )


def _initial_position(event: events.RunStarted) -> str:
    if not event.initial_epoch and not event.initial_step:
        return ""
    return f"  from epoch {event.initial_epoch + 1}" + (f", step {event.initial_step}" if event.initial_step else "")


def failure_line(event: Event) -> str | None:
    """Return the line for an event that reports a failure or a restart; None for other events."""
    if isinstance(event, events.WorkerFailed):
        worker = "a worker" if event.rank is None else f"the worker of rank {event.rank}"
        return f"{worker} failed{event.node and f' on {event.node}'}: {event.cause}; {event.next}"
    if isinstance(event, events.RunRestarted):
        position = f"epoch {(event.epoch or 0) + 1}, step {event.step}"
        return f"{_count(event.workers, 'worker')} resumed from {position}"
    if isinstance(event, events.WorldResized):
        return f"continuing with {_count(event.workers, 'worker')} instead of {event.before}"
    if isinstance(event, events.CheckpointDamaged):
        return f"skipped a damaged checkpoint: {event.cause}"
    if isinstance(event, events.StorageFailed):
        return f"could not write a checkpoint, retrying in {event.retry_s:g} s: {event.cause}"
    return None


def epoch_line(event: events.EpochEnded, params: dict[str, Any]) -> str:
    """Return, for example, `Epoch 1/5: 47/47 - 1.9s - loss: 0.4321 - … - data wait 3%`, as Keras does."""
    texts = [
        f"Epoch {(event.epoch or 0) + 1}/{params.get('epochs', '?')}: {event.step}/{event.step}",
        f"{event.seconds:.1f}s",
        *metrics(event.logs),
        *([f"{event.rows_per_s:,.0f} rows/s"] if event.rows_per_s else []),
        f"data wait {event.data_wait:.0%}",
    ]
    return " - ".join(texts)


def metrics(logs: Logs) -> list[str]:
    """Return, for example, `["loss: 0.4321", …]`: losses first, then others, and validation metrics last."""
    names = sorted(logs, key=lambda name: (name.startswith("val_"), not name.endswith("loss")))
    return [f"{name}: {_number(logs[name])}" for name in names]


def _number(value: Any) -> str:
    if isinstance(value, np.ndarray):
        numbers = " ".join(map(_number, value.flat[:_MAX_SHOWN]))
        return f"[{numbers}{' …' if value.size > _MAX_SHOWN else ''}]"
    return f"{value:.4e}" if 0 < abs(value) < 1e-3 else f"{value:.4f}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
