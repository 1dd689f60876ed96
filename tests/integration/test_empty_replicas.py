"""A last batch with fewer rows than replicas trains as in plain Keras."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import raykeras as rk
from tests.support.compare import assert_same_training
from tests.support.models import BATCH, CLASS, IMAGES, PACKAGES, SCORE, SERIES, WEIGHT, two_inputs

ROWS = BATCH + 1  # one row is left for the second batch, on two replicas
TWO_REPLICAS = rk.Scale(replicas_per_worker=2)


def metrics(module: Any) -> list[Any]:
    class Ones(module.metrics.Metric):  # type: ignore[name-defined, misc]
        """Counts rows, regardless of their weights."""

        def __init__(self, name: str = "ones") -> None:
            super().__init__(name=name)
            self.total = self.add_weight(name="total", initializer="zeros")

        def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
            self.total.assign_add(tf.cast(tf.reduce_sum(tf.ones_like(y_true[:, 0])), tf.float32))

        def result(self) -> Any:
            return tf.identity(self.total)

    return [[module.metrics.RootMeanSquaredError(), Ones()], [module.metrics.AUC(name="auc"), "categorical_accuracy"]]


@PACKAGES
@pytest.mark.parametrize("weights", [None, (WEIGHT[:ROWS], WEIGHT[-ROWS:])], ids=["", "weighted"])
def test_convolutions_match_keras(package: str, weights: Any, tmp_path: Path) -> None:
    build = two_inputs(package, metrics=metrics)
    x, y = [IMAGES[:ROWS], SERIES[:ROWS]], [SCORE[:ROWS], CLASS[:ROWS]]
    options: dict[str, Any] = {"batch_size": BATCH, "epochs": 2, "shuffle": False, "verbose": 0}
    options |= {"validation_data": (x, y), "sample_weight": None if weights is None else list(weights)}
    importlib.import_module(package).utils.set_random_seed(0)
    model = build()
    expected = model.fit(x, y, **options).history
    result = rk.fit(build, x, y, **options, scale=TWO_REPLICAS, run=rk.Run(storage=str(tmp_path)))
    assert_same_training(result, expected, model)


def normalizing(package: str, **options: Any) -> Callable[[], Any]:
    def build() -> Any:
        keras = importlib.import_module(package)
        layers = [keras.Input((4,)), keras.layers.Dense(5), keras.layers.BatchNormalization(**options)]
        model = keras.Sequential([*layers, keras.layers.Dense(1)])
        model.compile("sgd", "mse", metrics=["mae"])
        return model

    build.uses = package  # type: ignore[attr-defined]
    return build


X = np.random.default_rng(0).normal(3, 1, size=(ROWS, 4)).astype(np.float32)
OPTIONS: dict[str, Any] = {"batch_size": BATCH, "epochs": 3, "shuffle": False, "verbose": 0}


@PACKAGES
def test_statistics_of_batch_normalization_stay_finite(package: str, tmp_path: Path) -> None:
    x, y = X, SCORE[:ROWS]
    run = rk.Run(storage=str(tmp_path))
    result = rk.fit(normalizing(package), x, y, **OPTIONS, validation_data=(x, y), scale=TWO_REPLICAS, run=run)
    assert np.isfinite([value for values in result.history.values() for value in values]).all()
    for weights in result.model().get_weights():
        assert np.isfinite(weights).all()


def test_synchronized_batch_normalization_matches_keras(tmp_path: Path) -> None:
    build = normalizing("keras", synchronized=True)
    keras.utils.set_random_seed(0)
    model = build()
    expected = model.fit(X, SCORE[:ROWS], **OPTIONS).history
    result = rk.fit(build, X, SCORE[:ROWS], **OPTIONS, scale=TWO_REPLICAS, run=rk.Run(storage=str(tmp_path)))
    assert_same_training(result, expected, model)
