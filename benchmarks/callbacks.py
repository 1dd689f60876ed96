"""The cost of callbacks and events per step, and the latency of events.

    python -m benchmarks.callbacks

Trains a model with a few weights, so that steps are as short as possible. The cost is the time in the hooks of all
callbacks of a step, Keras' `History` included. The latency is the time from the creation of an event on a worker to its
arrival at the driver's handler, while four workers train.
"""

from __future__ import annotations

import tempfile
import time
from typing import Any

import keras
import numpy as np

import raykeras as rk
from benchmarks import side_by_side

ROWS, BATCH = 4096, 8
STEPS = ROWS // BATCH


class HookTimes(keras.callbacks.Callback):  # type: ignore[misc]
    """Records the seconds that the hooks of all callbacks take in each step, in the process that trains."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []
        self.watch()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.watch()

    def watch(self) -> None:
        from raykeras.worker import resume, session

        def timed(*args: Any, **kwargs: Any) -> Any:
            callbacks = resume.resuming_list(*args, **kwargs)
            begin, end = callbacks.on_train_batch_begin, callbacks.on_train_batch_end

            def on_train_batch_begin(batch: int, logs: Any = None) -> None:
                start = time.perf_counter()
                begin(batch, logs)
                self._begin_seconds = time.perf_counter() - start

            def on_train_batch_end(batch: int, logs: Any = None) -> None:
                start = time.perf_counter()
                end(batch, logs)
                self.seconds.append(self._begin_seconds + time.perf_counter() - start)

            callbacks.on_train_batch_begin, callbacks.on_train_batch_end = on_train_batch_begin, on_train_batch_end
            return callbacks

        session.resuming_list = timed  # type: ignore[assignment]


def build() -> Any:
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    return model


def train(workers: int, epochs: int, callbacks: list[Any], on_event: Any = None) -> None:
    x = np.random.default_rng(0).normal(size=(ROWS, 4)).astype(np.float32)
    with tempfile.TemporaryDirectory() as storage:
        rk.fit(
            build,
            x,
            x[:, :1],
            batch_size=BATCH,
            epochs=epochs,
            callbacks=callbacks,
            scale=rk.Scale(workers=workers),
            run=rk.Run(storage=storage, checkpoint_every=None),
            on_event=on_event,
            verbose=0,
        )


def main() -> None:
    parser = side_by_side.parser(__doc__)
    arguments = parser.parse_args()
    measured: dict[str, Any] = {"hooks_us": {}}
    rows = []
    for workers, epochs in ((1, 10), (2, 5)):
        seconds: list[float] = []
        for _ in range(arguments.rounds):
            times = HookTimes()
            train(workers, epochs, [times])
            seconds += times.seconds[STEPS:]  # without the first epoch
        us = np.array(seconds) * 1e6
        measured["hooks_us"][workers] = {"mean": us.mean(), "median": np.median(us), "p99": np.percentile(us, 99)}
        rows.append((workers, len(us), f"{us.mean():.0f}", f"{np.median(us):.0f}", f"{np.percentile(us, 99):.0f}"))
    print(side_by_side.table(("workers", "steps", "hooks per step, µs (mean)", "(median)", "(p99)"), rows))

    latencies: list[float] = []
    train(4, 6, [], lambda event: latencies.append(1e3 * (time.time() - event.time)))
    ms = np.array(latencies[1:])
    measured["latency_ms"] = {"median": np.median(ms), "p99": np.percentile(ms, 99), "events": len(ms)}
    print(f"\n{len(ms)} events of four workers: {np.median(ms):.0f} ms (median), {np.percentile(ms, 99):.0f} ms (p99)")
    side_by_side.write(arguments.json, measured)


if __name__ == "__main__":
    main()
