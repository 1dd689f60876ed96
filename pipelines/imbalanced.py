"""Binary classification with 5% positive rows: deaths in car crashes, with class weights and survey weights.

    raykeras fit pipelines/imbalanced.py
    raykeras fit pipelines/imbalanced.py --workers 2 --name two
    raykeras evaluate pipelines/imbalanced.py --checkpoint runs/two/checkpoints/epoch-000003
    raykeras predict pipelines/imbalanced.py --checkpoint runs/two/checkpoints/epoch-000003 --output predicted

The data is in this repository, one file per year; see `make_crashes.py` for its origin. `weight` is the number of
people that a row represents, up to a constant factor: the survey sampled severe crashes more often, so that deaths are
rarer in the population than among the rows. `class_weight` multiplies with it. The last fifth of the training rows,
nearly all from 2001, is for validation: training stops when its AUC has not increased for two epochs. The best
checkpoint, which is then the third from the end, is still kept. The year 2002 is for `evaluate` and `predict`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import raykeras as rk

DATA = Path(__file__).parent / "crashes"
FEATURES = {  # mean and standard deviation among the training rows
    "speed": (1.70, 0.92),
    "age": (37.3, 18.0),
    "vehicle_age": (6.8, 5.3),
    "driver": (0.79, 0.41),
    "male": (0.53, 0.50),
    "belted": (0.70, 0.46),
    "airbag": (0.52, 0.50),
    "deployed": (0.32, 0.47),
    "frontal": (0.64, 0.48),
}


def build() -> Any:
    """Build a network of two dense layers on the standardized features."""
    import keras

    means, deviations = zip(*FEATURES.values(), strict=True)
    model = keras.Sequential(
        [
            keras.Input((len(FEATURES),), name="features"),
            keras.layers.Normalization(mean=means, variance=[deviation**2 for deviation in deviations]),
            keras.layers.Dense(32, activation="relu"),
            keras.layers.Dense(32, activation="relu"),
            keras.layers.Dense(1, activation="sigmoid", name="dead"),
        ]
    )
    model.compile(
        optimizer=keras.optimizers.Adam(3e-3),
        loss="binary_crossentropy",
        metrics=[
            keras.metrics.AUC(name="auc"),
            keras.metrics.Precision(name="precision"),
            keras.metrics.Recall(name="recall"),
        ],
    )
    return model


def pipeline(
    data: str = str(DATA), dead_weight: float = 50.0, patience: int = 2, batch_size: int = 512, epochs: int = 12
) -> rk.Pipeline:
    """Return the pipeline.

    Args:
        data: Folder with `train/` and `test/`.
        dead_weight: Class weight of a death; that of a survival is 1.
        patience: Number of epochs without a higher AUC after which training stops.
        batch_size: Global batch size.
        epochs: Maximum number of epochs.
    """
    import keras

    stop = keras.callbacks.EarlyStopping(monitor="val_auc", mode="max", patience=patience, restore_best_weights=True)
    columns = {"x": list(FEATURES), "y": "dead", "sample_weight": "weight"}
    return rk.Pipeline(
        model=build,
        train=rk.parquet(f"{data}/train", **columns),
        test=rk.parquet(f"{data}/test", **columns),
        fit={
            "validation_split": 0.2,
            "class_weight": {0: 1.0, 1: dead_weight},
            "callbacks": [stop],
            "batch_size": batch_size,
            "epochs": epochs,
        },
    )
