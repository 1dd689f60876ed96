"""Driver callbacks that end training after an epoch: all workers stop there, and the run can be resumed if it must."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import keras
import pytest

import raykeras as rk
from tests.support.models import SCORE, TWO, X

EPOCHS = 4
SCALES = pytest.mark.parametrize("scale", [rk.Scale(), TWO], ids=["one worker", "two workers"])

pytestmark = pytest.mark.usefixtures("two_workers")


class Pruned(Exception):
    pass


class EndAfter(rk.DriverCallback):
    """Stops training after an epoch, or raises an exception."""

    def __init__(self, storage: Path, epoch: int, error: BaseException | None = None) -> None:
        self.storage, self.epoch, self.error = storage, epoch, error
        self.asked: list[tuple[int, float]] = []
        self.saved: list[list[str]] = []

    def should_stop(self, epoch: int, logs: Any) -> bool:
        self.asked.append((epoch, logs["loss"]))
        self.saved.append(sorted(os.listdir(self.storage / "run" / "checkpoints")))
        if epoch == self.epoch and self.error is not None:
            raise self.error
        return epoch == self.epoch


def build() -> Any:
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(1)])
    model.compile(keras.optimizers.Adam(0.01), "mse")
    return model


@functools.cache
def plain_losses() -> list[float]:
    keras.utils.set_random_seed(0)
    history = build().fit(X, SCORE, epochs=EPOCHS, shuffle=False, verbose=0)
    return history.history["loss"]  # type: ignore[no-any-return]


def fit(storage: Path, scale: rk.Scale, *callbacks: Any) -> list[float]:
    run = rk.Run(storage=str(storage), name="run", keep=EPOCHS)
    options = {"epochs": EPOCHS, "shuffle": False, "verbose": 0}
    return rk.fit(build, X, SCORE, callbacks=list(callbacks), scale=scale, run=run, **options).history["loss"]


@SCALES
def test_run_stops_after_the_epoch(scale: rk.Scale, tmp_path: Path) -> None:
    callback = EndAfter(tmp_path, 1)
    losses = fit(tmp_path, scale, callback)
    assert losses == pytest.approx(plain_losses()[:2])
    assert callback.asked == list(enumerate(losses))
    assert callback.saved == [["epoch-000001"], ["epoch-000001", "epoch-000002"]]
    (info,) = rk.runs(str(tmp_path))
    assert (info.status, info.epochs) == ("completed", 2)
    assert fit(tmp_path, scale) == losses  # a stopped run has no epoch left


@SCALES
def test_interrupted_run_is_resumed(scale: rk.Scale, tmp_path: Path) -> None:
    error = Pruned("loss is too high")
    with pytest.raises(Pruned) as raised:
        fit(tmp_path, scale, EndAfter(tmp_path, 1, error))
    assert raised.value is error
    (info,) = rk.runs(str(tmp_path))
    assert (info.status, info.epochs) == ("interrupted", 2)
    callback = EndAfter(tmp_path, EPOCHS - 1, error)
    with pytest.raises(Pruned):  # after the last epoch, the run is complete
        fit(tmp_path, scale, callback)
    assert [epoch for epoch, _ in callback.asked] == [2, 3]
    assert rk.runs(str(tmp_path))[0].status == "completed"
    assert rk.open_run(str(tmp_path / "run")).history["loss"] == pytest.approx(plain_losses())
