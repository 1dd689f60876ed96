"""What the figures of a report show, computed from the events of a run."""

from __future__ import annotations

import bisect
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from raykeras.core import events
from raykeras.core.events import Event
from raykeras.core.logs import Logs
from raykeras.driver.goodput import BUCKETS, Span

NUM_POINTS = 300
"""Points of a curve over time, and parts of a timeline, at most about this many."""


@dataclass(frozen=True)
class Curve:
    """Values by epoch, from 1, or by seconds of the run.

    Attributes:
        x: Where the values are, ascending.
        y: The values; None where one is not finite, and at breaks of the line.
    """

    x: list[float] = field(default_factory=list)
    y: list[float | None] = field(default_factory=list)

    def add(self, x: float, y: Any) -> None:
        """Add a value; of an array, its mean."""
        value = float(np.mean(y)) if y is not None and np.size(y) else None
        self.x.append(x)
        self.y.append(value if value is not None and math.isfinite(value) else None)

    @property
    def values(self) -> list[float]:
        """The finite values."""
        return [y for y in self.y if y is not None]


@dataclass(frozen=True)
class Mark:
    """Something that happened at one moment.

    Attributes:
        seconds: When it happened, in seconds of the run.
        kind: "checkpoint", "failure", "restart", "resume", "resize" or "warning".
        text: What happened, in a sentence.
    """

    seconds: float
    kind: str
    text: str


@dataclass(frozen=True)
class WorkerTime:
    """How long the steps of a worker took.

    Attributes:
        rank: Rank of the worker.
        num_steps: Number of steps that were measured.
        step_s: Mean seconds of a step, data wait included.
        wait_s: Mean seconds for which a step waited for data.
    """

    rank: int
    num_steps: int
    step_s: float
    wait_s: float


class RunClock:
    """Converts times of events to seconds of the run, without the time between two calls of `fit`.

    Args:
        spans: The spans of the run, in order.
    """

    def __init__(self, spans: Sequence[Span]) -> None:
        self._starts = [span.start for span in spans]
        self._spans = spans
        self._offsets = [0.0]
        for span in spans:
            self._offsets.append(self._offsets[-1] + span.seconds)

    @property
    def total(self) -> float:
        """Seconds of all spans."""
        return self._offsets[-1]

    def seconds(self, time: float) -> float:
        """Return the seconds of the run up to a time; within a gap, those up to the gap."""
        index = bisect.bisect_right(self._starts, time) - 1
        if index < 0:
            return 0.0
        span = self._spans[index]
        return self._offsets[index] + min(time - span.start, span.seconds)


def metric_curves(finished: Mapping[int, events.EpochEnded]) -> dict[str, dict[str, Curve]]:
    """Return the curves of each metric by epoch.

    Args:
        finished: The ends of the epochs, by epoch.

    Returns:
        For each metric, losses first, the curves "training" and "validation", as far as there are values. The learning
        rate, which some callbacks add to the logs, is no metric.
    """
    curves: dict[str, dict[str, Curve]] = {}
    for epoch, event in sorted(finished.items()):
        for name, value in metrics_of(event).items():
            metric = name.removeprefix("val_")
            part = "training" if metric == name else "validation"
            curves.setdefault(metric, {}).setdefault(part, Curve()).add(epoch + 1, value)
    return dict(sorted(curves.items(), key=lambda item: not item[0].endswith("loss")))


def metrics_of(event: events.EpochEnded) -> Logs:
    """Return the metrics of an epoch, without the learning rate that some callbacks add, if it is known anyway."""
    added = ("learning_rate", "lr") if event.learning_rate is not None else ()
    return {name: value for name, value in event.logs.items() if name not in added}


def learning_rate(finished: Mapping[int, events.EpochEnded]) -> Curve:
    """Return the learning rate by epoch."""
    curve = Curve()
    for epoch, event in sorted(finished.items()):
        if event.learning_rate is not None:
            curve.add(epoch + 1, event.learning_rate)
    return curve


@dataclass(frozen=True)
class Progress:
    """Curves over the time of a run.

    Attributes:
        loss: Mean training loss of the epoch so far.
        val_loss: Validation loss.
        rows_per_s: Rows of the global batches per second; steps per second if the batch size is unknown.
        data_wait: Fraction of the time, 0 to 1, in which steps waited for data.
        counts_rows: Whether `rows_per_s` counts rows.
    """

    loss: Curve
    val_loss: Curve
    rows_per_s: Curve
    data_wait: Curve
    counts_rows: bool


