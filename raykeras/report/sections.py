"""The sections of a report, as HTML."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Mapping, Sequence
from typing import Any

from raykeras.core import events
from raykeras.core.errors import redacted
from raykeras.core.events import Event
from raykeras.driver.goodput import BUCKETS, duration, summary
from raykeras.driver.runs import StoredRun
from raykeras.driver.screen import count, number_text, ordered
from raykeras.report import figures, series
from raykeras.report.configuration import Configuration, configuration, differences
from raykeras.report.course import MARKS, RunTime, over_time
from raykeras.report.figures import Figure, bucket_color, series_color
from raykeras.report.markup import definitions, escaped, folded, key, note, section, swatch, table

_MAX_ROWS = 200
"""Rows of the table of failures."""


class ReportedRun:
    """A run, and what is computed from its events once.

    Args:
        label: Its name in the report.
        stored: The run, whose events have been read.
        log: Its events.

    Attributes:
        info: What is known about it.
        record: The contents of `run.json`.
        finished: The ends of its epochs, by epoch.
        best: Its best epoch, from 0; None if unknown.
        time: Curves over its time.
        seconds: Seconds of each bucket.
        workers: Step times of its workers.
    """

    def __init__(self, label: str, stored: StoredRun, log: Sequence[Event]) -> None:
        self.label, self.info, self.record = label, stored.info(), stored.record
        self.finished, self.best = stored.state.finished, stored.state.best
        spans = stored.state.timeline.spans
        clock = series.RunClock(spans)
        self.time = RunTime(label, spans, clock, series.progress(log, clock), series.marks(log, clock))
        self.seconds = series.bucket_seconds(spans)
        self.workers = series.worker_times(log)


class Placed:
    """The figures that the page contains so far."""

    def __init__(self) -> None:
        self._figures: list[Figure] = []

    def place(self, figure: Figure, heading: bool = True) -> str:
        """Add a figure, and return its place in the page."""
        self._figures.append(figure)
        title = f"<h3>{escaped(figure.title)}</h3>" if heading else ""
        caption = f"<figcaption>{escaped(figure.note)}</figcaption>" if figure.note else ""
        number, description = len(self._figures) - 1, escaped(figure.description)
        plot = f'<div class="plot" role="img" aria-label="{description}" data-figure="{number}"></div>'
        return f"<figure>{title}{plot}{caption}</figure>"

    def json(self) -> list[dict[str, Any]]:
        """Return the figures as the page's script reads them."""
        return [{"data": figure.data, "layout": figure.layout} for figure in self._figures]


def header(title: str, runs: Sequence[ReportedRun]) -> str:
    """Return the head of the page: what the runs are, and how they ended."""
    facts = [_facts(run) for run in runs]
    if len(runs) == 1:
        where = escaped(summary(runs[0].seconds) or "–")
        items = [*list(facts[0].items())[:-1], ("Goodput", where)]
        body = f'<p class="path">{escaped(redacted(runs[0].info.path))}</p>{definitions("facts", items)}'
    else:
        rows = [
            [f"<strong>{swatch(series_color(index))}{escaped(run.label)}</strong>", *values.values()]
            for index, (run, values) in enumerate(zip(runs, facts, strict=True))
        ]
        body = table(["Run", *facts[0]], rows, ["nowrap"] * (1 + len(facts[0])))
    return f'<header><p class="eyebrow">raykeras report</p><h1>{escaped(title)}</h1>{body}</header>'


