"""Differences between a run that is killed 50 times at random and one that is not.

    python -m benchmarks.soak [--kills 50] [--workers 2]

After a random time, a worker or the driver is killed with SIGKILL; a killed driver is started again. At the end, the
history and the weights must be those of the uninterrupted run. The events are audited as well: in the history that
survived, every step of every epoch was trained exactly once.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import raykeras as rk
from raykeras.checkpoint.store import RunFolder

ROWS, BATCH, EPOCHS = 1000, 32, 40
STEPS = -(-ROWS // BATCH)


def build() -> Any:
    import keras

    layers = [keras.Input((16,)), keras.layers.Dense(32, "relu"), keras.layers.Dropout(0.2)]
    model = keras.Sequential([*layers, keras.layers.Dense(4, "softmax")])
    model.compile(keras.optimizers.Adam(1e-3), "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def slow(seconds: float) -> Any:
    import keras

    class Slow(keras.callbacks.Callback):  # type: ignore[misc]
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            time.sleep(seconds)

    return Slow()


def train(storage: str, name: str, workers: int, step_s: float) -> rk.Result:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(ROWS, 16)).astype(np.float32), rng.integers(0, 4, ROWS)
    run = rk.Run(storage=storage, name=name, checkpoint_every=7, max_failures=1000)
    callbacks = [slow(step_s)] if step_s else []
    return rk.fit(
        build, x, y, batch_size=BATCH, epochs=EPOCHS, validation_data=(x[:99], y[:99]), run=run, callbacks=callbacks,
        scale=rk.Scale(workers=workers), verbose=0,
    )  # fmt: skip


def workers_of(driver: int) -> list[int]:
    """Return the process ids of the training workers that descend from a driver."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(path.name)] = (int((path / "stat").read_text().rsplit(")", 1)[1].split()[1]), path)
        except (OSError, ValueError):
            continue
    workers = []
    for pid, (_, path) in parents.items():
        ancestor, ancestors = pid, []
        while ancestor in parents:
            ancestors.append(ancestor)
            ancestor = parents[ancestor][0]
        try:
            if driver in ancestors and b"RayTrainWorker" in (path / "cmdline").read_bytes():
                workers.append(pid)
        except OSError:
            continue
    return workers


def soak(storage: str, kills: int, workers: int, seed: int) -> tuple[int, int]:
    """Kill processes of a run, each a random time after training started or resumed, until the run ends.

    Args:
        storage: Storage of the run.
        kills: Number of processes to kill.
        workers: Number of workers.
        seed: Seed of the random choices.

    Returns:
        The numbers of workers and of drivers that were killed.
    """
    rng, killed = random.Random(seed), {"worker": 0, "driver": 0}
    command = [sys.executable, "-m", "benchmarks.soak", "--train", storage, "--workers", str(workers)]
    while True:
        driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        starts, due = len(starts_of(storage)), 0.0
        while driver.poll() is None:
            time.sleep(0.05)
            if sum(killed.values()) == kills:
                continue
            if not due and len(starts_of(storage)) > starts:
                starts, due = len(starts_of(storage)), time.monotonic() + rng.uniform(0, 3)
            if not due or time.monotonic() < due:
                continue
            targets, due = workers_of(driver.pid) if rng.random() < 0.5 else [], 0.0
            kind, pid = ("worker", rng.choice(targets)) if targets else ("driver", driver.pid)
            os.kill(pid, signal.SIGKILL)
            killed[kind] += 1
            print(f"kill {sum(killed.values())}: {kind}", flush=True)
            if kind == "driver":
                driver.wait()
        if driver.returncode == 0:
            return killed["worker"], killed["driver"]
        if driver.returncode != -signal.SIGKILL:
            raise SystemExit(f"the driver exited with {driver.returncode}")


def starts_of(storage: str) -> list[dict[str, Any]]:
    """Return the events of starts and restarts."""
    return [event for event in events_of(storage) if event["event"] in ("RunStarted", "RunRestarted")]


def events_of(storage: str) -> list[dict[str, Any]]:
    path = Path(storage, "soak", "events.jsonl")
    lines = path.read_text().splitlines() if path.exists() else []
    events = []
    for line in lines:
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError:  # the driver was killed while it wrote the line
            continue
    return events


def audit(events: Sequence[dict[str, Any]]) -> tuple[int, int]:
    """Check that every step of the history that survived was trained exactly once.

    When training resumes from a checkpoint, events of later steps are no longer part of the history. Steps before the
    checkpoint without events were trained by a killed driver, whose last events were lost.

    Returns:
        The number of steps with events, and of steps that are known only from the position of a checkpoint.

    Raises:
        SystemExit: If a step is missing, or occurs twice.
    """
    reported: list[tuple[int, int]] = []
    inferred: list[tuple[int, int]] = []
    for event in events:
        if event["event"] in ("RunStarted", "RunRestarted"):
            prefix = "initial_" if event["event"] == "RunStarted" else ""
            position = (event[f"{prefix}epoch"] or 0, event[f"{prefix}step"] or 0)
            reported = [step for step in reported if step < position]
            last = max(reported, default=(-1, 0))
            inferred = [step for step in inferred if step < position]
            inferred += [step for step in _steps_before(*position) if step > max([last, *inferred])]
        elif event["event"] == "BatchEnded":
            end, number = event["step"], event["num_steps"]
            reported += [(event["epoch"], step) for step in range(end - number, end)]
    expected = _steps_before(EPOCHS, 0)
    if sorted(reported + inferred) != expected:
        steps = reported + inferred
        raise SystemExit(f"audit failed: {len(steps)} steps, {len(set(steps))} different, {len(expected)} expected")
    return len(reported), len(inferred)


def _steps_before(epoch: int, step: int) -> list[tuple[int, int]]:
    """Return all steps before a position, as (epoch, step)."""
    return [(e, s) for e in range(epoch) for s in range(STEPS)] + [(epoch, s) for s in range(step)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", metavar="STORAGE", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.train:
        train(arguments.train, "soak", arguments.workers, step_s=0.05)
        return
    with tempfile.TemporaryDirectory() as storage:
        expected = train(storage, "uninterrupted", arguments.workers, step_s=0)
        start = time.monotonic()
        workers, drivers = soak(storage, arguments.kills, arguments.workers, arguments.seed)
        seconds = time.monotonic() - start
        reported, inferred = audit(events_of(storage))
        result = train(storage, "soak", arguments.workers, step_s=0)  # trains no step
        history = max(
            float(np.max(np.abs(np.array(result.history[name]) / np.array(values) - 1)))
            for name, values in expected.history.items()
        )
        actual_weights = RunFolder(result.path).checkpoints()[-1].load_model().get_weights()
        expected_weights = RunFolder(expected.path).checkpoints()[-1].load_model().get_weights()
        weights = max(float(np.max(np.abs(a - b))) for a, b in zip(actual_weights, expected_weights, strict=True))
        restarts = len(starts_of(storage)) - 1
    cells: dict[str, Any] = {"workers killed": workers, "drivers killed": drivers, "restarts": restarts}
    cells |= {"steps with events": reported, "from checkpoints only": inferred, "history differs by": f"{history:.1e}"}
    cells |= {"weights differ by": f"{weights:.1e}", "minutes": f"{seconds / 60:.0f}"}
    for row in (cells, ["---"] * len(cells), cells.values()):
        print(f"| {' | '.join(map(str, row))} |")
    if history > 1e-6 or weights > 1e-6:
        raise SystemExit("the run does not end like the uninterrupted one")


if __name__ == "__main__":
    main()
