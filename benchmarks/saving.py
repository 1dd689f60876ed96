"""What saving costs while a model trains.

    python -m benchmarks.saving

Trains a model of 50 MB (147 MB with Adam's state) in this process: without checkpoints, with one every 50 steps that is
written beside training, and with the same written before training goes on; in alternation. Prints the steps per
second over 250 steps with five checkpoints, after the first one, which gets the memory for the copies, as medians,
and the ratios, and writes them as JSON to `--json`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

import raykeras as rk
from raykeras import saving

UNITS, BATCH, FIRST, STEPS, EVERY, ROUNDS = 3500, 256, 80, 250, 50, 3
KINDS = ("no checkpoints", "beside training", "before training goes on")


def build() -> Any:
    import keras

    model = keras.Sequential([keras.Input((UNITS,)), keras.layers.Dense(UNITS), keras.layers.Dense(1)])
    model.compile("adam", "mse")
    return model


def clock() -> Any:
    """A callback that keeps the seconds that the steps took."""
    import keras

    class Clock(keras.callbacks.Callback):  # type: ignore[misc]
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            if batch == FIRST:
                self.begun = time.perf_counter()
            if batch == FIRST + STEPS:
                self.seconds = time.perf_counter() - self.begun

    return Clock()


class WaitingKeeper(saving.Keeper):
    """Writes before training goes on."""

    def put(self, *args: Any) -> None:
        super().put(*args)
        with self._changed:
            self._changed.wait_for(lambda: not (self._waiting or self._is_writing))


def steps_per_s(kind: str, x: np.ndarray, y: np.ndarray) -> float:
    """Of one training."""
    from raykeras import launch

    timed = clock()
    every = None if kind == KINDS[0] else EVERY
    keeper = WaitingKeeper if kind == KINDS[2] else saving.Keeper
    with tempfile.TemporaryDirectory() as storage, mock.patch.object(launch, "Keeper", keeper):
        run = rk.Run(storage=storage, checkpoint_every=every)
        rk.fit(build, x, y, batch_size=BATCH, steps_per_epoch=FIRST + STEPS + 1, callbacks=[timed], run=run, verbose=0)
    return STEPS / float(timed.seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    x = np.random.default_rng(0).normal(size=(16 * BATCH, UNITS)).astype(np.float32)
    y = x[:, :1]
    rates: dict[str, list[float]] = {kind: [] for kind in KINDS}
    steps_per_s(KINDS[0], x, y)  # the first of anything is slow
    for _ in range(ROUNDS):
        for kind in KINDS:
            rates[kind].append(steps_per_s(kind, x, y))
    medians = {kind: statistics.median(values) for kind, values in rates.items()}
    print("| checkpoints, every 50 steps | steps/s | of those without |\n| --- | --- | --- |")
    for kind, value in medians.items():
        print(f"| {kind} | {value:.2f} | {value / medians[KINDS[0]]:.3f} |")
    if arguments.json:
        arguments.json.write_text(json.dumps({"rates": rates, "medians": medians}, indent=1))


if __name__ == "__main__":
    main()
