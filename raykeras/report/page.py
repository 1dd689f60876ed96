"""The HTML page of a report: one file that needs no network. Whatever runs contain is escaped as text."""

from __future__ import annotations

import datetime
import importlib.resources
from collections.abc import Sequence

import raykeras
from raykeras.core.errors import OptionError
from raykeras.driver.runs import StoredRun
from raykeras.report import sections
from raykeras.report.markup import escaped, json_data, script_hash
from raykeras.report.sections import Placed, ReportedRun


def write_report(paths: Sequence[str], output: str) -> None:
    """Write the report of one or several runs.

    Args:
        paths: Paths or fsspec URLs of the runs' folders.
        output: Path of the HTML file.

    Raises:
        OptionError: If a folder holds no run, or the file cannot be written.
        CheckpointError: If the storage cannot be read.
    """
    from plotly.offline import get_plotlyjs

    page = report_page(paths, get_plotlyjs())
    try:
        with open(output, "w", encoding="utf-8", newline="\n") as file:
            file.write(page)
    except OSError as error:
        raise OptionError(f"`-o` takes the path of a file that can be written; got {output!r}: {error}") from None


def report_page(paths: Sequence[str], plotly: str) -> str:
    """Return the page of one or several runs.

    Args:
        paths: Paths or fsspec URLs of the runs' folders.
        plotly: Plotly's JavaScript.
    """
    stored = [StoredRun(path) for path in paths]
    logs = [run.update() for run in stored]
    labels = unique_labels([run.info().name for run in stored])
    runs = [ReportedRun(label, run, log) for label, run, log in zip(labels, stored, logs, strict=True)]
    title = labels[0] if len(runs) == 1 else f"{len(runs)} runs"
    figures = Placed()
    body = "\n".join(
        (
            sections.header(title, runs),
            sections.metrics(runs, figures),
            sections.course(runs, figures),
            sections.use_of_time(runs, figures),
            sections.workers(runs, figures),
            sections.failures(runs),
            sections.configurations(runs),
        )
    )
    css, script = _resource("page.css"), _resource("page.js")
    policy = (
        f"default-src 'none'; script-src {script_hash(plotly)} {script_hash(script)}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
    written = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escaped(title)} – raykeras report</title>
<link rel="icon" href="data:,">
<style>{css}</style>
</head>
<body>
<main>
{body}
</main>
<footer>Written by raykeras {escaped(raykeras.__version__)} on {written}. Figures by Plotly.</footer>
<noscript><p class="note">The figures need JavaScript.</p></noscript>
<script type="application/json" id="figures">{json_data(figures.json())}</script>
<script>{plotly}</script>
<script>{script}</script>
</body>
</html>
"""


def unique_labels(names: Sequence[str]) -> list[str]:
    """Return the names of runs; those that occur more than once with a number."""
    labels: list[str] = []
    for index, name in enumerate(names):
        before = names[:index].count(name)
        labels.append(f"{name} ({before + 1})" if before else name)
    return labels


def _resource(name: str) -> str:
    return importlib.resources.files("raykeras.report").joinpath(name).read_text(encoding="utf-8")