def _facts(run: ReportedRun) -> dict[str, str]:
    """Return what the head of the page says about a run, as HTML."""
    info = run.info
    status = info.status
    if status == "running":
        last = datetime.datetime.fromtimestamp(info.updated, datetime.timezone.utc)
        status = f"not ended; last event {last:%Y-%m-%d %H:%M:%S} UTC" if info.updated else "not started"
    best = "–"
    if info.best_epoch is not None:
        value = number_text(info.best_logs[info.monitor])
        best = f"{info.best_epoch + 1} <small>{escaped(info.monitor)} {escaped(value)}</small>"
    kinds = [mark.kind for mark in run.time.marks]
    counts = [("failure", "failure"), ("restart", "restart"), ("resume", "resumption")]
    interruptions = [count(kinds.count(kind), noun) for kind, noun in counts if kind in kinds]
    total = run.time.clock.total
    return {
        "Status": f'<span class="status-{escaped(info.status)}">{escaped(status)}</span>',
        "Epochs": f"{info.epochs} of {'?' if info.total_epochs is None else info.total_epochs}",
        "Best epoch": best,
        "Duration": escaped(duration(info.seconds)),
        "Interruptions": ", ".join(interruptions) or "none",
        "Goodput": f"{run.seconds['steps'] / total:.0%}" if total else "–",
    }


def metrics(runs: Sequence[ReportedRun], placed: Placed) -> str:
    """Return the section of metrics and learning rates by epoch."""
    labels = [run.label for run in runs]
    curves = [series.metric_curves(run.finished) for run in runs]
    names = list(dict.fromkeys(name for of_run in curves for name in of_run))
    if not names:
        return section("Metrics by epoch", note("No epoch has finished."))
    monitored = {run.info.monitor.removeprefix("val_") for run in runs}
    found = []
    for name in names:
        best = [run.best if name in monitored else None for run in runs]
        found.append(figures.metric(name, [of_run.get(name, {}) for of_run in curves], labels, best))
    rates = [series.learning_rate(run.finished) for run in runs]
    if any(curve.x for curve in rates):
        found.append(figures.learning_rate(rates, labels))
    ring = note("A ring marks the best epoch.") if any(run.best is not None for run in runs) else ""
    drawn = "".join(placed.place(figure) for figure in found)
    tables = [
        folded("Values by epoch" if len(runs) == 1 else f"Values by epoch, {run.label}", _epochs(run.finished))
        for run in runs
    ]
    return section("Metrics by epoch", f'{_key_of_runs(runs)}{ring}<div class="grid">{drawn}</div>{"".join(tables)}')


def _key_of_runs(runs: Sequence[ReportedRun]) -> str:
    """Return the key of the colours and lines of several runs."""
    if len(runs) == 1:
        return ""
    lines = ['<span class="line"></span>training', '<span class="line dotted"></span>validation']
    return key([*(swatch(series_color(index)) + escaped(run.label) for index, run in enumerate(runs)), *lines])


def _epochs(finished: Mapping[int, events.EpochEnded]) -> str:
    """Return a table of the metrics of each epoch."""
    names = ordered(dict.fromkeys(name for event in finished.values() for name in series.metrics_of(event)))
    rows = []
    for epoch, event in sorted(finished.items()):
        values = [escaped(number_text(event.logs[name])) if name in event.logs else "–" for name in names]
        rate = "–" if event.learning_rate is None else f"{event.learning_rate:.3g}"
        speed = [f"{event.rows_per_s:,.0f}", f"{event.data_wait:.1%}", f"{event.seconds:,.2f}"]
        rows.append([f"{epoch + 1}", *values, rate, *speed])
    heads = ["Epoch", *names, "learning rate", "rows/s", "data wait", "seconds"]
    return table(heads, rows, ["", *["number"] * (len(heads) - 1)])


def course(runs: Sequence[ReportedRun], placed: Placed) -> str:
    """Return the section of what happened over the time of the runs."""
    times = [run.time for run in runs]
    if not any(time.clock.total for time in times):
        return ""
    figure = over_time(times)
    kinds = {mark.kind for time in times for mark in time.marks}
    symbols = [
        f'<span style="color: var({style.color})" aria-hidden="true">{style.character}</span> {style.name}'
        for kind, style in MARKS.items()
        if kind in kinds
    ]
    return section(figure.title, _key_of_runs(runs) + key(symbols) + placed.place(figure, heading=False))


