"""Handwritten digits from Parquet files in this repository, with a sample weight for each row.

    raykeras fit pipelines/digits.py
    raykeras fit pipelines/digits.py --workers 2 --epochs 5

`weight` is the inverse frequency of the row's digit, so that all digits have the same total weight.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import raykeras as rk

DATA = Path(__file__).parent / "digits"


def build() -> Any:
    """Build a small convolutional network for images of 8×8 pixels with values from 0 to 16."""
    import keras

    model = keras.Sequential(
        [
            keras.Input((8, 8)),
            keras.layers.Rescaling(1 / 16),
            keras.layers.Reshape((8, 8, 1)),
            keras.layers.Conv2D(32, 3, activation="relu"),
            keras.layers.Conv2D(32, 3, activation="relu"),
            keras.layers.Flatten(),
            keras.layers.Dense(64, activation="relu"),
            keras.layers.Dense(10, activation="softmax"),
        ]
    )
    model.compile(
        optimizer=keras.optimizers.Adam(2e-3),
        loss="sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )
    return model


def pipeline(data: str = str(DATA), batch_size: int = 32, epochs: int = 10) -> rk.Pipeline:
    """Return the pipeline.

    Args:
        data: Folder with `train/` and `test/`.
        batch_size: Global batch size.
        epochs: Number of epochs.
    """
    train = rk.parquet(f"{data}/train", x="image", y="label", sample_weight="weight")
    test = rk.parquet(f"{data}/test", x="image", y="label")
    return rk.Pipeline(
        model=build, train=train, validation=test, test=test, fit={"batch_size": batch_size, "epochs": epochs}
    )