def progress(log: Iterable[Event], clock: RunClock) -> Progress:
    """Return the curves over the time of a run, with about `NUM_POINTS` points and breaks where training stopped."""
    loss, val_loss, rows_per_s, data_wait = Curve(), Curve(), Curve(), Curve()
    interval_s = clock.total / NUM_POINTS
    batch_size: float | None = None
    begin, step, waited = 0.0, 0, 0.0  # of the next point
    for event in log:
        now = clock.seconds(event.time)
        match event:
            case events.RunStarted() | events.RunRestarted():
                if isinstance(event, events.RunStarted):
                    size = event.params.get("batch_size")
                    batch_size = float(size) if isinstance(size, int | float) else None
                if loss.x:
                    for curve in (loss, rows_per_s, data_wait):
                        curve.add(now, None)
            case events.EpochStarted() | events.PhaseStarted(phase="train"):  # the first step of a worker compiles
                begin, step, waited = now, event.step or 0, 0.0
            case events.BatchEnded():
                waited += event.wait_s
                num_steps, elapsed = (event.step or 0) - step, now - begin
                if num_steps > 0 and elapsed > 0 and elapsed >= interval_s:
                    loss.add(now, event.logs.get("loss"))
                    rows_per_s.add(now, num_steps * (batch_size or 1.0) / elapsed)
                    data_wait.add(now, min(1.0, waited / elapsed))
                    begin, step, waited = now, event.step or 0, 0.0
            case events.ValidationEnded():
                val_loss.add(now, event.logs.get("loss"))
    return Progress(loss, val_loss, rows_per_s, data_wait, counts_rows=batch_size is not None)


def marks(log: Iterable[Event], clock: RunClock) -> list[Mark]:
    """Return the checkpoints, failures and restarts of a run, in order."""
    found = []
    has_started = False
    for event in log:
        described = _described(event, has_started)
        if described is not None:
            found.append(Mark(clock.seconds(event.time), *described))
        has_started |= isinstance(event, events.RunStarted)
    return found


def _described(event: Event, has_started: bool) -> tuple[str, str] | None:
    """Return the kind and the text of the mark for an event; None if it has none."""
    match event:
        case events.CheckpointSaved():
            return "checkpoint", f"Checkpoint saved {_position(event)}."
        case events.WorkerFailed():
            of_rank = "" if event.rank is None else f" of rank {event.rank}"
            on_node = f" on {event.node}" if event.node else ""
            return "failure", f"Worker{of_rank}{on_node} failed: {event.cause}"
        case events.RunRestarted():
            return "restart", f"Restarted with {_workers(event.workers)} {_position(event)}."
        case events.RunStarted() if has_started:
            position = _position_text(event.initial_epoch, event.initial_step)
            return "resume", f"Resumed by another call of fit, with {_workers(event.workers)} {position}."
        case events.WorldResized():
            return "resize", f"{event.before} → {_workers(event.workers)}."
        case events.CheckpointDamaged():
            return "warning", f"Checkpoint {event.path} is damaged: {event.cause}"
        case events.StorageFailed():
            return "warning", f"A checkpoint could not be written; retried after {event.retry_s:g} s: {event.cause}"
        case events.RunEnded(status="failed" | "interrupted"):
            return "failure" if event.status == "failed" else "warning", f"The call of fit ended: {event.status}."
    return None


def _workers(number: int) -> str:
    return f"{number} worker{'' if number == 1 else 's'}"


def _position(event: Event) -> str:
    return _position_text(event.epoch or 0, event.step or 0)


def _position_text(epoch: int, step: int) -> str:
    return (
        f"in epoch {epoch + 1} after step {step:,}" if step else f"after epoch {epoch}" if epoch else "from the start"
    )


def worker_times(log: Iterable[Event]) -> list[WorkerTime]:
    """Return the mean step times of each worker, by rank; empty if the log has none."""
    sums: dict[int, np.ndarray] = defaultdict(lambda: np.zeros(3))  # steps, seconds, seconds waited
    for event in log:
        if isinstance(event, events.WorkerStepsEnded) and event.rank is not None and event.num_steps > 0:
            sums[event.rank] += (event.num_steps, event.seconds, event.wait_s)
    return [
        WorkerTime(rank, int(steps), float(seconds / steps), float(waited / steps))
        for rank, (steps, seconds, waited) in sorted(sums.items())
    ]


def bucket_seconds(spans: Iterable[Span]) -> dict[str, float]:
    """Return the seconds of each bucket."""
    totals = dict.fromkeys(BUCKETS, 0.0)
    for span in spans:
        totals[span.bucket] += span.seconds
    return totals


def timeline(spans: Sequence[Span], clock: RunClock, num_cells: int = NUM_POINTS) -> dict[str, np.ndarray]:
    """Cut the time of a run into equal cells, and return the share of each bucket in them.

    Args:
        spans: The spans of the run, in order.
        clock: Made of these spans.
        num_cells: Number of cells.

    Returns:
        For each bucket with any time, an array of shape `(num_cells,)`; for each cell they add up to 1.
    """
    shares = {name: np.zeros(num_cells) for name in BUCKETS}
    edges = np.linspace(0.0, clock.total, num_cells + 1)
    width = clock.total / num_cells
    end = 0.0
    for span in spans:
        start, end = end, end + span.seconds
        first, last = np.searchsorted(edges, [start, end], side="right") - 1
        cells = np.arange(first, min(last, num_cells - 1) + 1)
        overlap = np.minimum(edges[cells + 1], end) - np.maximum(edges[cells], start)
        shares[span.bucket][cells] += np.maximum(overlap, 0.0) / width
    return {name: cells for name, cells in shares.items() if cells.any()}
