"""Where the time of a run went, computed from its events.

The time from a call of `fit` to its end is cut into spans without gaps, so that the buckets add up to the wall time.
Time between a call that ended and the call that resumes it does not count.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

from raykeras.core import events
from raykeras.core.events import Event

BUCKETS = {
    "start": "reading metadata, starting Ray and the workers",
    "build": "building, restoring and compiling the model, up to the end of the first step",
    "steps": "training steps that count",
    "data_wait": "training steps that waited for data",
    "validation": "validation",
    "checkpoints": "training that waited for a checkpoint",
    "lost": "work after the last checkpoint before a failure, which was repeated",
    "restart": "from a failure to the end of the next step",
    "other": "callbacks, the ends of epochs, and the end of the run",
}
"""What each bucket holds."""

_OF_TRAINING = ("steps", "data_wait", "validation", "checkpoints", "other")

_MERGED_S = 1.0  # batches within this time share a span, so that the spans of a long run stay few

_Position = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Span:
    """A part of a run's time.

    Attributes:
        start: Seconds since the Unix epoch.
        end: The same.
        bucket: A key of `BUCKETS`.
        first: Position at its start: number of finished epochs, and of steps in the next one. None before training.
        last: Position at its end.
    """

    start: float
    end: float
    bucket: str
    first: _Position | None = None
    last: _Position | None = None

    @property
    def seconds(self) -> float:
        return self.end - self.start


class Timeline:
    """An event handler that cuts the time of a run into spans.

    Attributes:
        spans: The spans so far, in order; those of one call of `fit` have no gaps.
    """

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self._time: float | None = None  # up to which there are spans; None outside of a call
        self._bucket = "start"
        self._position: _Position | None = None
        self._batches: events.BatchEnded | None = None  # since the last span
        self._has_trained = False  # in this call
        self._is_restarting = False

    def __call__(self, event: Event) -> None:
        if isinstance(event, events.BatchEnded):
            self._batches = event if self._batches is None else events.merge(self._batches, event)
            if self._time is not None and event.time - self._time < _MERGED_S:
                return
            event = self._batches
        elif self._batches is not None:
            self._handle(self._batches)
        self._batches = None
        self._handle(event)

    def _handle(self, event: Event) -> None:
        if isinstance(event, events.PhaseStarted):
            self._begin_phase(event)
        elif self._time is None:  # the log of a version that had no phases
            self._time = event.time
        if isinstance(event, events.RunStarted):
            self._drop_after((event.initial_epoch, event.initial_step))
        elif isinstance(event, events.RunRestarted):
            self._drop_after((event.epoch or 0, event.step or 0))
        elif isinstance(event, events.EpochStarted):
            self._add(event.time)
            self._position = (event.epoch or 0, 0)
            self._bucket = "steps" if self._is_training else self._bucket
        elif isinstance(event, events.BatchEnded):
            self._add(event.time, (event.epoch or 0, event.step or 0))
            if self._bucket == "steps":
                self._relabel(event.time - event.wait_s, event.time, "data_wait")
        elif isinstance(event, events.ValidationEnded):
            self._add(event.time)
            self._relabel(event.time - event.seconds, event.time, "validation")
            self._bucket = "other"
        elif isinstance(event, events.EpochEnded):
            self._add(event.time)
            self._position, self._bucket = ((event.epoch or 0) + 1, 0), "other"
        elif isinstance(event, events.CheckpointSaved):
            self._add(min(event.resumed, event.time))
            self._relabel(event.resumed - event.seconds, event.resumed, "checkpoints")
        elif isinstance(event, events.WorkerFailed):
            self._bucket = "lost" if self._is_training else self._bucket
            self._add(event.time)
            self._bucket, self._is_restarting = "restart", True
        elif isinstance(event, events.RunEnded):
            self._bucket = "other" if self._bucket == "steps" else self._bucket
            self._add(event.time)
            self._time = None

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each bucket."""
        totals = dict.fromkeys(BUCKETS, 0.0)
        for span in self.spans:
            totals[span.bucket] += span.seconds
        return totals

    @property
    def _is_training(self) -> bool:
        return self._has_trained and not self._is_restarting

    def _begin_phase(self, event: events.PhaseStarted) -> None:
        if event.phase == "metadata" or self._time is None:  # a call of `fit` begins, maybe after one was killed
            self._time, self._bucket = event.time, "start"
            self._has_trained = self._is_restarting = False
        self._add(event.time)
        if event.phase == "train":
            self._bucket, self._has_trained, self._is_restarting = "steps", True, False
        elif self._has_trained or self._is_restarting:
            self._bucket, self._is_restarting = "restart", True
        else:
            self._bucket = "build" if event.phase in ("build", "compile") else "start"

    def _add(self, time: float, position: _Position | None = None) -> None:
        """Add a span from the end of the last one; clocks of several machines may differ."""
        assert self._time is not None
        last = position or self._position
        if time > self._time:
            self.spans.append(Span(self._time, time, self._bucket, self._position, last))
            self._time = time
        self._position = last

    def _relabel(self, start: float, end: float, bucket: str) -> None:
        """Move a part of the time of training to another bucket."""
        for index in range(len(self.spans) - 1, -1, -1):
            span = self.spans[index]
            if span.end <= start:
                return
            if span.start < end and span.bucket in _OF_TRAINING:
                self.spans[index : index + 1] = _cut(span, start, end, bucket)

    def _drop_after(self, position: _Position) -> None:
        """Count the work after a position as lost, because it is done again."""
        kept = []
        for span in self.spans:
            if span.first is None or span.last is None or span.bucket not in _OF_TRAINING or span.last <= position:
                kept.append(span)
            elif span.first >= position or span.first[0] != span.last[0]:
                kept.append(dataclasses.replace(span, bucket="lost"))
            else:
                done = (position[1] - span.first[1]) / (span.last[1] - span.first[1])
                time = span.start + done * span.seconds
                kept.append(dataclasses.replace(span, end=time, last=position))
                kept.append(dataclasses.replace(span, start=time, first=position, bucket="lost"))
        self.spans = kept
        self._position = position


def _cut(span: Span, start: float, end: float, bucket: str) -> list[Span]:
    """Return the parts of a span before, within and after an interval; the one within in another bucket."""
    start, end = max(start, span.start), min(end, span.end)
    parts = [
        dataclasses.replace(span, end=start),
        dataclasses.replace(span, start=start, end=end, bucket=bucket),
        dataclasses.replace(span, start=end),
    ]
    return [part for part in parts if part.seconds > 0]


def spans(log: Iterable[Event]) -> list[Span]:
    """Return the spans of a run's time, from its events."""
    timeline = Timeline()
    for event in log:
        timeline(event)
    return timeline.spans


def summary(seconds: dict[str, float]) -> str:
    """Return, for example, `83 % of 12 min 5 s in training steps (build 9 %, start 5 %, validation 3 %)`."""
    total = sum(seconds.values())
    if total <= 0:
        return ""
    shares = sorted(((value / total, name) for name, value in seconds.items() if name != "steps"), reverse=True)
    rest = ", ".join(f"{name.replace('_', ' ')} {share:.0%}" for share, name in shares if share >= 0.01)
    return f"{seconds['steps'] / total:.0%} of {duration(total)} in training steps" + (f" ({rest})" if rest else "")


def duration(seconds: float) -> str:
    """Return, for example, "9.5 s", "12 min 5 s" or "3 h 20 min"."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
