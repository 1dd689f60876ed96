"""Losses that come as one number weigh on several replicas as in plain Keras."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import raykeras as rk

ROWS, BATCH = 37, 8  # the last batch leaves one replica less than the other
RNG = np.random.default_rng(0)
X = RNG.normal(size=(ROWS, 4)).astype(np.float32)
Y = (X @ [[0.5], [1.0], [-1.0], [0.2]] + 0.1).astype(np.float32)
W = RNG.uniform(0.2, 2, ROWS).astype(np.float32)


def scalar_mean(y_true: Any, y_pred: Any) -> Any:
    return tf.reduce_mean(tf.square(y_true - y_pred))


def scalar_sum(y_true: Any, y_pred: Any) -> Any:
    return tf.reduce_sum(tf.square(y_true - y_pred))


def spread(y_true: Any, y_pred: Any) -> Any:
    return tf.reduce_mean(tf.square(y_true - y_pred)) ** 2 + tf.sqrt(tf.reduce_sum(tf.square(y_pred)))


def builder(
    package: str,
    *,
    added: str | None = None,
    clip: dict[str, Any] | None = None,
    hidden: dict[str, Any] | None = None,
    **compiled: Any,
) -> Any:
    """A small regression whose middle layer may add to the loss."""

    def build() -> Any:
        keras = importlib.import_module(package)

        class Adding(keras.layers.Layer):  # type: ignore[name-defined, misc]
            def call(self, inputs: Any) -> Any:
                if added in ("sum", "both"):
                    self.add_loss(tf.reduce_sum(inputs) * 0.1)
                if added in ("mean", "both"):
                    self.add_loss(tf.reduce_mean(tf.square(inputs)))
                return inputs

        inputs = keras.Input((4,), name="x")
        middle = keras.layers.Dense(5, **{"activation": "relu", "kernel_regularizer": "l2", **(hidden or {})})
        model = keras.Model(inputs, keras.layers.Dense(1)(Adding()(middle(inputs))))
        options = {"optimizer": keras.optimizers.SGD(0.05, **(clip or {})), "loss": "mse", "metrics": ["mae"]}
        model.compile(**{**options, **compiled})
        return model

    build.uses = package  # type: ignore[attr-defined]  # so that its pickle names the package
    return build


def assert_as_plain(build: Callable[[], Any], package: str, folder: Path, *data: Any, **options: Any) -> None:
    """Two replicas give what plain `fit` of the same arrays gives."""
    keras = importlib.import_module(package)
    options = {"batch_size": BATCH, "epochs": 2, "shuffle": False, "verbose": 0, **options}
    keras.utils.set_random_seed(0)
    model = build()
    expected = model.fit(*data, **options).history
    scale, run = rk.Scale(replicas_per_worker=2), rk.Run(storage=str(folder))
    result = rk.fit(build, *data, **options, scale=scale, run=run)
    assert set(result.history) == set(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(result.history[name], values, rtol=1e-5, err_msg=name)
    for ours, theirs in zip(result.model().get_weights(), model.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


PACKAGES = pytest.mark.parametrize("package", ["keras", "tf_keras"])


@PACKAGES
@pytest.mark.parametrize("loss", [scalar_mean, scalar_sum], ids=["mean", "sum"])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weights"])
def test_a_loss_that_returns_a_scalar(package: str, loss: Any, weighted: bool, tmp_path: Path) -> None:
    weights = {"sample_weight": W} if weighted else {}
    compiled = {"loss": loss, "optimizer": "adam"}
    build = builder(package, **compiled)
    assert_as_plain(build, package, tmp_path, X, Y, **weights)


@PACKAGES
@pytest.mark.parametrize("added", ["mean", "sum", "both"])
def test_add_loss(package: str, added: str, tmp_path: Path) -> None:
    validation = (X[:13], Y[:13])
    assert_as_plain(builder(package, added=added), package, tmp_path, X, Y, validation_data=validation)


@PACKAGES
@pytest.mark.parametrize("added", ["mean", "sum"])
def test_add_loss_of_what_is_zero_at_first(package: str, added: str, tmp_path: Path) -> None:
    hidden = {"activation": "linear", "kernel_initializer": "zeros", "kernel_regularizer": None}
    assert_as_plain(builder(package, added=added, hidden=hidden), package, tmp_path, X, Y)


@PACKAGES
def test_add_loss_is_all_there_is(package: str, tmp_path: Path) -> None:
    compiled = {"loss": None, "metrics": None}
    assert_as_plain(builder(package, added="both", **compiled), package, tmp_path, X)


@PACKAGES
def test_a_loss_that_sums_over_rows(package: str, tmp_path: Path) -> None:
    keras = importlib.import_module(package)
    loss = keras.losses.MeanSquaredError(reduction="sum")
    build = builder(package, added="mean", clip={"global_clipnorm": 1.0}, loss=loss)
    assert_as_plain(build, package, tmp_path, X, Y, sample_weight=W)


@PACKAGES
@pytest.mark.parametrize("clip", [{"clipnorm": 0.1}, {"global_clipnorm": 0.1}, {"clipvalue": 0.05}], ids=str)
def test_gradients_are_clipped_as_one(package: str, clip: dict[str, float], tmp_path: Path) -> None:
    assert_as_plain(builder(package, clip=clip), package, tmp_path, X, Y)


def test_a_scalar_that_is_neither_a_mean_nor_a_sum_is_refused(tmp_path: Path) -> None:
    with pytest.raises(rk.ModelError, match=r"must be a mean or a sum over the rows.*number 0 of those from compiled"):
        assert_as_plain(builder("keras", loss=spread), "keras", tmp_path, X, Y)


def test_accumulated_gradients_are_refused(tmp_path: Path) -> None:
    with pytest.raises(rk.ModelError, match="gradient_accumulation_steps=2"):
        build = builder("keras", clip={"gradient_accumulation_steps": 2})
        assert_as_plain(build, "keras", tmp_path, X, Y)
