"""Any compiled model trains in place on two replicas of this process and remains an ordinary model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras

import raykeras as rk
from tests.support.compare import assert_same_training, assert_same_weights
from tests.support.models import BATCH, SCALES, WEIGHT, X, Y

OPTIONS: dict[str, Any] = {"epochs": 2, "batch_size": BATCH, "shuffle": False, "verbose": 0}
TWO_REPLICAS = SCALES["1x2"]
pytestmark = pytest.mark.filterwarnings("ignore:Keras cannot serialise:UserWarning")


class Wrapper(keras.Model):
    """Has no config, so that Keras cannot serialise it."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner, self.norm = inner, keras.layers.BatchNormalization(momentum=1.0)

    def call(self, x: Any, training: bool = False) -> Any:
        return self.inner(self.norm(x, training=False))


def build() -> Any:
    keras.utils.set_random_seed(0)
    inner = keras.Sequential([keras.Input((8,)), keras.layers.Dense(6, "relu"), keras.layers.Dense(3, "softmax")])
    model, optimizer = Wrapper(inner), keras.optimizers.AdamW(0.01, weight_decay=0.1)
    optimizer.exclude_from_weight_decay(var_list=[inner.layers[0].bias])
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"], weighted_metrics=["accuracy"])
    return model


def assert_is_plain(model: Any) -> None:
    assert type(model.distribute_strategy).__name__ == "_DefaultDistributionStrategy"
    for variable in [*model.variables, *model.optimizer.variables]:
        assert not hasattr(variable.value, "values"), variable.path  # one value per replica


@pytest.mark.parametrize("is_trained", [False, True])
def test_unserializable_instance_matches_keras(is_trained: bool, tmp_path: Path) -> None:
    mine, plain = build(), build()
    run = rk.Run(storage=str(tmp_path))
    if is_trained:  # then its optimizer has variables
        for model in (mine, plain):
            model.fit(X, Y, **OPTIONS)
    before = [variable.value for variable in mine.variables]
    expected = plain.fit(X, Y, sample_weight=WEIGHT, validation_data=(X, Y), **OPTIONS).history
    result = rk.fit(mine, X, Y, sample_weight=WEIGHT, validation_data=(X, Y), scale=TWO_REPLICAS, run=run, **OPTIONS)
    assert_same_training(result, expected, plain)
    assert_same_weights(mine, plain)
    assert_is_plain(mine)
    assert all(variable.value is value for variable, value in zip(mine.variables, before, strict=False))
    values = rk.evaluate(mine, X, Y, batch_size=BATCH, scale=TWO_REPLICAS)
    assert values == pytest.approx(plain.evaluate(X, Y, batch_size=BATCH, verbose=0, return_dict=True), rel=1e-5)
    assert_is_plain(mine)
    for model in (mine, plain):  # continue in plain Keras with their optimizers
        model.fit(X, Y, **OPTIONS)
    assert_same_weights(mine, plain)


def test_failed_training_restores_model(tmp_path: Path) -> None:
    class Fails(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            if batch == 1:
                raise FloatingPointError

    mine, plain = build(), build()
    for model in (mine, plain):
        with pytest.raises(FloatingPointError):
            if model is plain:
                plain.fit(X, Y, callbacks=[Fails()], **OPTIONS)
            else:
                run = rk.Run(storage=str(tmp_path))
                rk.fit(mine, X, Y, callbacks=[Fails()], scale=TWO_REPLICAS, run=run, **OPTIONS)
    assert_is_plain(mine)
    assert_same_weights(mine, plain)


class LegacyWrapper(tf_keras.Model):
    """Has no config, creates its layers' variables when it is called, and has Python state and a closure."""

    def __init__(self) -> None:
        super().__init__()
        factor = tf.Variable(2.0, trainable=False)
        self.calls: list[int] = []
        self.scale = lambda x: x * factor
        self.inner = [tf_keras.layers.Dense(6, "relu", kernel_regularizer="l2"), tf_keras.layers.Dense(3, "softmax")]
        self.steps = self.add_weight("steps", (), tf.int32, "zeros", trainable=False)

    def call(self, x: Any) -> Any:
        self.calls.append(len(self.calls))
        self.steps.assign_add(1)
        for layer in self.inner:
            x = layer(x)
        return self.scale(x) / 2.0


def legacy_functional() -> Any:
    inputs = tf_keras.Input((8,))
    hidden = tf_keras.layers.Dense(6, "relu")(inputs)
    return tf_keras.Model(inputs, tf_keras.layers.Dense(3, "softmax")(hidden))


def legacy_unbuilt() -> Any:
    return tf_keras.Sequential([tf_keras.layers.Dense(6, "relu"), tf_keras.layers.Dense(3, "softmax")])


def legacy_adam_w() -> Any:
    optimizer = tf_keras.optimizers.AdamW(0.01, weight_decay=0.1)
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    return optimizer


def legacy_momentum() -> Any:
    return tf_keras.optimizers.legacy.SGD(0.1, momentum=0.9)


LEGACY_MODELS = [legacy_functional, legacy_unbuilt, LegacyWrapper]
LEGACY_OPTIMIZERS = [tf_keras.optimizers.Adam, legacy_adam_w, legacy_momentum]


def build_legacy(make: Callable[[], Any], optimizer: Any) -> Any:
    tf_keras.utils.set_random_seed(0)
    model = make()
    metrics = ["accuracy", tf_keras.metrics.SparseTopKCategoricalAccuracy(2)]
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=metrics)
    return model


def fit_legacy(model: Any, **options: Any) -> dict[str, list[float]]:
    tf_keras.utils.set_random_seed(0)  # as raykeras does, for models that are not built
    return model.fit(X, Y, **OPTIONS, **options).history


