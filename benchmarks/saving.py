"""What saving costs while a model trains.

    python -m benchmarks.saving [sgd adam] [--batch-size 256]

Trains a model of 50 MB in this process, a checkpoint of which has 50 MB with SGD, and 147 MB with Adam and its state:
without checkpoints, with one every 50 steps that is written beside training, and with the same written before training
goes on; in alternation. Prints the steps per second over 200 steps with four checkpoints, once as many were written as
are kept, so that memory and files are used again.
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
from raykeras import saving

UNITS, FIRST, STEPS, EVERY = 3500, 180, 200, 50
KINDS = ("no checkpoints", "beside training", "before training goes on")


def build(optimizer: str) -> Any:
    import keras

    model = keras.Sequential([keras.Input((UNITS,)), keras.layers.Dense(UNITS), keras.layers.Dense(1)])
    model.compile(optimizer, "mse")
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


def steps_per_s(kind: str, optimizer: str, x: np.ndarray, batch_size: int) -> float:
    """Of one training."""
    from raykeras import launch

    timed = clock()
    every = None if kind == KINDS[0] else EVERY
    keeper = WaitingKeeper if kind == KINDS[2] else saving.Keeper
    with tempfile.TemporaryDirectory() as storage, mock.patch.object(launch, "Keeper", keeper):
        run = rk.Run(storage=storage, checkpoint_every=every)
        model, steps = functools.partial(build, optimizer), FIRST + STEPS + 1
        rk.fit(model, x, x[:, :1], batch_size=batch_size, steps_per_epoch=steps, callbacks=[timed], run=run, verbose=0)
    return STEPS / float(timed.seconds)


def main() -> None:
    parser = side_by_side.parser(__doc__)
    parser.add_argument("optimizers", nargs="*", default=["sgd", "adam"], metavar="OPTIMIZER")
    parser.add_argument("--batch-size", type=int, default=256)
    arguments = parser.parse_args()
    x = np.random.default_rng(0).normal(size=(16 * arguments.batch_size, UNITS)).astype(np.float32)
    measured = {}
    for optimizer in arguments.optimizers:
        run = functools.partial(steps_per_s, optimizer=optimizer, x=x, batch_size=arguments.batch_size)
        run(KINDS[0])  # the first of anything is slow
        rates = side_by_side.alternate({kind: functools.partial(run, kind) for kind in KINDS}, arguments.rounds)
        measured[optimizer] = rates
        print(f"\n{optimizer}\n\n{side_by_side.ratios(rates, KINDS[0], 'steps/s', '.2f')}", flush=True)
    side_by_side.write(arguments.json, measured)


if __name__ == "__main__":
    main()
