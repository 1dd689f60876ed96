"""Contenders run in alternation or by turns, and a table of their medians."""

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


Turn = Callable[[], None]
"""Ends a contender's turn; returns when its next one begins."""


def by_turns(contenders: Mapping[str, Callable[[Turn], T]]) -> dict[str, T]:
    """What contenders return that run side by side, each in a process of its own, by turns.

    A contender calls what it is given wherever its turn may end. Until its next one, its process and all that it
    started are stopped: what is compared is seconds apart, and nobody runs beside anybody.
    """
    context = multiprocessing.get_context("spawn")
    running, results = {}, {}
    for name, run in contenders.items():
        ours, theirs = context.Pipe()
        process = context.Process(target=_take_turns, args=(theirs, run))
        process.start()
        theirs.close()
        running[name] = process, ours
    try:
        while running:
            for name, (process, connection) in list(running.items()):
                _signal(process, signal.SIGCONT)
                connection.send(None)
                if (returned := connection.recv()) is None:
                    _signal(process, signal.SIGSTOP)
                else:
                    (results[name],) = returned
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
    """To a process and all that descend from it."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(path.parent.name))
    assert process.pid is not None  # it was started
    family = [process.pid]
    for member in family:
        family += children.get(member, [])
        with contextlib.suppress(ProcessLookupError):
            os.kill(member, number)


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
