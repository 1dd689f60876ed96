"""Small versions of the models in the Keras guide, and data for them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import raykeras as rk

ROWS, BATCH = 75, 16  # the last batch has an odd number of rows
RNG = np.random.default_rng(0)
X = RNG.normal(size=(ROWS, 8)).astype(np.float32)
Y = RNG.integers(0, 3, ROWS)
IMAGES = RNG.normal(size=(ROWS, 8, 8, 3)).astype(np.float32)
SERIES = RNG.normal(size=(ROWS, 6, 4)).astype(np.float32)
SCORE = RNG.normal(size=(ROWS, 1)).astype(np.float32)
CLASS = np.eye(5, dtype=np.float32)[RNG.integers(0, 5, ROWS)]
WEIGHT = RNG.uniform(0.2, 2, ROWS).astype(np.float32)
for shared in (X, Y, IMAGES, SERIES, SCORE, CLASS, WEIGHT):
    shared.flags.writeable = False

PACKAGES = pytest.mark.parametrize("package", ["keras", "tf_keras"])
SCALES = {"1x1": rk.Scale(), "1x2": rk.Scale(replicas_per_worker=2)}
TWO = rk.Scale(workers=2, spares=False)  # whose start would slow down longer tests
IN_PROCESS = pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)


def dense(package: str, **compiled: Any) -> Callable[[], Any]:
    """Return a function that builds a small version of the guide's first model."""

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
    """Return a function that builds the guide's model of an image and a time series, with score and class outputs."""

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
