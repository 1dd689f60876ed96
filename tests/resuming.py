"""A training to be killed: in a process of its own, by itself, at a point.

    python -m tests.resuming PLAN.json

The process trains as the plan says, and at the plan's next point it, or one of its workers, ends with SIGKILL, once
for each point.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import raykeras as rk

ROWS, BATCH, EPOCHS = 75, 16, 4  # five steps, the last one short
_RNG = np.random.default_rng(0)
X = _RNG.normal(size=(ROWS, 8)).astype(np.float32)
Y = _RNG.integers(0, 3, ROWS)
WEIGHT = _RNG.uniform(0.5, 2, ROWS).astype(np.float32)
VALIDATION = (X[:21] + 0.1, Y[:21])

POINTS = ("step 0 0", "step 1 2", "step 1 4", "test 1", "write", "begin 2", "end 2", "step 3 1")
"""First step, mid-epoch, last step, in validation, in a checkpoint's writing, between epochs on either side."""


def build(package: str = "keras", *, dropout: float = 0.3, steps_per_execution: int = 1) -> Any:
    import importlib

    keras = importlib.import_module(package)
    layers = [keras.layers.Input((8,)), keras.layers.Dense(16, activation="relu")]
    layers += [keras.layers.Dropout(dropout)] if dropout else []
    model = keras.Sequential([*layers, keras.layers.Dense(3, activation="softmax")])
    model.compile(
        keras.optimizers.Adam(0.02),
        "sparse_categorical_crossentropy",
        metrics=["accuracy"],
        weighted_metrics=[keras.metrics.SparseCategoricalCrossentropy(name="weighted")],
        steps_per_execution=steps_per_execution,
    )
    return model


def recorder(package: str = "keras") -> Any:
    """A callback of a user's own, that keeps what its hooks were called with."""
    import importlib

    class Recorder(importlib.import_module(package).callbacks.Callback):  # type: ignore[misc]
        def on_train_begin(self, logs: Any = None) -> None:
            self.calls: list[Any] = []

        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            self.calls.append(("begin", epoch))

        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            self.calls.append(("batch", batch))

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            self.calls.append((batch, float(logs["loss"]), float(logs["accuracy"])))

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            self.calls.append(("end", epoch, sorted(logs)))

    return Recorder()


def steering(package: str = "keras") -> list[Any]:
    """Callbacks whose state decides how training goes on."""
    import importlib

    callbacks = importlib.import_module(package).callbacks
    return [
        callbacks.EarlyStopping("val_loss", patience=2, min_delta=0.5, start_from_epoch=1, restore_best_weights=True),
        callbacks.ReduceLROnPlateau("loss", patience=1, min_delta=0.2, factor=0.5, cooldown=1),
    ]


def killer(points: Sequence[str], folder: str, rank: int | None = None) -> Any:
    """A callback that kills its process at the first of the points that has not killed one yet.

    Args:
        points: See `POINTS`.
        folder: Where it is noted which were come to.
        rank: The worker that is killed; None for the only one.
    """
    import keras

    class Killer(keras.callbacks.Callback):  # type: ignore[misc]
        def on_train_begin(self, logs: Any = None) -> None:
            if self._next == "write" and self._is_mine:
                _kill_while_writing(lambda: self._hit("write"))

        @property
        def _next(self) -> str | None:
            return next((point for point in points if not os.path.exists(f"{folder}/{point}")), None)

        @property
        def _is_mine(self) -> bool:
            if rank is None:
                return True
            import ray.train

            return bool(ray.train.get_context().get_world_rank() == rank)

        def _hit(self, point: str) -> None:
            if point == self._next and self._is_mine:
                Path(folder, point).touch()
                os.kill(os.getpid(), signal.SIGKILL)

        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            self._epoch = epoch
            self._hit(f"begin {epoch}")

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            self._hit(f"step {self._epoch} {batch}")

        def on_test_batch_end(self, batch: int, logs: Any = None) -> None:
            self._hit(f"test {self._epoch}")

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            self._hit(f"end {epoch}")

    return Killer()


def _kill_while_writing(kill: Any) -> None:
    """Has the next checkpoint but one cut off when half of it is there."""
    from raykeras import checkpoint

    write_state, written = checkpoint.write_state, []

    def cut_off(folder: str, *args: Any) -> None:
        written.append(folder)
        if len(written) > 1:
            path = Path(folder, checkpoint.MODEL_FILE)
            os.truncate(path, path.stat().st_size // 2)
            kill()
        write_state(folder, *args)

    checkpoint.write_state = cut_off


def fit(storage: str, name: str, callbacks: Sequence[Any] = (), **options: Any) -> rk.Result:
    """The training itself; the same in every process."""
    run = rk.Run(storage=storage, name=name, **{"checkpoint_every": 2, **options.pop("run", {})})
    dropout = options.pop("dropout", 0.3)
    given = {"epochs": EPOCHS, "validation_data": VALIDATION, "sample_weight": WEIGHT, "verbose": 0, **options}
    return rk.fit(lambda: build(dropout=dropout), X, Y, batch_size=BATCH, callbacks=list(callbacks), run=run, **given)


def events_of(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path, "events.jsonl").read_text().splitlines()]


def assert_same(result: rk.Result, expected: rk.Result, rtol: float = 1e-6) -> None:
    assert result.epoch == expected.epoch
    assert set(result.history) == set(expected.history)
    for name, values in expected.history.items():
        np.testing.assert_allclose(result.history[name], values, rtol=rtol, atol=1e-8, err_msg=name)
    pairs = zip(result.model().get_weights(), expected.model().get_weights(), strict=True)
    for ours, theirs in pairs:
        np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=rtol)


def slow(epoch: int) -> Any:
    """A callback that makes an epoch so slow that workers do not end it in the seconds that they outlive a driver."""
    import keras

    class Slow(keras.callbacks.Callback):  # type: ignore[misc]
        def on_epoch_begin(self, at: int, logs: Any = None) -> None:
            self.at = at

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            if self.at == epoch:
                time.sleep(1.5)

    return Slow()


class DriverKiller(rk.DriverCallback):
    """Kills the driver when a checkpoint was saved in the middle of an epoch."""

    def __init__(self, epoch: int) -> None:
        self._epoch = epoch

    def on_event(self, event: rk.events.Event) -> None:
        if isinstance(event, rk.events.CheckpointSaved) and event.epoch == self._epoch and event.step:
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    plan = json.loads(Path(sys.argv[1]).read_text())
    scale = rk.Scale(workers=plan.get("workers", 1))
    callbacks = [recorder(), *steering()] + ([killer(plan["points"], plan["folder"])] if plan["points"] else [])
    if "driver_epoch" in plan:
        callbacks += [slow(plan["driver_epoch"]), DriverKiller(plan["driver_epoch"])]
    fit(plan["storage"], plan["name"], callbacks, scale=scale, dropout=plan.get("dropout", 0.3))


if __name__ == "__main__":
    main()
