"""Scalar losses are weighted on several replicas as in plain Keras."""

from __future__ import annotations

import importlib
import logging
import logging.handlers
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
import tf_keras

import raykeras as rk
from tests.support.compare import assert_same_training
from tests.support.models import PACKAGES

ROWS, BATCH = 37, 8  # the last batch has an odd number of rows
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


def pairs(y_true: Any, y_pred: Any) -> Any:
    """Compare every label with every prediction, as by broadcasting or in a contrastive loss."""
    return tf.reduce_mean(tf.square(y_true - tf.transpose(y_pred)) ** 2)


def builder(
    package: str,
    *,
    added: str | None = None,
    clip: dict[str, Any] | None = None,
    hidden: dict[str, Any] | None = None,
    **compiled: Any,
) -> Any:
    """Return a function that builds a small regression model whose middle layer may add a loss."""

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


def assert_matches_keras(build: Callable[[], Any], package: str, folder: Path, *data: Any, **options: Any) -> None:
    """Assert that training on two replicas gives what plain `fit` of the same arrays gives."""
    options = {"batch_size": BATCH, "epochs": 2, "shuffle": False, "verbose": 0, **options}
    importlib.import_module(package).utils.set_random_seed(0)
    model = build()
    expected = model.fit(*data, **options).history
    scale, run = rk.Scale(replicas_per_worker=2), rk.Run(storage=str(folder))
    assert_same_training(rk.fit(build, *data, **options, scale=scale, run=run), expected, model)


# cases whose errors the rest of the grid would also reveal; run with `--exhaustive`
REST = pytest.mark.exhaustive


@PACKAGES
@pytest.mark.parametrize(
    ("loss", "weights"),
    [
        pytest.param(scalar_mean, None, id="mean"),
        pytest.param(scalar_sum, W, id="weighted sum"),
        pytest.param(scalar_mean, W, id="weighted mean", marks=REST),
        pytest.param(scalar_sum, None, id="sum", marks=REST),
    ],
)
def test_scalar_loss_matches_keras(package: str, loss: Any, weights: Any, tmp_path: Path) -> None:
    build = builder(package, loss=loss, optimizer="adam")
    assert_matches_keras(build, package, tmp_path, X, Y, sample_weight=weights)


@PACKAGES
def test_scalar_losses_of_batch_of_one_row_match_keras(package: str, tmp_path: Path) -> None:
    build = builder(package, loss=scalar_mean, added="both")
    assert_matches_keras(build, package, tmp_path, X[: 2 * BATCH + 1], Y[: 2 * BATCH + 1])


@PACKAGES
@pytest.mark.parametrize("added", ["both", pytest.param("mean", marks=REST), pytest.param("sum", marks=REST)])
def test_add_loss_matches_keras(package: str, added: str, tmp_path: Path) -> None:
    validation = (X[:13], Y[:13])
    assert_matches_keras(builder(package, added=added), package, tmp_path, X, Y, validation_data=validation)


@pytest.mark.parametrize(
    ("package", "added"),
    [("keras", "mean"), ("keras", "sum"), ("tf_keras", "sum"), pytest.param("tf_keras", "mean", marks=REST)],
)
def test_add_loss_that_starts_at_zero_matches_keras(package: str, added: str, tmp_path: Path) -> None:
    hidden = {"activation": "linear", "kernel_initializer": "zeros", "kernel_regularizer": None}
    assert_matches_keras(builder(package, added=added, hidden=hidden), package, tmp_path, X, Y)


@PACKAGES
def test_add_loss_without_compiled_loss_matches_keras(package: str, tmp_path: Path) -> None:
    compiled = {"loss": None, "metrics": None}
    assert_matches_keras(builder(package, added="both", **compiled), package, tmp_path, X)


@pytest.mark.parametrize("has_own_step", [False, True])
def test_add_metric_matches_keras(has_own_step: bool, tmp_path: Path) -> None:
    def build() -> Any:
        class Measuring(tf_keras.layers.Layer):  # type: ignore[misc]
            def call(self, inputs: Any) -> Any:
                self.add_metric(tf.reduce_sum(inputs), name="sum")
                self.add_metric(tf.reduce_mean(tf.square(inputs)), name="mean")
                self.add_metric(inputs, name="rows")
                return inputs

        class Stepping(tf_keras.Model):  # type: ignore[misc]
            def train_step(self, data: Any) -> Any:
                return super().train_step(data)

        inputs = tf_keras.Input((4,))
        middle = Measuring()(tf_keras.layers.Dense(5, bias_initializer="ones")(inputs))
        outputs = tf_keras.layers.Dense(1)(middle)
        model = (Stepping if has_own_step else tf_keras.Model)(inputs, outputs)
        model.add_metric(tf.reduce_sum(outputs), name="predicted")
        model.compile("sgd", "mse")
        return model

    build.uses = "tf_keras"  # type: ignore[attr-defined]
    rows = 2 * BATCH + 1  # the last row leaves a replica without rows
    assert_matches_keras(build, "tf_keras", tmp_path, X[:rows], Y[:rows], validation_data=(X[:13], Y[:13]))


