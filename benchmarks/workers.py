"""Two workers: how soon a call makes its first step, and how soon a run goes on after it has lost a worker.

python -m benchmarks.workers [calls lost]

calls   the first call of a program, which starts the workers, and the calls after it, which find them up
lost    from the SIGKILL of a worker until the end of the next step, without and with spares
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import raykeras as rk
from benchmarks import side_by_side

ROWS, BATCH = 2_000, 64
STEP_S, STEPS_BEFORE_LOSS = 0.1, 600  # the loss comes a minute after the first step
CALLS = ("the first call", "the second call", "the third call", "evaluate after them")


def build() -> Any:
    import keras

    inputs = keras.Input((784,), dtype="uint8")
    x = keras.layers.Dense(64, "relu")(keras.layers.Rescaling(1 / 255)(inputs))
    model = keras.Model(inputs, keras.layers.Dense(10, "softmax")(x))
    model.compile("rmsprop", "sparse_categorical_crossentropy")
    return model


def data() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (ROWS, 784), np.uint8), rng.integers(0, 10, ROWS)


def killer(folder: str) -> Any:
    """Return a callback that kills rank 1 once, and writes the time to a file."""
    import keras

    class Killer(keras.callbacks.Callback):
        def __init__(self) -> None:
            super().__init__()
            self.steps = 0

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            import ray.train

            time.sleep(STEP_S)
            self.steps += 1
            killed = Path(folder, "killed")
            is_chosen = ray.train.get_context().get_world_rank() == 1
            if is_chosen and self.steps == STEPS_BEFORE_LOSS and not killed.exists():
                killed.write_text(str(time.time()))
                os.kill(os.getpid(), 9)

    return Killer()


def first_steps(folder: str) -> list[float]:
    """Return the seconds from each of three calls of `fit` to the end of its first step, and those of an `evaluate`."""
    x, y = data()
    seconds = []
    for number in range(3):
        steps: list[float] = []

        def see(event: rk.Event, steps: list[float] = steps) -> None:
            if isinstance(event, rk.BatchEnded):
                steps.append(time.time())

        called, run = time.time(), rk.Run(storage=folder, name=str(number))
        rk.fit(build, x, y, batch_size=BATCH, verbose=0, scale=rk.Scale(workers=2), run=run, on_event=see)
        seconds.append(steps[0] - called)
    called = time.time()
    rk.evaluate(build, x, y, verbose=0, scale=rk.Scale(workers=2))
    return [*seconds, time.time() - called]


def lost_seconds(folder: str, spares: bool) -> float:
    """Return the seconds from the loss of a worker to the end of the next step."""
    x, y = data()
    steps: list[float] = []

    def see(event: rk.Event) -> None:
        if isinstance(event, rk.BatchEnded):
            steps.append(time.time())
        elif isinstance(event, rk.WorkerFailed):
            steps.clear()

    scale, run = rk.Scale(workers=2, spares=spares), rk.Run(storage=folder, checkpoint_every=100)
    epochs = -(-STEPS_BEFORE_LOSS * BATCH // ROWS) + 1
    rk.fit(
        build, x, y, batch_size=BATCH, epochs=epochs, verbose=0, callbacks=[killer(folder)],
        scale=scale, run=run, on_event=see,
    )  # fmt: skip
    return steps[0] - float(Path(folder, "killed").read_text())


def measured(call: str) -> Any:
    """Return what a call of this module returns in a process of its own, with a folder for FOLDER."""
    code = f"import json; from benchmarks import workers; print(json.dumps(workers.{call}))"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", code.replace("FOLDER", repr(folder))]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = side_by_side.parser(__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help="both by default")
    arguments = parser.parse_args()
    figures: dict[str, list[float]] = {}
    cases = arguments.cases or ["calls", "lost"]
    if "calls" in cases:
        rounds = [measured("first_steps(FOLDER)") for _ in range(arguments.rounds)]
        figures |= {name: list(values) for name, values in zip(CALLS, zip(*rounds, strict=True), strict=True)}
    if "lost" in cases:
        contenders = {
            f"a lost worker, {name}": functools.partial(measured, f"lost_seconds(FOLDER, {spares})")
            for name, spares in (("without spares", False), ("with spares", True))
        }
        figures |= side_by_side.alternate(contenders, arguments.rounds)
    rows = [
        (name, f"{statistics.median(values):.1f}", f"{min(values):.1f}–{max(values):.1f}")
        for name, values in figures.items()
    ]
    print(side_by_side.table(("two workers", "s", "range"), rows), flush=True)
    side_by_side.write(arguments.json, figures)


if __name__ == "__main__":
    main()
