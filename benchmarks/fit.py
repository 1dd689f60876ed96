"""An epoch of `rk.fit` from Parquet beside one of plain `model.fit` on arrays in memory.

    python -m benchmarks.fit

The guide's MNIST model (two layers of 64, batches of 64, 50,000 images of 784 bytes, 10,000 to validate with), trained
side by side: plain; streamed from Parquet, whose images are lists of numbers, or bytes; and from Parquet that is held
in memory. Each is a process of its own, and they take turns: while one validates and trains for an epoch, the others
and their Rays are stopped, as a machine's speed changes within seconds, and a Ray that idles slows plain Keras too.
Prints, of the second half of the epochs, since processes of Ray's still start in the first, the seconds of an epoch's
training (median), the median of its ratios to plain Keras' epoch of the same turn, with the quartiles of these, the
part of them spent waiting for data, the time of a step, the pause between epochs, from the end of validation until
Keras begins the next epoch's first step, in steps, and the time of that step, in steps. With `steps_per_execution` a
step is an execution.
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
"""By steps of an execution."""
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
    """A callback that ends a turn before each validation, and keeps how long epochs, steps and pauses were."""
    import keras

    class Clock(keras.callbacks.Callback):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.epochs: list[float] = []
            self.steps: list[float] = []
            self.pauses: list[float] = []
            self.firsts: list[float] = []
            self._validated = self._began = self._stepped = 0.0

        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            self._began = self._stepped = time.perf_counter()

        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            if self._validated:
                self._stepped = time.perf_counter()
                self.pauses.append(self._stepped - self._validated)

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            now = time.perf_counter()
            if self._validated:
                self.firsts.append(now - self._stepped)
                self._validated = 0.0
            elif self.epochs:
                self.steps.append(now - self._stepped)
            self._last = self._stepped = now

        def on_test_begin(self, logs: Any = None) -> None:
            turn()

        def on_test_end(self, logs: Any = None) -> None:
            self._validated = time.perf_counter()
            self.epochs.append(self._last - self._began)

    return Clock()


@dataclass(frozen=True)
class Training:
    """Of the second half of a training's epochs.

    Attributes:
        epochs: Seconds of each.
        wait, step, pause, first: See the module; the last three in seconds.
    """

    epochs: list[float]
    wait: float
    step: float
    pause: float
    first: float


def trained(fit: Callable[[Any, list[Any], int], list[Any]], steps_per_execution: int, turn: Turn) -> Training:
    timed = clock(turn)
    seen = fit(functools.partial(build, steps_per_execution), [timed], EPOCHS[steps_per_execution])
    waits = [event.data_wait for event in seen if isinstance(event, rk.events.EpochEnded)] or [0.0]
    wait, step, pause, first = (
        statistics.median(_second_half(each)) for each in (waits, timed.steps, timed.pauses, timed.firsts)
    )
    return Training(_second_half(timed.epochs), wait, step, pause, first)


def _second_half(values: Sequence[float]) -> list[float]:
    return list(values[len(values) // 2 :])


def plain(build: Any, callbacks: list[Any], epochs: int) -> list[Any]:
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
    seen: list[Any] = []
    options = {"x": "x", "y": "y", "cache": cache, "transform": transform}
    source, held_out = (rk.parquet(str(folder / name), **options) for name in ("train", "validate"))
    with tempfile.TemporaryDirectory() as storage:
        rk.fit(
            build,
            source,
            batch_size=BATCH,
            epochs=epochs,
            validation_data=held_out,
            callbacks=callbacks,
            verbose=0,
            run=rk.Run(storage=storage, checkpoint_every=checkpoints),
            on_event=seen.append,
        )
    return seen


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
            "Parquet, held in memory": functools.partial(from_parquet, lists, cache="memory"),
            "the same, a checkpoint each epoch": functools.partial(
                from_parquet, lists, cache="memory", checkpoints="epoch"
            ),
        }
        results: dict[str, list[Training]] = {}
        for _ in range(arguments.rounds):
            for steps in EPOCHS:
                made = {f"{kind}|{steps}": functools.partial(trained, fit, steps) for kind, fit in kinds.items()}
                for name, training in side_by_side.by_turns(made).items():
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
    for name, each in results.items():
        kind, executed = name.split("|")
        epochs, base = (
            [seconds for one in trainings for seconds in one.epochs]
            for trainings in (each, results[f"{next(iter(kinds))}|{executed}"])
        )
        low, ratio, high = statistics.quantiles([a / b for a, b in zip(epochs, base, strict=True)])
        wait, step, pause, first = (
            statistics.median(getattr(one, key) for one in each) for key in ("wait", "step", "pause", "first")
        )
        is_plain = kind == next(iter(kinds))
        rows.append(
            (
                kind,
                executed,
                f"{statistics.median(epochs):.2f}",
                "1" if is_plain else f"{ratio:.2f} ({low:.2f}–{high:.2f})",
                "" if is_plain else f"{wait:.1%}",
                f"{1e3 * step:.2f}",
                f"{pause / step:.1f}",
                f"{first / step:.1f}",
            )
        )
    print(side_by_side.table(header, rows))
    side_by_side.write(arguments.json, {name: [asdict(one) for one in each] for name, each in results.items()})


if __name__ == "__main__":
    from benchmarks import fit  # by whose name other processes find what is sent to them

    fit.main()
