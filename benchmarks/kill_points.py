"""Differences between runs that are killed at every point and runs that are not.

    python -m benchmarks.kill_points [--points "step 1 2" ...]

The points are those of `tests/support/resuming.py`. At each of them, a driver with one worker in its process is killed
with SIGKILL and the run is resumed on one, two and three workers; and each of two workers is killed in turn. Prints the
largest relative difference of any value in the history / of any weight. On the same number of workers the model has a
Dropout layer and the runs must agree to 1e-6; on another number it has none and they must agree to 1e-5.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import raykeras as rk
from benchmarks.exactness import relative
from tests.support.resuming import POINTS, fit, killer, steering

DROPOUT = 0.3


def killed_driver(point: str, storage: Path, dropout: float) -> None:
    """Train on one worker in a process that is killed at a point."""
    plan = {"storage": str(storage), "points": [point], "dropout": dropout}
    (storage / "plan.json").write_text(json.dumps(plan))
    command = [sys.executable, "-m", "tests.support.resuming", str(storage / "plan.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != -signal.SIGKILL:
        raise SystemExit(f"not killed at {point!r}:\n{done.stderr}")


def resumed(point: str, workers: int, dropout: float, folder: Path) -> rk.Result:
    """Kill a driver with one worker in its process, and resume the run on a number of workers."""
    interrupted = folder / "interrupted"
    if not interrupted.exists():
        interrupted.mkdir()
        killed_driver(point, interrupted, dropout)
    storage = folder / f"resumed by {workers}"
    shutil.copytree(interrupted, storage)
    return fit(str(storage), "run", steering(), scale=rk.Scale(workers=workers), dropout=dropout)


def restarted(point: str, rank: int, folder: Path) -> rk.Result:
    """Kill one of two workers, and let the run restart them."""
    storage = folder / f"rank {rank}"
    storage.mkdir()
    callbacks = [*steering(), killer([point], str(storage), rank)]
    result = fit(str(storage), "run", callbacks, scale=rk.Scale(workers=2), dropout=DROPOUT)
    if not (storage / point).exists():
        raise SystemExit(f"rank {rank} was not killed at {point!r}")
    return result


def differences(result: rk.Result, expected: rk.Result) -> tuple[float, float]:
    """Return the largest relative differences of the history and of the weights."""
    weights = zip(expected.model().get_weights(), result.model().get_weights(), strict=True)
    return (
        max(relative(values, result.history[name]) for name, values in expected.history.items()),
        max(relative(a, b) for a, b in weights),
    )


def cases(
    point: str, folder: Path, expected: dict[tuple[int, float], rk.Result]
) -> Iterator[tuple[float, float, float]]:
    """Yield the limit, the difference of the history and the difference of the weights for each column of the table."""
    for dropout, worker_counts in ((DROPOUT, [1]), (0.0, [2, 3])):
        for workers in worker_counts:
            result = resumed(point, workers, dropout, folder / f"dropout {dropout}")
            yield 1e-6 if workers == 1 else 1e-5, *differences(result, expected[1, dropout])
    for rank in (0, 1) if point != "write" else (0,):
        yield 1e-6, *differences(restarted(point, rank, folder), expected[2, DROPOUT])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", nargs="*", default=POINTS, choices=POINTS)
    arguments = parser.parse_args()
    columns = ["killed at", "1 worker, resumed on 1", "on 2", "on 3", "of 2 workers, rank 0", "rank 1"]
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        expected = {
            (workers, dropout): fit(
                folder, f"expected-{workers}-{dropout}", steering(), scale=rk.Scale(workers=workers), dropout=dropout
            )
            for workers, dropout in ((1, DROPOUT), (1, 0.0), (2, DROPOUT))
        }
        for point in arguments.points:
            for dropout in (DROPOUT, 0.0):
                Path(folder, point, f"dropout {dropout}").mkdir(parents=True)
            cells = []
            for limit, history, weights in cases(point, Path(folder, point), expected):
                is_exact = max(history, weights) <= limit
                failed += not is_exact
                cells.append(f"{history:.0e} / {weights:.0e}" + ("" if is_exact else " **too large**"))
            cells += ["only the chief writes"] * (len(columns) - 1 - len(cells))
            print(f"| {point} | {' | '.join(cells)} |", flush=True)
    raise SystemExit(f"{failed} differ by more than allowed" if failed else 0)


if __name__ == "__main__":
    main()
