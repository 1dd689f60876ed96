"""Runs in storage: opened as results, listed, and followed while they go on."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from raykeras.checkpoint.store import RunFolder
from raykeras.core.errors import OptionError, printable
from raykeras.core.events import Event
from raykeras.core.html import table
from raykeras.core.logs import Logs
from raykeras.driver.goodput import duration
from raykeras.driver.record import RECORD_FILE, parse_record
from raykeras.driver.result import Result
from raykeras.driver.run_state import RunState
from raykeras.driver.screen import number_text
from raykeras.driver.stored_events import StoredEvents


@dataclass(frozen=True)
class RunInfo:
    """What is known about a run from its folder.

    Attributes:
        name: Name of its folder.
        path: Path or fsspec URL of its folder.
        status: "completed", "failed" or "interrupted"; "running" if it has not ended, even if it was killed.
        epochs: Number of finished epochs.
        total_epochs: The epoch at which it stops; None if unknown.
        logs: Metrics of the last epoch.
        monitor: Name of the metric that determines the best epoch.
        best_epoch: The epoch with its best value, from 0; None if no epoch has it.
        best_logs: Metrics of that epoch.
        started: When it began, in seconds since the Unix epoch; 0 if unknown.
        updated: Time of its last event; 0 if unknown.
        seconds: For how long it ran, over all calls of `fit`.
    """

    name: str
    path: str
    status: str
    epochs: int
    total_epochs: int | None
    logs: Logs = field(repr=False)
    monitor: str
    best_epoch: int | None
    best_logs: Logs = field(repr=False)
    started: float
    updated: float
    seconds: float

    def cells(self) -> list[str]:
        """Return the run as a row of a table, under `RunList.HEADER`."""
        name = self.monitor if self.monitor in self.logs else "loss"
        best = self.best_logs.get(self.monitor)
        ago = f" ({_ago(self.updated)})" if self.status == "running" and self.updated else ""
        return [
            printable(self.name),
            printable(self.status) + ago,
            f"{self.epochs}/{'?' if self.total_epochs is None else self.total_epochs}",
            f"{printable(name)} {number_text(self.logs[name])}" if name in self.logs else "",
            "" if best is None else f"{number_text(best)} ({(self.best_epoch or 0) + 1})",
            duration(self.seconds),
        ]


class RunList(list[RunInfo]):
    """A list of runs, which a notebook shows as a table."""

    HEADER = ("run", "status", "epochs", "last", "best (epoch)", "time")

    def _repr_html_(self) -> str:
        return table(self.HEADER, [info.cells() for info in self], is_text=True)


class StoredRun:
    """A run that is read from its folder.

    Args:
        path: Path or fsspec URL of the run's folder.

    Attributes:
        folder: The folder.
        record: The contents of `run.json`.
        state: The state according to the events that were read.

    Raises:
        OptionError: If the folder holds no run.
        CheckpointError: If the storage cannot be read.
    """

    def __init__(self, path: str) -> None:
        storage, _, name = str(path).rstrip("/").rpartition("/")
        self.folder = RunFolder.under(storage or ".", name)
        if not self.folder.is_run():
            raise OptionError(
                f"A run is the folder that `fit` prints at its start; got {path!r}, which holds no run. "
                "`raykeras runs STORAGE` lists the runs of a storage folder."
            )
        self.record = parse_record(self.folder.read(RECORD_FILE).decode(errors="replace"))
        self.state = RunState(_monitor(self.record))
        self._events = StoredEvents(self.folder)

    def update(self) -> list[Event]:
        """Read the events that were written since the last call, and return them."""
        new = self._events.read_new()
        for event in new:
            self.state(event)
        return new

    def info(self) -> RunInfo:
        """Return what is known about the run."""
        state, best = self.state, self.state.best
        finished = sorted(state.finished)
        return RunInfo(
            name=self.folder.path.rsplit("/", 1)[-1],
            path=self.folder.path,
            status=state.status or "running",
            epochs=len(finished),
            total_epochs=state.epochs,
            logs=state.finished[finished[-1]].logs if finished else {},
            monitor=state.monitor,
            best_epoch=best,
            best_logs={} if best is None else state.finished[best].logs,
            started=state.begun,
            updated=state.updated,
            seconds=sum(state.timeline.seconds().values()),
        )

    def follow(self, show: Callable[[Event], None], pause: Callable[[], None]) -> None:
        """Show all events of the run until it ends.

        Args:
            show: Shows an event.
            pause: Called before the log is read again.
        """
        while True:
            for event in self.update():
                show(event)
            if self.state.status:
                return
            pause()


def open_run(path: str) -> Result:
    """Open a run from its folder, on any machine that can read it.

    Args:
        path: Path or fsspec URL of the run's folder, which `fit` prints at its start.

    Returns:
        The result so far: the history of the epochs that are finished, the checkpoints, and where the time went.

    Raises:
        OptionError: If the folder holds no run.
        CheckpointError: If the storage cannot be read.
    """
    run = StoredRun(path)
    run.update()
    return Result(run.state.history(), sorted(run.state.finished), run.state.params, run.folder.path)


def runs(storage: str = "runs") -> RunList:
    """List the runs in a storage folder.

    Args:
        storage: Folder or fsspec URL, as in `Run.storage`.

    Returns:
        A list of what is known about each run, oldest first. A notebook shows it as a table.

    Raises:
        CheckpointError: If the storage cannot be read.
    """
    root = RunFolder(RunFolder.under(str(storage), "run").path.removesuffix("/run"))
    found = RunList()
    for path in root.folders():
        if RunFolder(path).is_run():
            run = StoredRun(path)
            run.update()
            found.append(run.info())
    found.sort(key=lambda info: info.started)
    return found


def _monitor(record: dict[str, Any]) -> str:
    """Return the metric that the last call of `fit` monitored."""
    value: Any = (record.get("calls") or [{}])[-1]
    for name in ("arguments", "run", "monitor"):
        value = value.get(name) if isinstance(value, dict) else None
    return value if isinstance(value, str) else "val_loss"


def _ago(at: float) -> str:
    """Return, for example, "5 min 3 s ago"; clocks may differ."""
    return f"{duration(max(0.0, round(time.time() - at)))} ago"
