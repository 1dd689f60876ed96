"""The figures of a report by epoch, bucket and worker, as Plotly's JSON.

A colour that begins with `--` is a CSS variable of the page, which differs between its light and dark form.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raykeras.driver.goodput import BUCKETS, duration
from raykeras.driver.screen import number_text
from raykeras.report.series import Curve, WorkerTime

MAX_WORKERS = 32
"""The slowest workers that a figure shows."""

_NUM_COLORS = 8
_MAX_LABEL = 48  # characters
_LOG_RANGE = 50.0  # of positive values, from which an axis is logarithmic


@dataclass(frozen=True)
class Figure:
    """A figure of the page.

    Attributes:
        title: Its heading.
        description: What it shows, in a sentence, for screen readers.
        note: What to know to read it; "" if nothing.
        data, layout: As Plotly takes them.
    """

    title: str
    description: str
    note: str
    data: list[dict[str, Any]]
    layout: dict[str, Any]


def series_color(index: int) -> str:
    """Return the colour of a run, or of a curve if there is one run."""
    return f"--series-{index % _NUM_COLORS + 1}"


def bucket_color(name: str) -> str:
    """Return the colour of a bucket of time."""
    return f"--bucket-{name.replace('_', '-')}"


def plotly_text(text: str, max_length: int = _MAX_LABEL) -> str:
    """Return text that Plotly shows as it is, although it understands some HTML."""
    line = " ".join(text.split())
    return html.escape(line if len(line) <= max_length else f"{line[: max_length - 1]}…", quote=False)


def metric(
    name: str, curves: Sequence[Mapping[str, Curve]], labels: Sequence[str], best: Sequence[int | None]
) -> Figure:
    """Return the figure of a metric by epoch.

    Args:
        name: Name of the metric.
        curves: The curves of each run, as `metric_curves` returns them.
        labels: Name of each run.
        best: Best epoch of each run, from 0.
    """
    data = []
    is_alone = len(labels) == 1
    for index, (run, label) in enumerate(zip(curves, labels, strict=True)):
        for part, dash in (("training", "solid"), ("validation", "solid" if is_alone else "dot")):
            if part not in run:
                continue
            color = series_color(int(part == "validation") if is_alone else index)
            title = part if is_alone else f"{plotly_text(label)}, {part}"
            data.append(
                {**line(run[part], title, color, dash), "mode": _mode(run[part]), **hover("epoch %{x}<br>%{y:.5g}")}
            )
            best_epoch = best[index]
            if best_epoch is not None and part == ("validation" if "validation" in run else "training"):
                data.append(_ring(run[part], best_epoch + 1, color))
    described = _described([curve for run in curves for curve in run.values()])
    layout = {
        "xaxis": {"title": {"text": "epoch"}, **_epoch_ticks(curves)},
        "yaxis": value_axis([y for run in curves for curve in run.values() for y in curve.values]),
        "showlegend": is_alone,
    }
    return Figure(name, f"{name} by epoch; {described}", "", data, layout)


def learning_rate(curves: Sequence[Curve], labels: Sequence[str]) -> Figure:
    """Return the figure of the learning rate by epoch."""
    data = [
        {**line(curve, plotly_text(label), series_color(index)), "mode": _mode(curve),
         **hover("epoch %{x}<br>%{y:.3g}")}
        for index, (curve, label) in enumerate(zip(curves, labels, strict=True))
        if curve.x
    ]  # fmt: skip
    layout = {
        "xaxis": {"title": {"text": "epoch"}, **_epoch_ticks([{"": curve} for curve in curves])},
        "yaxis": {**value_axis([y for curve in curves for y in curve.values]), "rangemode": "tozero"},
        "showlegend": False,
    }
    return Figure("learning rate", f"Learning rate by epoch; {_described(curves)}", "", data, layout)


def buckets(seconds: Sequence[Mapping[str, float]], labels: Sequence[str]) -> Figure:
    """Return the bar of where the time of each run went."""
    data = []
    for name in BUCKETS:
        shares = [times[name] / max(sum(times.values()), 1e-9) for times in seconds]
        if any(shares):
            texts = [
                f"{name.replace('_', ' ')}: {duration(times[name])} ({share:.1%})"
                for times, share in zip(seconds, shares, strict=True)
            ]
            data.append(
                {"type": "bar", "orientation": "h", "name": name.replace("_", " "), "x": shares,
                 "y": list(range(len(labels))), "text": texts, "textposition": "none", "showlegend": False,
                 "marker": {"color": bucket_color(name), "line": {"width": 0}},
                 "hovertemplate": "%{text}<extra></extra>"}
            )  # fmt: skip
    names = [] if len(labels) == 1 else labels
    layout = {
        "barmode": "stack",
        "bargap": 0.5 if names else 0.2,
        "height": 44 * len(labels) if names else 44,
        "margin": {"t": 4, "b": 4, "l": 0, "r": 0},
        "xaxis": {"range": [0, 1], "visible": False, "fixedrange": True},
        "yaxis": {"autorange": "reversed", "visible": False, "fixedrange": True},
        "annotations": [
            {"text": plotly_text(label), "x": 0, "y": index - 0.25, "showarrow": False, "xanchor": "left",
             "yanchor": "bottom", "font": {"size": 12, "color": series_color(index)}}
            for index, label in enumerate(names)
        ],
    }  # fmt: skip
    steps = ", ".join(f"{times['steps'] / max(sum(times.values()), 1e-9):.0%}" for times in seconds)
    return Figure("", f"Share of the time by use; training steps: {steps}.", "", data, layout)


def workers(times: Sequence[WorkerTime]) -> Figure:
    """Return the bars of the step time of each worker, the slowest first if there are many."""
    shown = list(times)
    if len(shown) > MAX_WORKERS:
        shown = sorted(shown, key=lambda time: -time.wait_s)[:MAX_WORKERS]
    ranks = [f"rank {time.rank}" for time in shown]
    parts = [
        ("waiting for data", [time.wait_s * 1000 for time in shown], bucket_color("data_wait")),
        ("computing", [(time.step_s - time.wait_s) * 1000 for time in shown], bucket_color("steps")),
    ]
    data = [
        {"type": "bar", "orientation": "h", "name": name, "y": ranks, "x": values,
         "marker": {"color": color, "line": {"width": 0}},
         "hovertemplate": "%{x:.3g} ms<extra>%{y}, %{fullData.name}</extra>"}
        for name, values, color in parts
    ]  # fmt: skip
    layout = {
        "barmode": "stack",
        "bargap": 0.3,
        "height": 26 * len(shown) + 90,
        "xaxis": {"title": {"text": "ms per step"}, "rangemode": "tozero"},
        "yaxis": {"autorange": "reversed", "type": "category", "showgrid": False},
    }
    slowest = max(times, key=lambda time: time.wait_s)
    return Figure(
        "Step time by worker",
        f"Mean step time of {len(times)} workers; rank {slowest.rank} waited longest for data, "
        f"{slowest.wait_s * 1000:.3g} ms per step.",
        "All workers finish a step together, so “computing” includes waiting for the slowest. A worker with a longer "
        "data wait than the others delays all of them."
        + (
            f" The {MAX_WORKERS} of {len(times)} workers with the longest data wait."
            if len(times) > MAX_WORKERS
            else ""
        ),
        data,
        layout,
    )


def line(curve: Curve, name: str, color: str, dash: str = "solid") -> dict[str, Any]:
    """Return a curve as Plotly takes it."""
    return {
        "type": "scatter", "mode": "lines", "name": name, "x": curve.x, "y": curve.y,
        "line": {"color": color, "width": 2, "dash": dash}, "marker": {"color": color, "size": 5},
    }  # fmt: skip


def _mode(curve: Curve) -> str:
    return "lines+markers" if len(curve.x) <= 30 else "lines"


def hover(text: str) -> dict[str, str]:
    """Return what is shown at a point: a template of Plotly, and the name of its curve."""
    return {"hovertemplate": f"{text}<extra>%{{fullData.name}}</extra>"}


def _ring(curve: Curve, epoch: int, color: str) -> dict[str, Any]:
    """Return a ring around the best epoch of a curve."""
    at = [y for x, y in zip(curve.x, curve.y, strict=True) if x == epoch]
    return {
        "type": "scatter", "mode": "markers", "x": [epoch] * len(at), "y": at, "showlegend": False, "hoverinfo": "skip",
        "marker": {"symbol": "circle-open", "size": 13, "color": color, "line": {"width": 2, "color": color}},
    }  # fmt: skip


def value_axis(values: Sequence[float]) -> dict[str, Any]:
    """Return an axis, logarithmic if the values are positive and of several orders of magnitude."""
    is_log = bool(values) and min(values) > 0 and max(values) / min(values) > _LOG_RANGE
    return {"type": "log", "dtick": 1} if is_log else {"type": "linear", "nticks": 6}


def _epoch_ticks(curves: Sequence[Mapping[str, Curve]]) -> dict[str, Any]:
    last = max((curve.x[-1] for run in curves for curve in run.values() if curve.x), default=1)
    return {"tickmode": "linear", "tick0": 1, "dtick": 1} if last <= 10 else {"tickformat": "d", "nticks": 8}


def _described(curves: Sequence[Curve]) -> str:
    values = [curve.values for curve in curves if curve.values]
    if not values:
        return "no values."
    return "; ".join(f"from {number_text(part[0])} to {number_text(part[-1])}" for part in values[:4]) + "."
