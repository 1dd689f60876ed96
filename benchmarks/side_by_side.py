"""Run contenders of a benchmark in alternation or by turns, and print tables of their medians."""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import signal
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import datetime, timezone
from importlib import metadata
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
PACKAGES = ("ray", "tensorflow", "keras", "tf_keras", "pyarrow", "numpy")

Contender = Callable[[], float]
"""Runs once and returns a figure."""


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Return an argument parser with the options that benchmarks share."""
    result = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--json", type=Path, help="file to write the results to")
    result.add_argument("--rounds", type=int, default=3, help="number of runs of each contender (%(default)s)")
    return result


def alternate(contenders: Mapping[str, Contender], rounds: int) -> dict[str, list[float]]:
    """Run all contenders once in each round; return the figures of each."""
    figures: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            figures[name].append(run())
    return figures


def alone(run: Callable[[], T]) -> T:
    """Run a contender in a new process, so that contenders do not share state."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(run).result()


Turn = Callable[[], None]
"""Ends a contender's turn, and returns when its next turn begins."""


def by_turns(contenders: Mapping[str, Callable[[Turn], T]]) -> dict[str, T]:
    """Run contenders by turns, each in a process, and return their values.

    Between the turns of a contender, its process and all descendants are stopped. The compared turns are therefore
    seconds apart, and no contender runs while another one does.

    Args:
        contenders: Functions of a `Turn`, which they call wherever their turn may end.
    """
    context = multiprocessing.get_context("spawn")
    running, results = {}, {}
    for name, run in contenders.items():
        connection, child_connection = context.Pipe()
        process = context.Process(target=_take_turns, args=(child_connection, run))
        process.start()
        child_connection.close()
        running[name] = process, connection
    try:
        while running:
            for name, (process, connection) in list(running.items()):
                _signal(process, signal.SIGCONT)
                connection.send(None)
                if (result := connection.recv()) is None:
                    _signal(process, signal.SIGSTOP)
                else:
                    (results[name],) = result
                    process.join()
                    del running[name]
    finally:
        for process, _ in running.values():
            _signal(process, signal.SIGCONT)
            process.terminate()
    return results


def _take_turns(connection: Any, run: Callable[[Turn], Any]) -> None:
    def turn() -> None:
        connection.send(None)
        connection.recv()

    connection.recv()
    connection.send((run(turn),))


def _signal(process: BaseProcess, number: int) -> None:
    """Send a signal to a process and all of its descendants."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # the process has ended
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(path.parent.name))
    assert process.pid is not None
    pids = [process.pid]
    for pid in pids:
        pids += children.get(pid, [])
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table in Markdown."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (header, ["---"] * len(header), *rows)]
    return "\n".join(lines)


def ratios(figures: Mapping[str, Sequence[float]], of: str, unit: str, form: str = ",.0f") -> str:
    """Return a table of the medians, the ranges, and the median of `of` divided by each."""
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
    """Write results, with the machine and the versions, as JSON; do nothing if `path` is None."""
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
