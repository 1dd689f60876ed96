"""The first example of the Keras guide "Training & evaluation with the built-in methods".

    raykeras fit pipelines/mnist.py -s data=path/to/mnist.npz

`mnist.npz` is the archive that `keras.datasets.mnist` downloads. As in the guide, the last 10,000 of the 60,000
training rows are for validation.
"""

from __future__ import annotations

from typing import Any

import numpy as np

import raykeras as rk


def build() -> Any:
    """Build the guide's model: two dense layers of 64 units on 784 pixels."""
    import keras

    inputs = keras.Input(shape=(784,), name="digits")
    x = keras.layers.Dense(64, activation="relu", name="dense_1")(inputs)
    x = keras.layers.Dense(64, activation="relu", name="dense_2")(x)
    outputs = keras.layers.Dense(10, activation="softmax", name="predictions")(x)
    model = keras.Model(inputs=inputs, outputs=outputs)
    model.compile(
        optimizer=keras.optimizers.RMSprop(),
        loss=keras.losses.SparseCategoricalCrossentropy(),
        metrics=[keras.metrics.SparseCategoricalAccuracy()],
    )
    return model


def flat_pixels(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Convert images (rows, 28, 28) uint8 to pixels (rows, 784) float32 from 0 to 1."""
    flat = {}
    for name, array in columns.items():
        flat[name] = array.reshape(len(array), -1).astype(np.float32) / 255 if name.startswith("x") else array
    return flat


def pipeline(data: str, batch_size: int = 64, epochs: int = 2) -> rk.Pipeline:
    """Return the pipeline.

    Args:
        data: Path of `mnist.npz`.
        batch_size: Global batch size.
        epochs: Number of epochs.
    """
    return rk.Pipeline(
        model=build,
        train=rk.npy(data, x="x_train", y="y_train", transform=flat_pixels),
        test=rk.npy(data, x="x_test", y="y_test", transform=flat_pixels),
        fit={"batch_size": batch_size, "epochs": epochs, "validation_split": 1 / 6},
    )
