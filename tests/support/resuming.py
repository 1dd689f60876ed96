"""A run that is killed at given points and resumed.

    python -m tests.support.resuming PLAN.json

calls `train` with the arguments in the file.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import raykeras as rk
from tests.support.compare import assert_same_weights

ROWS, BATCH, EPOCHS = 75, 16, 4  # five steps per epoch; the last batch is short
_RNG = np.random.default_rng(0)
X = _RNG.normal(size=(ROWS, 8)).astype(np.float32)
Y = _RNG.integers(0, 3, ROWS)
WEIGHT = _RNG.uniform(0.5, 2, ROWS).astype(np.float32)
VALIDATION = (X[:21] + 0.1, Y[:21])

POINTS = ("step 0 0", "step 1 2", "step 1 4", "test 1", "write", "begin 2", "end 2", "step 3 1")
"""Where to kill a process: at the first step, mid-epoch, at the last step, during validation, while a checkpoint is
written, between epochs, mid-epoch."""


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
    """Return a user-defined callback that records the calls of its hooks."""
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
    """Return callbacks whose state steers training."""
    import importlib

    callbacks = importlib.import_module(package).callbacks
    return [
        callbacks.EarlyStopping("val_loss", patience=2, min_delta=0.5, start_from_epoch=1, restore_best_weights=True),
        callbacks.ReduceLROnPlateau("loss", patience=1, min_delta=0.2, factor=0.5, cooldown=1),
    ]


def killer(points: Sequence[str], folder: str, rank: int | None = None) -> Any:
    """Return a callback that kills its process at the next point of a list.

    Args:
        points: See `POINTS`.
        folder: Folder in which a file is created for each point that was reached.
        rank: Rank of the worker to kill; None for the driver's process.
    """

    def kill(point: str) -> None:
        if rank is None:
            _wait_for_starts(folder, 1 + sum(Path(folder, p).exists() for p in points))
        if rank in (None, _rank()):
            Path(folder, point).touch()
            os.kill(os.getpid(), signal.SIGKILL)

    return _at_points(kill, lambda: next((p for p in points if not Path(folder, p).exists()), None))


def _wait_for_starts(folder: str, num_starts: int) -> None:
    """Wait until the run's event log, which a thread writes, contains a number of starts."""
    deadline, log = time.monotonic() + 60, Path(folder, "run", "events.jsonl")
    while log.read_text().count('"RunStarted"') < num_starts:
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.01)


def loser(points: Sequence[str], folder: str) -> Any:
    """Return a callback that makes all workers fail at the next point of a list, as if one worker had been lost.

    Args:
        points: See `POINTS`; all but "write".
        folder: Folder in which a file is created for each point and rank.
    """

    def lose(point: str) -> None:
        Path(folder, f"{point} on {_rank()}").touch()
        raise rk.WorkerLostError(f"The worker of rank 1 was lost at {point!r}.")

    return _at_points(lose, lambda: next((p for p in points if not Path(folder, f"{p} on {_rank()}").exists()), None))


def _rank() -> int:
    import ray.train

    return int(ray.train.get_context().get_world_rank())


def _at_points(act: Callable[[str], None], next_point: Callable[[], str | None]) -> Any:
    import keras

    class AtPoints(keras.callbacks.Callback):  # type: ignore[misc]
        def on_train_begin(self, logs: Any = None) -> None:
            if next_point() == "write":
                _act_while_writing(lambda: act("write"))

        def _reach(self, point: str) -> None:
            if point == next_point():
                act(point)

        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            self.epoch = epoch
            self._reach(f"begin {epoch}")

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            self._reach(f"step {self.epoch} {batch}")

        def on_test_batch_end(self, batch: int, logs: Any = None) -> None:
            self._reach(f"test {self.epoch}")

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            self._reach(f"end {epoch}")

    return AtPoints()


def _act_while_writing(act: Callable[[], None]) -> None:
    """Call `act` while this process writes its second checkpoint, when half of the model file is written."""
    from raykeras.checkpoint import store

    write_state, folders = store.write_state, []

    def truncate_and_act(folder: str, *args: Any) -> None:
        folders.append(folder)
        if len(folders) > 1:
            path = Path(folder, store.MODEL_FILE)
            os.truncate(path, path.stat().st_size // 2)
            act()
        write_state(folder, *args)

    store.write_state = truncate_and_act


def fit(storage: str, name: str, callbacks: Sequence[Any] = (), **options: Any) -> rk.Result:
    """Train the same model on the same data in every process."""
    run = rk.Run(storage=storage, name=name, **{"checkpoint_every": 2, **options.pop("run", {})})
    dropout = options.pop("dropout", 0.3)
    options = {"epochs": EPOCHS, "validation_data": VALIDATION, "sample_weight": WEIGHT, "verbose": 0, **options}
    return rk.fit(lambda: build(dropout=dropout), X, Y, batch_size=BATCH, callbacks=[*callbacks], run=run, **options)


def events_of(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path, "events.jsonl").read_text().splitlines()]


def assert_same(result: rk.Result, expected: rk.Result, rtol: float = 1e-6) -> None:
    """Assert that two runs have the same history and weights."""
    assert result.epoch == expected.epoch
    assert set(result.history) == set(expected.history)
    for name, values in expected.history.items():
        np.testing.assert_allclose(result.history[name], values, rtol=rtol, atol=1e-8, err_msg=name)
    assert_same_weights(result.model(), expected.model(), rtol=rtol, atol=rtol)


def slow(step_s: float, only_epoch: int | None = None) -> Any:
    """Return a callback that pauses after each step of every epoch, or of one epoch."""
    import keras

    class Slow(keras.callbacks.Callback):  # type: ignore[misc]
        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            self.epoch = epoch

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            if only_epoch in (None, self.epoch):
                time.sleep(step_s)

    return Slow()


class DriverKiller(rk.DriverCallback):
    """Kills the driver after a checkpoint was saved in the middle of an epoch."""

    def __init__(self, epoch: int) -> None:
        self._epoch = epoch

    def on_event(self, event: rk.Event) -> None:
        if isinstance(event, rk.CheckpointSaved) and event.epoch == self._epoch and event.step:
            os.kill(os.getpid(), signal.SIGKILL)


def train(
    storage: str,
    *,
    points: Sequence[str] = (),
    workers: int = 1,
    driver_epoch: int | None = None,
    dropout: float = 0.3,
) -> None:
    """Train the run "run" in this process until it is killed.

    Args:
        storage: Storage of the run, and folder of the files for the points.
        points: Points at which this process, the only worker, is killed; see `POINTS`.
        workers: Number of workers.
        driver_epoch: Epoch in which this process, the driver of several workers, is killed.
        dropout: Rate of the model's Dropout layer; 0 for no such layer.
    """
    callbacks: list[Any] = [recorder(), *steering()]
    if points:
        callbacks.append(killer(points, storage))
    if driver_epoch is not None:
        # workers outlive their driver by two seconds, in which they must not finish the epoch
        callbacks += [slow(1.5, driver_epoch), DriverKiller(driver_epoch)]
    fit(storage, "run", callbacks, scale=rk.Scale(workers=workers), dropout=dropout)


if __name__ == "__main__":
    train(**json.loads(Path(sys.argv[1]).read_text()))
