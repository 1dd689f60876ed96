"""The Keras guide "Training & evaluation with the built-in methods", section by section.

Each example trains plainly and through `raykeras`, over the same batches, and the numbers agree.
https://keras.io/guides/training_with_built_in_methods
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tensorflow as tf

import raykeras as rk

ROWS, BATCH = 75, 16
RNG = np.random.default_rng(0)
X = RNG.normal(size=(ROWS, 8)).astype(np.float32)
Y = RNG.integers(0, 3, ROWS)
IMAGES = RNG.normal(size=(ROWS, 8, 8, 3)).astype(np.float32)
SERIES = RNG.normal(size=(ROWS, 6, 4)).astype(np.float32)
SCORE = RNG.normal(size=(ROWS, 1)).astype(np.float32)
CLASS = np.eye(5, dtype=np.float32)[RNG.integers(0, 5, ROWS)]
WEIGHT = RNG.uniform(0.2, 2, ROWS).astype(np.float32)

PACKAGES = pytest.mark.parametrize("package", ["keras", "tf_keras"])
SCALES = {"1x1": rk.Scale(), "1x2": rk.Scale(replicas_per_worker=2)}
IN_PROCESS = pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)


def dense(package: str, **compiled: Any) -> Callable[[], Any]:
    """The guide's first model, made small."""

    def build() -> Any:
        keras = importlib.import_module(package)
        inputs = keras.Input((8,), name="digits")
        hidden = keras.layers.Dense(6, activation="relu")(inputs)
        model = keras.Model(inputs, keras.layers.Dense(3, activation="softmax", name="predictions")(hidden))
        options = {"optimizer": "rmsprop", "loss": "sparse_categorical_crossentropy"}
        model.compile(**{**options, "metrics": ["sparse_categorical_accuracy"], **compiled})
        return model

    build.uses = package  # type: ignore[attr-defined]  # so that its pickle names the package
    return build


def two_inputs(package: str, **compiled: Any) -> Callable[[], Any]:
    """The guide's model of an image and a time series, with a score and a class."""

    def build() -> Any:
        keras = importlib.import_module(package)
        layers = keras.layers
        image, series = keras.Input((8, 8, 3), name="img_input"), keras.Input((None, 4), name="ts_input")
        a = layers.GlobalMaxPooling2D()(layers.Conv2D(3, 3)(image))
        b = layers.GlobalMaxPooling1D()(layers.Conv1D(3, 3)(series))
        both = layers.concatenate([a, b])
        outputs = [layers.Dense(1, name="score_output")(both), layers.Dense(5, name="class_output")(both)]
        model = keras.Model([image, series], outputs)
        losses = [keras.losses.MeanSquaredError(), keras.losses.CategoricalCrossentropy(from_logits=True)]
        model.compile(**{"optimizer": "rmsprop", "loss": losses, **{k: v(keras) for k, v in compiled.items()}})
        return model

    build.uses = package  # type: ignore[attr-defined]
    return build


def assert_as_plain(
    build: Callable[[], Any], package: str, scale: rk.Scale, folder: Path, *data: Any, **options: Any
) -> None:
    """`rk.fit` gives what plain `fit` of the same data, in its order, gives."""
    keras = importlib.import_module(package)
    options = {"batch_size": BATCH, "epochs": 2, "shuffle": False, "verbose": 0, **options}
    keras.utils.set_random_seed(0)
    model = build()
    expected = model.fit(*data, **options).history
    result = rk.fit(build, *data, **options, scale=scale, run=rk.Run(storage=str(folder)))
    assert set(result.history) == set(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(result.history[name], values, rtol=1e-5, atol=1e-7, err_msg=name)
    for ours, theirs in zip(result.model().get_weights(), model.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


@PACKAGES
@IN_PROCESS
def test_data_frames_and_tensors(package: str, scale: rk.Scale, tmp_path: Path) -> None:
    frame, labels = pd.DataFrame(X, columns=[f"f{i}" for i in range(8)]), pd.Series(Y)
    assert_as_plain(dense(package), package, scale, tmp_path, frame, labels, validation_split=0.2)
    if package == "keras":
        assert_as_plain(dense(package), package, scale, tmp_path, tf.constant(X), tf.constant(Y))


@PACKAGES
@IN_PROCESS
def test_several_inputs_and_outputs_as_lists(package: str, scale: rk.Scale, tmp_path: Path) -> None:
    compiled = {
        "metrics": lambda keras: [
            [keras.metrics.MeanAbsolutePercentageError(), keras.metrics.MeanAbsoluteError()],
            [keras.metrics.CategoricalAccuracy()],
        ],
        "loss_weights": lambda keras: [2.0, 1.0],
    }
    build = two_inputs(package, **compiled)
    validation = ([IMAGES[:13], SERIES[:13]], [SCORE[:13], CLASS[:13]])
    data = ([IMAGES, SERIES], [SCORE, CLASS])
    assert_as_plain(build, package, scale, tmp_path, *data, validation_data=validation)


@PACKAGES
@IN_PROCESS
def test_several_inputs_and_outputs_as_dicts(package: str, scale: rk.Scale, tmp_path: Path) -> None:
    compiled = {
        "loss": lambda keras: {
            "score_output": keras.losses.MeanSquaredError(),
            "class_output": keras.losses.CategoricalCrossentropy(from_logits=True),
        },
        "metrics": lambda keras: {
            "score_output": [keras.metrics.MeanAbsoluteError()],
            "class_output": [keras.metrics.CategoricalAccuracy()],
        },
        "loss_weights": lambda keras: {"score_output": 2.0, "class_output": 1.0},
    }
    build = two_inputs(package, **compiled)
    x = {"img_input": IMAGES, "ts_input": SERIES}
    y = {"score_output": SCORE, "class_output": CLASS}
    assert_as_plain(build, package, scale, tmp_path, x, y)


@PACKAGES
@IN_PROCESS
def test_weights_by_output(package: str, scale: rk.Scale, tmp_path: Path) -> None:
    build, other = two_inputs(package), WEIGHT[::-1].copy()
    x, weights = {"img_input": IMAGES, "ts_input": SERIES}, {"class_output": other, "score_output": WEIGHT}
    keras = importlib.import_module(package)
    keras.utils.set_random_seed(0)
    model = build()
    options = {"batch_size": BATCH, "epochs": 2, "shuffle": False, "verbose": 0}
    # Keras 3 itself takes weights of a list of outputs as a list only
    expected = model.fit(x, [SCORE, CLASS], sample_weight=[WEIGHT, other], **options).history
    y = {"score_output": SCORE, "class_output": CLASS}
    result = rk.fit(build, x, y, sample_weight=weights, **options, scale=scale, run=rk.Run(storage=str(tmp_path)))
    for name, values in expected.items():
        np.testing.assert_allclose(result.history[name], values, rtol=1e-5, err_msg=name)


@PACKAGES
@IN_PROCESS
def test_an_output_without_a_loss(package: str, scale: rk.Scale, tmp_path: Path) -> None:
    compiled = {"loss": lambda keras: [None, keras.losses.CategoricalCrossentropy(from_logits=True)]}
    data = ([IMAGES, SERIES], [SCORE, CLASS])
    assert_as_plain(two_inputs(package, **compiled), package, scale, tmp_path, *data)
