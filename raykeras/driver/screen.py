"""The state and the events of a run as lines of text."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from raykeras.core import events
from raykeras.core.events import Event
from raykeras.core.logs import Logs
from raykeras.driver.goodput import duration, summary
from raykeras.driver.run_state import RunState

INDENT = " " * 11  # of the lines below a bar or an epoch

_BAR_WIDTH = 24

_SILENT_S = 60.0  # without an event, which is then shown: the run hangs, or was killed

_MAX_SHOWN = 4  # values of a metric that is an array


def wrapped(texts: Iterable[str], width: int, separator: str = " - ", indent: str = INDENT) -> list[str]:
    """Return texts on as few lines as possible; lines after the first are indented."""
    lines: list[str] = []
    for text in texts:
        if lines and len(lines[-1]) + len(separator) + len(text) <= width:
            lines[-1] += separator + text
        else:
            lines.append((indent if lines else "") + text)
    return lines


def header(event: events.RunStarted) -> str:
    """Return, for example, `2 workers × 1 replica  1,500 rows, batch 32  runs/digits`."""
    local_replicas = event.replicas // max(1, event.workers)
    rows, batch = event.params.get("num_rows"), event.params.get("batch_size")
    return (
        f"{count(event.workers, 'worker')} × {count(local_replicas, 'replica')}"
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
        return f"{count(event.workers, 'worker')} resumed from {position}"
    if isinstance(event, events.WorldResized):
        return f"continuing with {count(event.workers, 'worker')} instead of {event.before}"
    if isinstance(event, events.CheckpointDamaged):
        return f"skipped a damaged checkpoint: {event.cause}"
    if isinstance(event, events.StorageFailed):
        return f"could not write a checkpoint, retrying in {event.retry_s:g} s: {event.cause}"
    return None


def epoch_texts(event: events.EpochEnded, epochs: int | None) -> list[str]:
    """Return the parts of `Epoch 1/5: 47/47 - 1.9s - loss: 0.4321 - … - data wait 3%`, as Keras shows an epoch."""
    return [
        f"Epoch {(event.epoch or 0) + 1}/{'?' if epochs is None else epochs}: {event.step}/{event.step}",
        f"{event.seconds:.1f}s",
        *metric_texts(event.logs),
        *([f"{event.rows_per_s:,.0f} rows/s"] if event.rows_per_s else []),
        f"data wait {event.data_wait:.0%}",
    ]


def live_lines(state: RunState, width: int) -> list[str]:
    """Return the lines that show what a run does now, at most `width` characters wide.

    The first line, with the bar and the time left in the epoch, is never wrapped; the metrics and the state of the
    whole run are below it.
    """
    if state.status:
        return []
    if state.started is None or state.phase != "train":
        return [f"{events.PHASES.get(state.phase, 'starting')} …"[:width]]
    texts = [*wrapped(metric_texts(state.logs), width - len(INDENT), indent="")]
    texts += wrapped(_status_texts(state), width - len(INDENT), indent="")
    return [bar_line(state, width), *(f"{INDENT}{text}"[:width] for text in texts)]


def bar_line(state: RunState, width: int) -> str:
    """Return, for example, `Epoch 2/5: ━━━━━━━━━━━━──────────── 23/47 - 41ms/step - 1.0 s left`."""
    name = f"Epoch {state.epoch + 1}/{state.epochs}:"
    texts = [f"{state.step}/{state.steps}" if state.steps else count(state.step, "step")]
    if state.step_s is not None:
        texts.append(f"{_milliseconds(state.step_s)}/step")
    if state.is_validating:
        texts.append("validating")
    elif state.epoch_left_s:
        texts.append(f"{duration(state.epoch_left_s)} left")
    text = " - ".join(texts)
    bar_width = min(_BAR_WIDTH, width - len(name) - len(text) - 2)
    if not state.steps or bar_width < 4:
        return f"{name} {text}"[:width]
    num_done = round(bar_width * min(1.0, state.step / state.steps))
    return f"{name} {'━' * num_done}{'─' * (bar_width - num_done)} {text}"


def _status_texts(state: RunState) -> list[str]:
    """Return the state of the whole run: the time left, the throughput, the best epoch, the last checkpoint, …"""
    texts = []
    if state.run_left_s is not None and (state.epochs or 0) > 1:
        texts.append(f"run: {duration(state.run_left_s)} left")
    if state.rows_per_s:
        texts.append(f"{state.rows_per_s:,.0f} rows/s")
    texts.append(f"data wait {state.data_wait:.0%}")
    if state.finished:
        newest = state.finished[max(state.finished)]
        if newest.learning_rate is not None:
            texts.append(f"learning rate {newest.learning_rate:.3g}")
    if state.best is not None:
        texts.append(f"best epoch {state.best + 1}")
    if state.checkpoint is not None:
        age_s = max(0.0, time.time() - state.checkpoint.time)
        texts.append(f"checkpoint {f'{age_s:.0f} s' if age_s < 59.5 else duration(age_s)} ago")
    if state.restarts:
        texts.append(count(state.restarts, "restart"))
    silent_s = time.time() - state.updated
    if silent_s >= _SILENT_S:
        texts.append(f"no event for {duration(silent_s)}")
    return texts


def last_lines(state: RunState) -> list[str]:
    """Return the lines at the end of a run: what came of it, and where the time went."""
    if state.started is None:
        return []
    path = state.started.path
    if state.status == "completed":
        best = "" if state.best is None or len(state.finished) < 2 else f" (best epoch: {state.best + 1})"
        lines = [f"completed; checkpoints in {path}/checkpoints{best}"]
    else:
        lines = [f"{state.status}; to resume: --resume {path}, or the same Run(storage=…, name=…)"]
    spent = summary(state.timeline.seconds())
    return [*lines, spent] if spent else lines


def ordered(names: Iterable[str]) -> list[str]:
    """Return names of metrics: losses first, then others, and validation metrics last."""
    return sorted(names, key=lambda name: (name.startswith("val_"), not name.endswith("loss")))


def metric_texts(logs: Logs, names: Sequence[str] | None = None) -> list[str]:
    """Return, for example, `["loss: 0.4321", …]`, in the order of `ordered` unless names are given."""
    return [f"{name}: {number_text(logs[name])}" for name in (ordered(logs) if names is None else names)]


def number_text(value: Any) -> str:
    """Return a metric's value with four digits; of an array the first values."""
    if isinstance(value, np.ndarray):
        numbers = " ".join(map(number_text, value.flat[:_MAX_SHOWN]))
        return f"[{numbers}{' …' if value.size > _MAX_SHOWN else ''}]"
    return f"{value:.4e}" if 0 < abs(value) < 1e-3 else f"{value:.4f}"


def count(number: int, noun: str) -> str:
    """Return, for example, "1 step" or "2,000 steps"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.{0 if seconds >= 0.01 else 1}f}ms" if seconds < 1 else f"{seconds:.1f}s"
