"""A compiled Keras 3 model of any kind trains in place on two replicas of this process, and stays the user's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import pytest
import tensorflow as tf

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
        assert not hasattr(variable.value, "values"), variable.path  # of each replica


@pytest.mark.parametrize("is_trained", [False, True])
def test_unserializable_instance_matches_keras(is_trained: bool, tmp_path: Path) -> None:
    mine, plain = build(), build()
    run = rk.Run(storage=str(tmp_path))
    if is_trained:  # so that its optimizer has variables
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
    for model in (mine, plain):  # which go on in Keras with their optimizers
        model.fit(X, Y, **OPTIONS)
    assert_same_weights(mine, plain)


def test_failed_training_gives_model_back(tmp_path: Path) -> None:
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


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_model_of_other_strategy_matches_keras(scale: rk.Scale, tmp_path: Path) -> None:
    plain, strategy = build(), tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    with strategy.scope():
        mine = build()
    expected = plain.fit(X, Y, **OPTIONS).history
    result = rk.fit(mine, X, Y, scale=scale, run=rk.Run(storage=str(tmp_path)), **OPTIONS)
    assert_same_training(result, expected, plain)
    assert mine.distribute_strategy is strategy
