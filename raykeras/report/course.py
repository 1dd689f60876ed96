"""The figure of a report over the time of runs: loss, throughput, data wait, and what happened when."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from raykeras.driver.goodput import Span
from raykeras.report.figures import Figure, bucket_color, hover, line, plotly_text, series_color, value_axis
from raykeras.report.series import NUM_POINTS, Mark, Progress, RunClock, timeline

_MAX_HOVER = 160  # characters


@dataclass(frozen=True)
class MarkStyle:
    """How a kind of mark is drawn.

    Attributes:
        name: Its name in keys.
        symbol: Its symbol in Plotly.
        character: The same as a character.
        color: Its colour.
    """

    name: str
    symbol: str
    character: str
    color: str


MARKS = {
    "checkpoint": MarkStyle("checkpoint", "triangle-up", "▲", "--mark-checkpoint"),
    "failure": MarkStyle("failure", "x", "✕", "--mark-failure"),
    "restart": MarkStyle("restart", "circle", "●", "--mark-restart"),
    "resume": MarkStyle("resumed", "star", "★", "--mark-restart"),
    "resize": MarkStyle("resized", "diamond", "◆", "--mark-restart"),
    "warning": MarkStyle("warning", "square", "■", "--mark-failure"),
}
"""The kinds of `series.Mark`."""


@dataclass(frozen=True)
class RunTime:
    """The time of a run.

    Attributes:
        label: Name of the run.
        spans: The spans of its time.
        clock: Made of these spans.
        progress: Curves over its time.
        marks: What happened.
    """

    label: str
    spans: Sequence[Span]
    clock: RunClock
    progress: Progress
    marks: Sequence[Mark]


_ROWS = (("loss", 150), ("throughput", 110), ("data_wait", 80))
_STRIP_PX, _GAP_PX, _MARGIN_TOP_PX, _MARGIN_BOTTOM_PX = 64, 40, 16, 48


def over_time(runs: Sequence[RunTime]) -> Figure:
    """Return the figure of loss, throughput, data wait, and where the time went, on one time axis."""
    unit, seconds_per_unit = _time_unit(max(run.clock.total for run in runs))
    heights = [height for _, height in _ROWS] + [_STRIP_PX] * len(runs)
    domains = _domains(heights)
    is_alone = len(runs) == 1
    rate = "rows/s" if all(run.progress.counts_rows for run in runs) else "steps/s"
    data: list[dict[str, Any]] = []
    for index, run in enumerate(runs):
        for row, curve, text in _curves(run, series_color(index), rate, is_alone):
            data.append(_over_time(curve, row, seconds_per_unit, text, unit))
        row = len(_ROWS) + index
        data += _strip(run, row, seconds_per_unit)
        data += _mark_points(run, row, seconds_per_unit, unit)
    for trace in data:
        trace["showlegend"] = is_alone and trace["yaxis"] == "y"
    axes = _value_axes(runs, rate, domains)
    total = max(run.clock.total for run in runs) / seconds_per_unit
    layout = {
        **axes,
        "xaxis": {
            "title": {"text": f"time of the run, {unit}"}, "range": [0, total], "zeroline": False,
            "anchor": f"y{len(axes)}",
        },
        "shapes": _failure_lines(runs[0], seconds_per_unit) if is_alone else [],
        "annotations": [] if is_alone else _strip_labels(runs, domains[len(_ROWS) :]),
        "barmode": "stack",
        "bargap": 0,
        "height": sum(heights) + _GAP_PX * (len(heights) - 1) + _MARGIN_TOP_PX + _MARGIN_BOTTOM_PX,
        "margin": {"t": _MARGIN_TOP_PX, "b": _MARGIN_BOTTOM_PX},
    }  # fmt: skip
    failures = sum(mark.kind == "failure" for run in runs for mark in run.marks)
    saved = sum(mark.kind == "checkpoint" for run in runs for mark in run.marks)
    description = (
        f"Loss, throughput, data wait and use of the time; {saved} checkpoints and {failures} failures are marked."
    )
    note = (
        "The time axis leaves out the time between a call of fit that ended and the one that resumed it. "
        "Colours of the bottom strip are those of the table “Where the time went”."
    )
    return Figure("Course of the run" if is_alone else "Course of the runs", description, note, data, layout)


def _curves(run: RunTime, color: str, rate: str, is_alone: bool) -> list[tuple[int, dict[str, Any], str]]:
    """Return the curves of a run: the row, the trace, and the format of its values."""
    label, val_loss = plotly_text(run.label), run.progress.val_loss
    rows = [
        (run.progress.loss, "training loss", "%{y:.5g}"),
        (run.progress.rows_per_s, rate, f"%{{y:,.4s}} {rate}"),
        (run.progress.data_wait, "data wait", "%{y:.1%} waiting for data"),
    ]
    curves = [
        (row, line(curve, name if is_alone else label, color), text) for row, (curve, name, text) in enumerate(rows)
    ]
    if val_loss.x:
        title, val_color = ("validation loss", series_color(1)) if is_alone else (f"{label}, validation", color)
        points = line(val_loss, title, val_color, "dot")
        points |= {"mode": "markers+lines", "marker": {"size": 6, "color": val_color}}
        curves.append((0, points, "%{y:.5g}"))
    return curves


def _value_axes(runs: Sequence[RunTime], rate: str, domains: Sequence[list[float]]) -> dict[str, Any]:
    """Return the vertical axes by name: of each row, and of each run's strip."""
    losses = [y for run in runs for curve in (run.progress.loss, run.progress.val_loss) for y in curve.values]
    axes: dict[str, Any] = {
        "yaxis": {**value_axis(losses), "title": {"text": "loss"}},
        "yaxis2": {"rangemode": "tozero", "title": {"text": rate}},
        "yaxis3": {"range": [0, 1], "tickformat": ".0%", "title": {"text": "data wait"}, "nticks": 3},
    }
    for index in range(len(runs)):
        axes[f"yaxis{len(_ROWS) + 1 + index}"] = {
            "range": [0, 1.5], "fixedrange": True, "showticklabels": False, "showgrid": False,
            "title": {"text": "time" if len(runs) == 1 else ""},
        }  # fmt: skip
    for (name, axis), domain in zip(axes.items(), domains, strict=True):
        axes[name] = {"domain": domain, "zeroline": False, **axis}
    return axes