@PACKAGES
def test_loss_with_sum_reduction_matches_keras(package: str, tmp_path: Path) -> None:
    keras = importlib.import_module(package)
    loss = keras.losses.MeanSquaredError(reduction="sum")
    build = builder(package, added="mean", clip={"global_clipnorm": 1.0}, loss=loss)
    assert_matches_keras(build, package, tmp_path, X, Y, sample_weight=W)


@PACKAGES
@pytest.mark.parametrize(
    ("clip", "limit"),
    [("clipnorm", 0.1), pytest.param("global_clipnorm", 0.1, marks=REST), pytest.param("clipvalue", 0.05, marks=REST)],
)
def test_gradients_are_clipped_globally(package: str, clip: str, limit: float, tmp_path: Path) -> None:
    assert_matches_keras(builder(package, clip={clip: limit}), package, tmp_path, X, Y)


@PACKAGES
@pytest.mark.parametrize("own", ["compute_loss", "train_step"])
def test_custom_step_gets_loss_of_global_batch(own: str, package: str, tmp_path: Path) -> None:
    keras = importlib.import_module(package)

    def compute_loss(self: Any, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None) -> Any:
        loss = keras.Model.compute_loss(self, x, y, y_pred, sample_weight)
        self.root.update_state(tf.sqrt(loss))
        return loss

    def train_step(self: Any, data: Any) -> Any:
        x, y, weights = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x, y, self(x, training=True), weights)
        gradients = tape.gradient(loss, self.trainable_weights)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_weights, strict=True))
        self.root.update_state(tf.sqrt(loss))
        self.error.update_state(scalar_mean(y, self(x)))
        return {"loss": loss, "root": self.root.result(), "last": tf.sqrt(loss), "mean": self.error.result()}

    def build() -> Any:
        methods = {"compute_loss": compute_loss} if own == "compute_loss" else {"train_step": train_step}
        inputs = keras.Input((4,))
        model = type("Own", (keras.Model,), methods)(inputs, keras.layers.Dense(1, kernel_regularizer="l2")(inputs))
        model.root = keras.metrics.Mean(name="root")
        if own == "train_step":
            model.error = keras.metrics.Mean(name="error")
        model.compile("adam", "mse")
        return model

    build.uses = package  # type: ignore[attr-defined]
    rows = 4 * BATCH + 1  # one replica has no row of the last batch
    assert_matches_keras(build, package, tmp_path, X[:rows], Y[:rows], sample_weight=W[:rows])


def overriding_call(package: str, kind: str) -> Any:
    """Return a loss whose `__call__` returns a mean, a sum, or twice what Keras' returns."""
    losses = importlib.import_module(package).losses

    class Overriding(losses.Loss):  # type: ignore[misc, name-defined]
        def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
            if kind == "keras":
                return 2 * super().__call__(y_true, y_pred, sample_weight)
            return scalar_sum(y_true, y_pred) if kind == "sum" else scalar_mean(y_true, y_pred)

        def call(self, y_true: Any, y_pred: Any) -> Any:
            return tf.reduce_mean(tf.square(y_true - y_pred), -1)

    return Overriding()


@PACKAGES
@pytest.mark.parametrize(("kind", "weights"), [("mean", None), ("sum", None), ("keras", W)])
def test_loss_that_overrides_call_matches_keras(package: str, kind: str, weights: Any, tmp_path: Path) -> None:
    build = builder(package, loss=overriding_call(package, kind), optimizer="adam")
    assert_matches_keras(build, package, tmp_path, X, Y, sample_weight=weights)


@PACKAGES
def test_loss_that_overrides_call_refuses_weights(package: str, tmp_path: Path) -> None:
    build = builder(package, loss=overriding_call(package, "mean"))
    with pytest.raises(rk.ModelError, match=r"weights.*whose `call` returns one value per row; got Overriding"):
        assert_matches_keras(build, package, tmp_path, X, Y, sample_weight=W)


@pytest.mark.parametrize("loss", [spread, pairs])
def test_scalar_loss_that_is_neither_mean_nor_sum_is_refused(loss: Any, tmp_path: Path) -> None:
    with pytest.raises(rk.ModelError, match=r"must be a mean or a sum over the rows.*scalar 0 from compiled"):
        assert_matches_keras(builder("keras", loss=loss), "keras", tmp_path, X, Y)


def test_gradient_accumulation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(rk.ModelError, match="gradient_accumulation_steps=2"):
        build = builder("keras", clip={"gradient_accumulation_steps": 2})
        assert_matches_keras(build, "keras", tmp_path, X, Y)


