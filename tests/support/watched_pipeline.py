"""A pipeline with eight metrics, of which the pictures of the progress display are taken; `raykeras fit` runs it."""

from __future__ import annotations

from typing import Any

import raykeras as rk
from pipelines import imbalanced

STEPS = 120


def build() -> Any:
    """Build the model of `pipelines/imbalanced.py` with more metrics."""
    import keras

    model = imbalanced.build()
    metrics = keras.metrics
    model.compile(
        optimizer=keras.optimizers.Adam(3e-3),
        loss="binary_crossentropy",
        metrics=[
            metrics.BinaryAccuracy(name="accuracy"),
            metrics.AUC(name="auc"),
            metrics.AUC(curve="PR", name="pr_auc"),
            metrics.Precision(name="precision"),
            metrics.Recall(name="recall"),
            metrics.SpecificityAtSensitivity(0.9, name="specificity"),
            metrics.MeanSquaredError(name="brier"),
        ],
    )
    return model


def callbacks() -> list[Any]:
    """Return callbacks that reduce the learning rate, and that make steps as slow as those of a larger model."""
    import keras

    from tests.support.resuming import slow

    return [slow(0.04), keras.callbacks.ReduceLROnPlateau("val_loss", factor=0.5, patience=1)]


def pipeline() -> rk.Pipeline:
    """Return the pipeline."""
    source = imbalanced.pipeline().train
    return rk.Pipeline(
        model=build,
        train=source,
        fit={
            "validation_split": 0.2,
            "class_weight": {0: 1.0, 1: 20.0},
            "batch_size": 128,
            "steps_per_epoch": STEPS,
            "epochs": 5,
            "callbacks": callbacks(),
        },
    )