def assert_is_plain_legacy(model: Any) -> None:
    assert not tf.distribute.get_strategy().num_replicas_in_sync > 1
    assert model.distribute_strategy is tf.distribute.get_strategy()
    for variable in [*model.variables, *model.optimizer.variables()]:
        assert not hasattr(variable, "values"), variable.name  # of each replica


LEGACY_CASES = [
    pytest.param(
        make,
        make_optimizer,
        is_trained,
        id=f"{make.__name__}-{make_optimizer.__name__}-{is_trained}",
        marks=() if (i + j) % 3 == 0 and i % 2 == is_trained else pytest.mark.exhaustive,
    )
    for i, make in enumerate(LEGACY_MODELS)
    for j, make_optimizer in enumerate(LEGACY_OPTIMIZERS)
    for is_trained in (False, True)
]
"""By default each model with one optimizer, trained before or not."""


@pytest.mark.parametrize(("make", "make_optimizer", "is_trained"), LEGACY_CASES)
def test_tf_keras_instance_matches_tf_keras(
    make: Callable[[], Any], make_optimizer: Callable[[], Any], is_trained: bool, tmp_path: Path
) -> None:
    mine, plain = (build_legacy(make, make_optimizer()) for _ in range(2))
    run = rk.Run(storage=str(tmp_path))
    if is_trained:  # so that its optimizer and its metrics have variables
        for model in (mine, plain):
            fit_legacy(model)
    before = list(mine.variables) if mine.built else []
    for _ in range(2):
        expected = fit_legacy(plain, validation_data=(X, Y))
        result = rk.fit(mine, X, Y, validation_data=(X, Y), scale=TWO_REPLICAS, run=run, **OPTIONS)
        assert result.model() is mine
        assert_same_training(result, expected, plain)
        assert_is_plain_legacy(mine)
    assert {id(variable) for variable in before} <= {id(variable) for variable in mine.variables}
    values = rk.evaluate(mine, X, Y, batch_size=BATCH, scale=TWO_REPLICAS)
    assert values == pytest.approx(plain.evaluate(X, Y, batch_size=BATCH, verbose=0, return_dict=True), rel=1e-5)
    assert_is_plain_legacy(mine)
    for model in (mine, plain):  # which go on in tf_keras with their optimizers
        fit_legacy(model)
    assert_same_weights(mine, plain)
    np.testing.assert_allclose(mine.predict(X, verbose=0), plain.predict(X, verbose=0), rtol=1e-4, atol=1e-6)
    mine.save_weights(tmp_path / "model.weights.h5")
    if make is LegacyWrapper:
        assert type(mine.calls[0]) is int and int(mine.steps) == int(plain.steps)


def test_tf_keras_instance_in_mixed_precision_stays_plain(tmp_path: Path) -> None:
    tf_keras.mixed_precision.set_global_policy("mixed_float16")
    try:
        mine, plain = (build_legacy(legacy_functional, tf_keras.optimizers.Adam(0.01)) for _ in range(2))
    finally:
        tf_keras.mixed_precision.set_global_policy("float32")
    for _ in range(2):
        fit_legacy(plain)
        rk.fit(mine, X, Y, scale=TWO_REPLICAS, run=rk.Run(storage=str(tmp_path)), **OPTIONS)
        assert_same_weights(mine, plain, rtol=1e-2, atol=1e-3)
    assert_is_plain_legacy(mine)
    assert mine.optimizer.loss_scale == plain.optimizer.loss_scale
    assert type(mine.layers[1].kernel) is type(plain.layers[1].kernel)
    for model in (mine, plain):
        fit_legacy(model)
    assert_same_weights(mine, plain, rtol=1e-2, atol=1e-3)


def test_failed_training_gives_tf_keras_model_back(tmp_path: Path) -> None:
    class Fails(tf_keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            if batch == 1:
                raise FloatingPointError

    mine, plain = (build_legacy(LegacyWrapper, tf_keras.optimizers.Adam()) for _ in range(2))
    with pytest.raises(FloatingPointError):
        fit_legacy(plain, callbacks=[Fails()])
    with pytest.raises(FloatingPointError):
        run = rk.Run(storage=str(tmp_path))
        rk.fit(mine, X, Y, callbacks=[Fails()], scale=TWO_REPLICAS, run=run, **OPTIONS)
    assert_is_plain_legacy(mine)
    assert_same_weights(mine, plain)


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
@pytest.mark.parametrize("make", [build, lambda: build_legacy(legacy_functional, "adam")], ids=["keras", "tf_keras"])
def test_model_of_other_strategy_matches_keras(make: Callable[[], Any], scale: rk.Scale, tmp_path: Path) -> None:
    plain, strategy = make(), tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    with strategy.scope():
        mine = make()
    expected = plain.fit(X, Y, **OPTIONS).history
    result = rk.fit(mine, X, Y, scale=scale, run=rk.Run(storage=str(tmp_path)), **OPTIONS)
    assert_same_training(result, expected, plain)
    assert mine.distribute_strategy is strategy
    variables = mine.optimizer.variables  # a method in tf_keras
    for variable in variables() if callable(variables) else variables:
        assert hasattr(variable, "values") or hasattr(variable.value, "values"), variable.name  # of each replica


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_call_in_scope_of_strategy_is_refused(scale: rk.Scale, tmp_path: Path) -> None:
    model, run = build(), rk.Run(storage=str(tmp_path))
    with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
        with pytest.raises(rk.OptionError, match=r"`fit` must be called outside .* of a MirroredStrategy\. Move"):
            rk.fit(model, X, Y, scale=scale, run=run, **OPTIONS)
        with pytest.raises(rk.OptionError, match="`evaluate` must be called outside"):
            rk.evaluate(model, X, Y, scale=scale)
    assert not list(tmp_path.iterdir())
