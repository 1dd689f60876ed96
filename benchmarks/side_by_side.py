"""Contenders run in alternation, and a table of their medians."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
PACKAGES = ("ray", "tensorflow", "keras", "tf_keras", "pyarrow", "numpy")

Contender = Callable[[], float]
"""Runs once and returns what it measured."""


def parser(doc: str | None) -> argparse.ArgumentParser:
    """With what every benchmark takes."""
    result = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--json", type=Path, help="where to write what was measured")
    result.add_argument("--rounds", type=int, default=3, help="how often each contender runs (%(default)s)")
    return result


def alternate(contenders: Mapping[str, Contender], rounds: int) -> dict[str, list[float]]:
    """Each contender's figures: all run once, then all again."""
    figures: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            figures[name].append(run())
    return figures


def alone(run: Callable[[], T]) -> T:
    """Runs a contender in a process of its own, where nothing is set that another one sets."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(run).result()


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table in Markdown."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (header, ["---"] * len(header), *rows)]
    return "\n".join(lines)


def ratios(figures: Mapping[str, Sequence[float]], of: str, unit: str, form: str = ",.0f") -> str:
    """Medians, their range, and `of`'s median as a multiple of each."""
    medians = {name: statistics.median(values) for name, values in figures.items() if values}
    rows = [
        (
            name,
            f"{medians[name]:{form}}",
            f"{min(values):{form}}–{max(values):{form}}",
            f"{medians[of] / medians[name]:.2f}",
        )
        for name, values in figures.items()
        if values
    ]
    return table(["", unit, "range", f"{of} ÷ this"], rows)


def write(path: Path | None, measured: Any) -> None:
    """What was measured, with the machine and the versions, as JSON."""
    if path is None:
        return
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    machine = {"cpus": os.cpu_count(), "platform": platform.platform(), "python": platform.python_version()}
    when = datetime.now(timezone.utc).isoformat(timespec="seconds")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps({"when": when, "machine": machine, "versions": versions, "measured": measured}, indent=1)
    )