def custom_loss(kind: str) -> Any:
    """Return a builder of a model whose `compute_loss` does not use the compiled loss."""

    def build() -> Any:
        import keras

        class Custom(keras.Model):  # type: ignore[misc]
            def compute_loss(
                self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True
            ) -> Any:
                if kind == "with Keras' losses":
                    return keras.losses.MeanSquaredError()(y, y_pred) + 0.5 * scalar_mean(y, y_pred)
                if kind == "weighted mean":
                    return tf.reduce_sum(sample_weight * (y - y_pred)[:, 0] ** 2) / tf.reduce_sum(sample_weight)
                return {"mean": scalar_mean, "sum": scalar_sum, "neither": spread}[kind](y, y_pred)

        inputs = keras.Input((4,), name="x")
        model = Custom(inputs, keras.layers.Dense(1)(keras.layers.Dense(5, "relu")(inputs)))
        model.compile(keras.optimizers.SGD(0.01), loss=None, metrics=["mae"])
        return model

    return build


@pytest.mark.parametrize("kind", ["mean", "sum", "with Keras' losses"])
def test_custom_compute_loss_matches_keras(kind: str, tmp_path: Path) -> None:
    assert_matches_keras(custom_loss(kind), "keras", tmp_path, X, Y)


@pytest.mark.parametrize(("kind", "weights"), [("neither", None), ("weighted mean", W)])
def test_custom_compute_loss_that_is_neither_mean_nor_sum_is_refused(kind: str, weights: Any, tmp_path: Path) -> None:
    scale, run = rk.Scale(replicas_per_worker=2), rk.Run(storage=str(tmp_path))
    options = {"sample_weight": weights, "batch_size": BATCH, "verbose": 0}
    with pytest.raises(rk.ModelError, match="scalar 0 from `compute_loss` is"):
        rk.fit(custom_loss(kind), X, Y, **options, scale=scale, run=run)


def test_fewer_rows_than_replicas_match_keras_in_eager_execution(tmp_path: Path) -> None:
    build = builder("keras", run_eagerly=True)
    with pytest.warns(UserWarning, match="should be at least the number of replicas"):
        assert_matches_keras(build, "keras", tmp_path, X[:3], Y[:3], batch_size=1)


def test_scalar_loss_in_low_precision_matches_keras(tmp_path: Path) -> None:
    def build() -> Any:
        import keras

        layers = [keras.Input((4,)), keras.layers.Dense(1, dtype="mixed_bfloat16")]
        model = keras.Sequential(layers)
        model.compile(keras.optimizers.SGD(0.05), scalar_mean)
        return model

    importlib.import_module("keras").utils.set_random_seed(0)
    expected = build().fit(X, Y, batch_size=BATCH, epochs=2, shuffle=False, verbose=0).history
    scale, run = rk.Scale(replicas_per_worker=2), rk.Run(storage=str(tmp_path))
    result = rk.fit(build, X, Y, batch_size=BATCH, epochs=2, shuffle=False, verbose=0, scale=scale, run=run)
    np.testing.assert_allclose(result.history["loss"], expected["loss"], rtol=0.02)  # eight significant bits


def test_classifying_losses_does_not_change_layer_state(tmp_path: Path) -> None:
    def build() -> Any:
        import keras

        class Counting(keras.layers.Layer):  # type: ignore[misc]
            def build(self, shape: Any) -> None:
                self.calls = self.add_weight(
                    shape=(), initializer="zeros", trainable=False, aggregation="only_first_replica"
                )

            def call(self, inputs: Any) -> Any:
                self.calls.assign_add(1.0)
                return inputs

        model = keras.Sequential([keras.Input((4,)), Counting(), keras.layers.Dense(1)])
        model.compile("sgd", "mse")
        return model

    expected = build()
    expected.fit(X, Y, batch_size=BATCH, verbose=0)
    scale, run = rk.Scale(replicas_per_worker=2), rk.Run(storage=str(tmp_path))
    model = rk.fit(build, X, Y, batch_size=BATCH, verbose=0, scale=scale, run=run).model()
    assert model.layers[0].calls.numpy() == expected.layers[0].calls.numpy() == -(-ROWS // BATCH)


def test_classifying_losses_logs_nothing(tmp_path: Path) -> None:
    handler = logging.handlers.BufferingHandler(100)
    logger = logging.getLogger("tensorflow")
    logger.addHandler(handler)
    try:
        scale, run = rk.Scale(replicas_per_worker=2), rk.Run(storage=str(tmp_path))
        rk.fit(builder("keras", loss=scalar_mean), X, Y, batch_size=BATCH, verbose=0, scale=scale, run=run)
    finally:
        logger.removeHandler(handler)
    assert [record.getMessage() for record in handler.buffer] == []
