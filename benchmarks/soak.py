"""Kills a run 50 times at random, and compares what is left with the same run undisturbed.

    python -m benchmarks.soak [--kills 50] [--workers 2]

Each time, after a random while, either one worker or the driver is killed with SIGKILL; a killed driver is started
again. At the end the history and the weights are those of the undisturbed run, and the run's events are audited: in
the history that survived, each step of each epoch was trained exactly once.
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
from raykeras.checkpoint import RunFolder

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
    """Process ids of the training workers below a driver."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(path.name)] = (int((path / "stat").read_text().rsplit(")", 1)[1].split()[1]), path)
        except (OSError, ValueError):
            continue
    found = []
    for pid, (_, path) in parents.items():
        at, above = pid, []
        while at in parents:
            above.append(at)
            at = parents[at][0]
        try:
            if driver in above and b"RayTrainWorker" in (path / "cmdline").read_bytes():
                found.append(pid)
        except OSError:
            continue
    return found


def soak(storage: str, kills: int, workers: int, seed: int) -> tuple[int, int]:
    """Kills until it is enough, each time a random while after training went on; how many workers and drivers."""
    chance, killed = random.Random(seed), {"worker": 0, "driver": 0}
    command = [sys.executable, "-m", "benchmarks.soak", "--train", storage, "--workers", str(workers)]
    while True:
        driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        starts, due = len(starts_of(storage)), 0.0
        while driver.poll() is None:
            time.sleep(0.05)
            if sum(killed.values()) == kills:
                continue
            if not due and len(starts_of(storage)) > starts:
                starts, due = len(starts_of(storage)), time.monotonic() + chance.uniform(0, 3)
            if not due or time.monotonic() < due:
                continue
            targets, due = workers_of(driver.pid) if chance.random() < 0.5 else [], 0.0
            kind, pid = ("worker", chance.choice(targets)) if targets else ("driver", driver.pid)
            os.kill(pid, signal.SIGKILL)
            killed[kind] += 1
            print(f"kill {sum(killed.values())}: {kind}", flush=True)
            if kind == "driver":
                driver.wait()
        if driver.returncode == 0:
            return killed["worker"], killed["driver"]
        if driver.returncode != -signal.SIGKILL:
            raise SystemExit(f"the driver ended with {driver.returncode}")


def starts_of(storage: str) -> list[dict[str, Any]]:
    """The events by which training began or went on."""
    return [event for event in events_of(storage) if event["event"] in ("RunStarted", "RunRestarted")]


def events_of(storage: str) -> list[dict[str, Any]]:
    path = Path(storage, "soak", "events.jsonl")
    lines = path.read_text().splitlines() if path.exists() else []
    events = []
    for line in lines:
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError:  # the driver was killed while it wrote
            continue
    return events


def audit(events: Sequence[dict[str, Any]]) -> tuple[int, int]:
    """Steps of the history that survived: told of by events, and only by the position of a checkpoint.

    Where training went on from a checkpoint, what was told of after it is no longer part of the history; and what
    was not told of before it was trained when its driver was killed, which took its last events along.

    Raises:
        SystemExit: If a step is missing, or is there twice.
    """
    told: list[tuple[int, int]] = []
    known: list[tuple[int, int]] = []
    for event in events:
        if event["event"] in ("RunStarted", "RunRestarted"):
            prefix = "initial_" if event["event"] == "RunStarted" else ""
            position = (event[f"{prefix}epoch"] or 0, event[f"{prefix}step"] or 0)
            told = [step for step in told if step < position]
            last = max(told, default=(-1, 0))
            known = [step for step in known if step < position]
            known += [step for step in _all_until(*position) if step > max([last, *known])]
        elif event["event"] == "BatchEnded":
            end, number = event["step"], event["num_steps"]
            told += [(event["epoch"], step) for step in range(end - number, end)]
    expected = _all_until(EPOCHS, 0)
    if sorted(told + known) != expected:
        steps = told + known
        raise SystemExit(f"audit failed: {len(steps)} steps, {len(set(steps))} different, {len(expected)} expected")
    return len(told), len(known)


def _all_until(epoch: int, step: int) -> list[tuple[int, int]]:
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
        expected = train(storage, "undisturbed", arguments.workers, step_s=0)
        begun = time.monotonic()
        workers, drivers = soak(storage, arguments.kills, arguments.workers, arguments.seed)
        seconds = time.monotonic() - begun
        told, known = audit(events_of(storage))
        result = train(storage, "soak", arguments.workers, step_s=0)  # nothing is left to train
        history = max(
            float(np.max(np.abs(np.array(result.history[name]) / np.array(values) - 1)))
            for name, values in expected.history.items()
        )
        ours = RunFolder(result.path).checkpoints()[-1].load_model().get_weights()
        theirs = RunFolder(expected.path).checkpoints()[-1].load_model().get_weights()
        weights = max(float(np.max(np.abs(a - b))) for a, b in zip(ours, theirs, strict=True))
        restarts = len(starts_of(storage)) - 1
    cells: dict[str, Any] = {"workers killed": workers, "drivers killed": drivers, "restarts": restarts}
    cells |= {"steps told of": told, "by checkpoints only": known, "history differs": f"{history:.1e}"}
    cells |= {"weights differ": f"{weights:.1e}", "minutes": f"{seconds / 60:.0f}"}
    for row in (cells, ["---"] * len(cells), cells.values()):
        print(f"| {' | '.join(map(str, row))} |")
    if history > 1e-6 or weights > 1e-6:
        raise SystemExit("the run does not end as an undisturbed one")


if __name__ == "__main__":
    main()