def _time_unit(total: float) -> tuple[str, float]:
    """Return the unit of a time axis, and its seconds."""
    return ("s", 1.0) if total < 180 else ("min", 60.0) if total < 3 * 3600 else ("h", 3600.0)


def _domains(heights: Sequence[int]) -> list[list[float]]:
    """Return the part of the figure's height of each row, from the top."""
    total = sum(heights) + _GAP_PX * (len(heights) - 1)
    domains, top = [], total
    for height in heights:
        domains.append([max(0.0, (top - height) / total), top / total])
        top -= height + _GAP_PX
    return domains


def _over_time(trace: dict[str, Any], row: int, seconds_per_unit: float, text: str, unit: str) -> dict[str, Any]:
    x = [x / seconds_per_unit for x in trace["x"]]
    trace = {
        **trace,
        "x": x,
        "yaxis": f"y{row + 1}" if row else "y",
        "connectgaps": False,
        **hover(f"%{{x:.4g}} {unit}<br>{text}"),
    }
    return {**trace, "line": {**trace["line"], "width": 1.5}}


def _strip(run: RunTime, row: int, seconds_per_unit: float) -> list[dict[str, Any]]:
    """Return the bars that show where the time of a run went, moment by moment."""
    traces = []
    for bucket, shares in timeline(run.spans, run.clock).items():
        width = run.clock.total / len(shares) / seconds_per_unit
        cells = [index for index, share in enumerate(shares) if share > 0]
        traces.append(
            {"type": "bar", "name": bucket.replace("_", " "), "yaxis": f"y{row + 1}", "showlegend": False,
             "x": [(cell + 0.5) * width for cell in cells], "y": [round(float(shares[cell]), 4) for cell in cells],
             "width": width, "marker": {"color": bucket_color(bucket), "line": {"width": 0}},
             "hovertemplate": "%{y:.0%}<extra>%{fullData.name}</extra>"}
        )  # fmt: skip
    return traces


def _mark_points(run: RunTime, row: int, seconds_per_unit: float, unit: str) -> list[dict[str, Any]]:
    traces = []
    for kind, style in MARKS.items():
        found = [mark for mark in run.marks if mark.kind == kind]
        if kind == "checkpoint":  # there may be one for each step
            cell_s = max(run.clock.total, 1e-9) / NUM_POINTS
            found = list({int(mark.seconds / cell_s): mark for mark in found}.values())
        if found:
            traces.append(
                {"type": "scatter", "mode": "markers", "name": style.name, "yaxis": f"y{row + 1}",
                 "x": [mark.seconds / seconds_per_unit for mark in found], "y": [1.25] * len(found),
                 "text": [plotly_text(mark.text, _MAX_HOVER) for mark in found],
                 "showlegend": False, "cliponaxis": False,
                 "marker": {"symbol": style.symbol, "color": style.color, "size": 9, "line": {"width": 0}},
                 "hovertemplate": f"%{{x:.4g}} {unit}<br>%{{text}}<extra></extra>"}
            )  # fmt: skip
    return traces


def _strip_labels(runs: Sequence[RunTime], domains: Sequence[Sequence[float]]) -> list[dict[str, Any]]:
    """Return the names of runs above their strips."""
    return [
        {"text": plotly_text(run.label), "xref": "paper", "x": 0, "yref": "paper", "y": domain[1], "showarrow": False,
         "xanchor": "left", "yanchor": "bottom", "font": {"size": 12, "color": series_color(index)}}
        for index, (run, domain) in enumerate(zip(runs, domains, strict=True))
    ]  # fmt: skip


def _failure_lines(run: RunTime, seconds_per_unit: float) -> list[dict[str, Any]]:
    """Return vertical lines through all rows, where training was interrupted."""
    return [
        {"type": "line", "xref": "x", "yref": "paper", "y0": 0, "y1": 1, "layer": "below",
         "x0": mark.seconds / seconds_per_unit, "x1": mark.seconds / seconds_per_unit,
         "line": {"color": MARKS[mark.kind].color, "width": 1, "dash": "dot"}}
        for mark in run.marks
        if mark.kind in ("failure", "resume")
    ]  # fmt: skip
