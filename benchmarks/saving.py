"""The cost of checkpoints while a model trains.

    python -m benchmarks.saving [sgd adam] [--batch-size 256]

Trains a model of 50 MB in this process, whose checkpoints take 50 MB with SGD and 147 MB with Adam: without
checkpoints, with a checkpoint every 50 steps that is written while training continues, and with one that training waits
for. These alternate. Prints the steps per second over 200 steps with four checkpoints, after as many checkpoints as are
kept, so that memory and files are reused.
"""

from __future__ import annotations

import functools
import tempfile
import time
from typing import Any
from unittest import mock

import numpy as np

import raykeras as rk
from benchmarks import side_by_side
from raykeras.checkpoint.writer import AsyncCheckpointWriter

UNITS, FIRST, STEPS, EVERY = 3500, 180, 200, 50
KINDS = ("no checkpoints", "asynchronous", "synchronous")


def build(optimizer: str) -> Any:
    import keras

    model = keras.Sequential([keras.Input((UNITS,)), keras.layers.Dense(UNITS), keras.layers.Dense(1)])
    model.compile(optimizer, "mse")
    return model


def clock() -> Any:
    """Return a callback that records the seconds of `STEPS` steps."""
    import keras

    class Clock(keras.callbacks.Callback):  # type: ignore[misc]
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            if batch == FIRST:
                self.start = time.perf_counter()
            if batch == FIRST + STEPS:
                self.seconds = time.perf_counter() - self.start

    return Clock()


class SyncCheckpointWriter(AsyncCheckpointWriter):
    """Waits until each checkpoint is written."""

    def put(self, *args: Any) -> None:
        super().put(*args)
        with self._changed:
            self._changed.wait_for(lambda: not (self._waiting or self._is_writing))


def steps_per_s(kind: str, optimizer: str, x: np.ndarray, batch_size: int) -> float:
    """Return the steps per second of one run."""
    from raykeras.worker import entry

    timer = clock()
    checkpoint_every = None if kind == KINDS[0] else EVERY
    writer = SyncCheckpointWriter if kind == KINDS[2] else AsyncCheckpointWriter
    with tempfile.TemporaryDirectory() as storage, mock.patch.object(entry, "AsyncCheckpointWriter", writer):
        run = rk.Run(storage=storage, checkpoint_every=checkpoint_every)
        model, steps = functools.partial(build, optimizer), FIRST + STEPS + 1
        rk.fit(model, x, x[:, :1], batch_size=batch_size, steps_per_epoch=steps, callbacks=[timer], run=run, verbose=0)
    return STEPS / float(timer.seconds)


def main() -> None:
    parser = side_by_side.parser(__doc__)
    parser.add_argument("optimizers", nargs="*", default=["sgd", "adam"], metavar="OPTIMIZER")
    parser.add_argument("--batch-size", type=int, default=256)
    arguments = parser.parse_args()
    x = np.random.default_rng(0).normal(size=(16 * arguments.batch_size, UNITS)).astype(np.float32)
    measured = {}
    for optimizer in arguments.optimizers:
        run = functools.partial(steps_per_s, optimizer=optimizer, x=x, batch_size=arguments.batch_size)
        run(KINDS[0])  # warm-up
        rates = side_by_side.alternate({kind: functools.partial(run, kind) for kind in KINDS}, arguments.rounds)
        measured[optimizer] = rates
        print(f"\n{optimizer}\n\n{side_by_side.ratios(rates, KINDS[0], 'steps/s', '.2f')}", flush=True)
    side_by_side.write(arguments.json, measured)


if __name__ == "__main__":
    main()