def use_of_time(runs: Sequence[ReportedRun], placed: Placed) -> str:
    """Return the section of where the time went; its numbers add up to the wall time."""
    totals = [sum(run.seconds.values()) for run in runs]
    if not any(totals):
        return ""
    figure = figures.buckets([run.seconds for run in runs], [run.label for run in runs])
    rows = []
    for name, meaning in BUCKETS.items():
        if any(run.seconds[name] for run in runs):
            cells = [f"{swatch(bucket_color(name))}{escaped(name.replace('_', ' '))}", escaped(meaning)]
            for run, total in zip(runs, totals, strict=True):
                cells += [f"{run.seconds[name]:,.2f}", f"{run.seconds[name] / (total or 1.0):.1%}"]
            rows.append(cells)
    last = ["<strong>total</strong>", "wall time of all calls of fit"]
    for total in totals:
        last += [f"<strong>{total:,.2f}</strong>", "100.0%" if total else "–"]
    heads = ["Time", "Meaning"]
    for run in runs:
        heads += ["Seconds", "Share"] if len(runs) == 1 else [f"{run.label}, seconds", "share"]
    drawn = placed.place(figure, heading=False)
    classes = ["nowrap", "meaning", *["number"] * (2 * len(runs))]
    return section("Where the time went", drawn + table(heads, [*rows, last], classes))


def workers(runs: Sequence[ReportedRun], placed: Placed) -> str:
    """Return the section of the step times of workers."""
    found = [dataclasses.replace(figures.workers(run.workers), title=run.label) for run in runs if run.workers]
    if not found:
        return ""
    drawn = "".join(placed.place(figure, heading=len(runs) > 1) for figure in found)
    return section("Step time by worker", f'<div class="grid">{drawn}</div>' if len(found) > 1 else drawn)


def failures(runs: Sequence[ReportedRun]) -> str:
    """Return the section of failures and restarts."""
    rows = []
    for run in runs:
        for mark in run.time.marks:
            if mark.kind != "checkpoint":
                cells = [escaped(duration(mark.seconds)), MARKS[mark.kind].name, escaped(mark.text)]
                rows.append(cells if len(runs) == 1 else [escaped(run.label), *cells])
    if not rows:
        return ""
    heads = ["After", "What", "Details"] if len(runs) == 1 else ["Run", "After", "What", "Details"]
    more = note(f"{len(rows) - _MAX_ROWS:,} more.") if len(rows) > _MAX_ROWS else ""
    classes = [*["nowrap"] * (len(heads) - 1), "wrap"]
    return section("Failures and restarts", table(heads, rows[:_MAX_ROWS], classes) + more)


def configurations(runs: Sequence[ReportedRun]) -> str:
    """Return the section of the configuration of one run, or of the differences between several."""
    values = [configuration(run.record) for run in runs]
    if not any(values):
        return section("Configuration", note("There is no run.json."))
    if len(runs) == 1:
        return section("Configuration", _all_values(runs[0], values[0]))
    rows = [
        [escaped(found.section), f"<code>{escaped(found.name)}</code>",
         *("–" if value is None else escaped(value) for value in found.values)]
        for found in differences(values)
    ]  # fmt: skip
    heads = ["Section", "Name", *(run.label for run in runs)]
    compared = table(heads, rows, ["nowrap muted", "", *["wrap"] * len(runs)]) if rows else note("There are none.")
    complete = [
        folded(f"All of {run.label}", _all_values(run, of_run)) for run, of_run in zip(runs, values, strict=True)
    ]
    return section("Differences in configuration", compared + "".join(complete))


def _all_values(run: ReportedRun, values: Configuration) -> str:
    calls = run.record.get("calls") or []
    parts = []
    if len(calls) > 1:
        parts.append(note(f"fit was called {len(calls)} times; these are the arguments of the last call."))
    for name, texts in values.items():
        items = definitions("values", [(name, escaped(text)) for name, text in texts.items()])
        parts.append(f'<div class="group"><h3>{escaped(name)}</h3>{items}</div>')
    summary_of_model = (run.record.get("model") or {}).get("summary")
    if isinstance(summary_of_model, str):
        parts.append(folded("Model summary", f'<pre tabindex="0">{escaped(summary_of_model)}</pre>'))
    return "".join(parts)
