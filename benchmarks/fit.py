"""The time per epoch of `rk.fit` from Parquet, compared with plain `Model.fit` on arrays in memory.

    python -m benchmarks.fit

Trains the guide's MNIST model (two layers of 64, batches of 64, 50,000 images of 784 bytes, 10,000 for validation) with
plain Keras; streamed from Parquet, with images as lists of numbers and as bytes; and cached from Parquet. Every
contender is a process, and they take turns: while one validates and trains for an epoch, the other processes and their
Ray clusters are stopped, because the speed of a machine changes within seconds and an idle Ray slows plain Keras down.

The figures are from the second half of the epochs, since Ray still starts processes in the first:

    epoch             training time of an epoch (median)
    ÷ plain           ratio to the epoch of plain Keras in the same turn (median and quartiles)
    waiting for data  share of the training time in which steps wait for data
    step              time of a step; with `steps_per_execution`, of an execution
    pause             time from the end of validation to the first step of the next epoch, in steps
    first step        time of that step, in steps
"""

from __future__ import annotations

import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import raykeras as rk
from benchmarks import side_by_side
from benchmarks.side_by_side import Turn

TRAIN, VALIDATE, BATCH = 50_000, 10_000, 64
EPOCHS = {1: 16, 16: 48}
"""Number of epochs, by steps per execution."""
RNG = np.random.default_rng(0)
X = RNG.integers(0, 256, (TRAIN + VALIDATE, 784), np.uint8)
Y = RNG.integers(0, 10, TRAIN + VALIDATE)


def build(steps_per_execution: int) -> Any:
    import keras

    inputs = keras.Input((784,), name="digits", dtype="uint8")
    x = keras.layers.Rescaling(1 / 255)(inputs)
    x = keras.layers.Dense(64, "relu")(keras.layers.Dense(64, "relu")(x))
    model = keras.Model(inputs, keras.layers.Dense(10, "softmax", name="predictions")(x))
    loss, metrics = "sparse_categorical_crossentropy", ["sparse_categorical_accuracy"]
    model.compile("rmsprop", loss, metrics=metrics, steps_per_execution=steps_per_execution)
    return model


def clock(turn: Turn) -> Any:
    """Return a callback that ends a turn before each validation, and records the times of epochs, steps and pauses."""
    import keras

    class Clock(keras.callbacks.Callback):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.epochs: list[float] = []
            self.steps: list[float] = []
            self.pauses: list[float] = []
            self.first_steps: list[float] = []
            self._validation_end = self._epoch_start = self._step_start = 0.0

        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            self._epoch_start = self._step_start = time.perf_counter()

        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            if self._validation_end:
                self._step_start = time.perf_counter()
                self.pauses.append(self._step_start - self._validation_end)

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            now = time.perf_counter()
            if self._validation_end:
                self.first_steps.append(now - self._step_start)
                self._validation_end = 0.0
            elif self.epochs:
                self.steps.append(now - self._step_start)
            self._last = self._step_start = now

        def on_test_begin(self, logs: Any = None) -> None:
            turn()

        def on_test_end(self, logs: Any = None) -> None:
            self._validation_end = time.perf_counter()
            self.epochs.append(self._last - self._epoch_start)

    return Clock()


@dataclass(frozen=True)
class Training:
    """The figures of the second half of the epochs.

    Attributes:
        epochs: Training time of each epoch in seconds.
        wait: Share of the time in which steps wait for data, 0 to 1.
        step, pause, first: See the module's docstring; in seconds.
    """

    epochs: list[float]
    wait: float
    step: float
    pause: float
    first: float


def train(fit: Callable[[Any, list[Any], int], list[Any]], steps_per_execution: int, turn: Turn) -> Training:
    """Train with a contender's `fit`, by turns."""
    times = clock(turn)
    events = fit(functools.partial(build, steps_per_execution), [times], EPOCHS[steps_per_execution])
    waits = [event.data_wait for event in events if isinstance(event, rk.EpochEnded)] or [0.0]
    wait, step, pause, first = (
        statistics.median(_second_half(values)) for values in (waits, times.steps, times.pauses, times.first_steps)
    )
    return Training(_second_half(times.epochs), wait, step, pause, first)


