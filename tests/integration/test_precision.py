"""Mixed precision on several replicas gives what one replica gives.

Rows and weights of `benchmarks.exactness.integers` are such that no sum over rows is rounded, so nothing may differ.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import raykeras as rk
from benchmarks.exactness import Case, compare

PRECISIONS = ("mixed_bfloat16", "mixed_float16")
BATCH = 8


def assert_equal(case: Case, folder: Path) -> None:
    difference = compare(case, folder)
    assert (difference.history, difference.weights) == (0.0, 0.0)


@pytest.mark.usefixtures("tensorflow")
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("package", ["keras", "tf_keras"])
def test_two_replicas_match_keras(package: str, precision: str, tmp_path: Path) -> None:
    assert_equal(Case(1, 2, package, 17, precision=precision), tmp_path)


@pytest.mark.usefixtures("two_workers")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_two_workers_match_keras(precision: str, tmp_path: Path) -> None:
    assert_equal(Case(2, 1, "keras", 17, precision=precision), tmp_path)


@pytest.mark.usefixtures("tensorflow")
@pytest.mark.parametrize("package", ["keras", "tf_keras"])
def test_step_is_skipped_if_gradients_of_one_replica_overflow(package: str, tmp_path: Path) -> None:
    keras = importlib.import_module(package)
    x, y = np.ones((4 * BATCH, 1), np.float32), np.full((4 * BATCH, 1), 4.0, np.float32)
    x[2 * BATCH - 1] = 1000.0  # the last row of the second batch, which is one of the second replica's

    def build() -> Any:
        linear = keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros", dtype="mixed_float16")
        output = keras.layers.Activation("linear", dtype="float32")
        model = keras.Sequential([keras.Input((1,)), linear, output])
        scaled = keras.optimizers if package == "keras" else keras.mixed_precision
        optimizer = scaled.LossScaleOptimizer(keras.optimizers.SGD(0.125), initial_scale=2.0**10)
        model.compile(optimizer, "mse")
        return model

    build.uses = package  # type: ignore[attr-defined]
    plain = build()
    plain.fit(x, y, batch_size=BATCH, shuffle=False, verbose=0)
    final_scale = plain.optimizer.dynamic_scale if package == "keras" else plain.optimizer.loss_scale
    assert float(final_scale) < 2.0**10  # the step was skipped
    run = rk.Run(storage=str(tmp_path), name="run")
    scale = rk.Scale(replicas_per_worker=2)
    result = rk.fit(build, x, y, batch_size=BATCH, shuffle=False, verbose=0, scale=scale, run=run)
    weights = result.model().get_weights()
    np.testing.assert_array_equal(weights[0], plain.get_weights()[0])
    assert np.isfinite(weights[0]).all()