def _second_half(values: Sequence[float]) -> list[float]:
    return list(values[len(values) // 2 :])


def plain(build: Any, callbacks: list[Any], epochs: int) -> list[Any]:
    """Train with plain Keras; return no events."""
    validation = (X[TRAIN:], Y[TRAIN:])
    build().fit(
        X[:TRAIN],
        Y[:TRAIN],
        batch_size=BATCH,
        epochs=epochs,
        validation_data=validation,
        callbacks=callbacks,
        verbose=0,
    )
    return []


def pixels(columns: dict[str, Any]) -> dict[str, Any]:
    """View images of bytes as a `(rows, 784)` uint8 array."""
    return {**columns, "x": np.frombuffer(b"".join(columns["x"]), np.uint8).reshape(-1, 784)}


def from_parquet(
    folder: Path,
    build: Any,
    callbacks: list[Any],
    epochs: int,
    *,
    cache: Any = None,
    transform: Any = None,
    checkpoints: Any = None,
) -> list[Any]:
    """Train with raykeras from Parquet; return the events."""
    events: list[Any] = []
    options = {"x": "x", "y": "y", "cache": cache, "transform": transform}
    source, validation = (rk.parquet(str(folder / name), **options) for name in ("train", "validate"))
    with tempfile.TemporaryDirectory() as storage:
        rk.fit(
            build,
            source,
            batch_size=BATCH,
            epochs=epochs,
            validation_data=validation,
            callbacks=callbacks,
            verbose=0,
            run=rk.Run(storage=storage, checkpoint_every=checkpoints),
            on_event=events.append,
        )
    return events


def generate(folder: Path) -> None:
    for name, rows in (("train", slice(0, TRAIN)), ("validate", slice(TRAIN, None))):
        images = {
            "lists": pa.FixedSizeListArray.from_arrays(pa.array(X[rows].reshape(-1)), 784),
            "bytes": pa.array([image.tobytes() for image in X[rows]], pa.binary(784)),
        }
        for kind, image in images.items():
            (folder / kind / name).mkdir(parents=True)
            table = pa.table({"x": image, "y": Y[rows]})
            pq.write_table(table, folder / kind / name / "0.parquet", row_group_size=2_000)


def main() -> None:
    parser = side_by_side.parser(__doc__)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        generate(folder)
        lists = folder / "lists"
        kinds: dict[str, Callable[[Any, list[Any], int], list[Any]]] = {
            "plain `model.fit`, in memory": plain,
            "Parquet of lists, streamed": functools.partial(from_parquet, lists),
            "Parquet of bytes, streamed": functools.partial(from_parquet, folder / "bytes", transform=pixels),
            "Parquet, cached": functools.partial(from_parquet, lists, cache="memory"),
            "Parquet, cached, a checkpoint each epoch": functools.partial(
                from_parquet, lists, cache="memory", checkpoints="epoch"
            ),
        }
        results: dict[str, list[Training]] = {}
        for _ in range(arguments.rounds):
            for steps in EPOCHS:
                contenders = {f"{kind}|{steps}": functools.partial(train, fit, steps) for kind, fit in kinds.items()}
                for name, training in side_by_side.by_turns(contenders).items():
                    results.setdefault(name, []).append(training)
    header = (
        "",
        "steps_per_execution",
        "epoch, s",
        "÷ plain (quartiles)",
        "waiting for data",
        "step, ms",
        "pause, steps",
        "first step, in steps",
    )
    rows = []
    for name, trainings in results.items():
        kind, steps_per_execution = name.split("|")
        epochs, plain_epochs = (
            [seconds for training in group for seconds in training.epochs]
            for group in (trainings, results[f"{next(iter(kinds))}|{steps_per_execution}"])
        )
        low, ratio, high = statistics.quantiles([a / b for a, b in zip(epochs, plain_epochs, strict=True)])
        wait, step, pause, first = (
            statistics.median(getattr(training, key) for training in trainings)
            for key in ("wait", "step", "pause", "first")
        )
        is_plain = kind == next(iter(kinds))
        rows.append(
            (
                kind,
                steps_per_execution,
                f"{statistics.median(epochs):.2f}",
                "1" if is_plain else f"{ratio:.2f} ({low:.2f}–{high:.2f})",
                "" if is_plain else f"{wait:.1%}",
                f"{1e3 * step:.2f}",
                f"{pause / step:.1f}",
                f"{first / step:.1f}",
            )
        )
    print(side_by_side.table(header, rows))
    side_by_side.write(
        arguments.json, {name: [asdict(training) for training in trainings] for name, trainings in results.items()}
    )


if __name__ == "__main__":
    from benchmarks import fit  # so that other processes unpickle functions from this module, not `__main__`

    fit.main()
