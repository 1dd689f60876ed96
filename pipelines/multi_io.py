"""The model with two inputs and two outputs from the Keras guide "Training & evaluation with the built-in methods".

    raykeras fit pipelines/multi_io.py
    raykeras fit pipelines/multi_io.py --workers 2 --name two
    raykeras evaluate pipelines/multi_io.py --checkpoint runs/two/checkpoints/epoch-000005
    raykeras predict pipelines/multi_io.py --checkpoint runs/two/checkpoints/epoch-000005 --output predicted

The inputs are an image and a time series of variable length; the outputs are a score and one of five classes. x, y and
the sample weights are dicts by name. The first command generates the data as Parquet files in the temporary folder;
with workers on several machines, set `-s data=FOLDER` to a folder that all of them can access.

An image has a patch of one color. Two thirds of the series have an event in the first or second of their 10 channels.
The class is that of the event, or else the color of the patch; the score is the sum of the patch's brightness and the
event's height. The noise of the scores differs from row to row, and some classes are random: the weights say how
reliable the score and the class of a row are.
"""

from __future__ import annotations

import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import raykeras as rk

NUM_CLASSES = 5
NUM_CHANNELS = 10
MAX_STEPS = 24
PARTS = {"train": 4, "test": 1}  # files of `rows` / 4 rows each


def build() -> Any:
    """Build the guide's model: a convolution of each input, and a linear score and logits of both."""
    import keras
    from keras import layers

    image_input = keras.Input(shape=(32, 32, 3), name="img_input")
    timeseries_input = keras.Input(shape=(None, NUM_CHANNELS), name="ts_input")
    x1 = layers.Conv2D(3, 3)(image_input)
    x1 = layers.GlobalMaxPooling2D()(x1)
    x2 = layers.Conv1D(3, 3)(timeseries_input)
    x2 = layers.GlobalMaxPooling1D()(x2)
    x = layers.concatenate([x1, x2])
    score_output = layers.Dense(1, name="score_output")(x)
    class_output = layers.Dense(NUM_CLASSES, name="class_output")(x)
    model = keras.Model(inputs=[image_input, timeseries_input], outputs=[score_output, class_output])
    model.compile(
        optimizer=keras.optimizers.RMSprop(1e-3),
        loss={
            "score_output": keras.losses.MeanSquaredError(),
            "class_output": keras.losses.CategoricalCrossentropy(from_logits=True),
        },
        metrics={
            "score_output": [keras.metrics.MeanAbsolutePercentageError(), keras.metrics.MeanAbsoluteError()],
            "class_output": [keras.metrics.CategoricalAccuracy()],
        },
        loss_weights={"score_output": 2.0, "class_output": 1.0},
    )
    return model


def as_inputs(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Convert stored columns to the model's inputs and outputs; series (rows, steps × channels) are zero-padded."""
    return {
        **columns,
        "image": columns["image"].astype(np.float32) / 255,
        "series": columns["series"].reshape(-1, MAX_STEPS, NUM_CHANNELS),
        "class": np.eye(NUM_CLASSES, dtype=np.float32)[columns["class"]],
    }


def pipeline(data: str = "", rows: int = 3200, batch_size: int = 32, epochs: int = 5) -> rk.Pipeline:
    """Return the pipeline; generate the data first if needed.

    Args:
        data: Folder with `train/` and `test/`, which is generated if it does not exist.
        rows: Number of training rows to generate.
        batch_size: Global batch size.
        epochs: Number of epochs.
    """
    folder = Path(data) if data else _folder(rows)
    make(folder, rows)
    train, test = (
        rk.parquet(
            folder / part,
            x={"img_input": "image", "ts_input": "series"},
            y={"score_output": "score", "class_output": "class"},
            sample_weight={"score_output": "score_weight", "class_output": "class_weight"},
            pad={"series": MAX_STEPS * NUM_CHANNELS},
            transform=as_inputs,
        )
        for part in PARTS
    )
    return rk.Pipeline(
        model=build, train=train, validation=test, test=test, fit={"batch_size": batch_size, "epochs": epochs}
    )


def _folder(rows: int) -> Path:
    """Return the default folder of the data, whose name changes with this file."""
    version = zlib.crc32(Path(__file__).read_bytes())
    return Path(tempfile.gettempdir()) / f"raykeras-multi-io-{rows}-{version:08x}"


def make(folder: Path, rows: int) -> None:
    """Generate the data in `folder`, unless it exists.

    The data is written to a temporary folder that is renamed at the end, so that it is never incomplete.
    """
    if (folder / "test").is_dir():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        complete = Path(temporary) / "made"
        number = 0
        for part, num_files in PARTS.items():
            (complete / part).mkdir(parents=True)
            for _ in range(num_files):
                table = _table(np.random.default_rng(number), -(-rows // PARTS["train"]))
                pq.write_table(table, complete / part / f"part-{number}.parquet", row_group_size=256)
                number += 1
        try:
            complete.rename(folder)
        except OSError:
            if not (folder / "test").is_dir():  # otherwise another process was faster
                raise


def _table(rng: np.random.Generator, rows: int) -> pa.Table:
    color, brightness = rng.integers(0, 3, rows), rng.uniform(0.4, 1, rows)
    event, height = rng.integers(-1, 2, rows), rng.uniform(1.5, 3, rows)  # -1: none
    images = rng.integers(0, 40, (rows, 32, 32, 3), np.uint8)
    series = []
    for row in range(rows):
        top, left = rng.integers(0, 32 - 6, 2)
        images[row, top : top + 6, left : left + 6, color[row]] = 255 * brightness[row]
        steps = rng.integers(8, MAX_STEPS + 1)
        values = rng.normal(0, 0.1, (steps, NUM_CHANNELS)).astype(np.float32)
        if event[row] >= 0:
            start = rng.integers(0, steps - 4)
            values[start : start + 4, event[row]] += height[row]
        series.append(values.ravel())
    noise = rng.uniform(0.05, 0.3, rows)
    score = 0.5 + brightness + np.where(event >= 0, height, 0) + noise * rng.normal(size=rows)
    trust = rng.uniform(0.6, 1, rows)
    guessed = rng.uniform(size=rows) > trust
    truth = np.where(event >= 0, 3 + event, color)
    return pa.table(
        {
            "image": pa.FixedShapeTensorArray.from_numpy_ndarray(images),
            "series": pa.array(series, pa.list_(pa.float32())),
            "score": score.astype(np.float32),
            "class": np.where(guessed, rng.integers(0, NUM_CLASSES, rows), truth),
            "score_weight": (noise**-2 / np.mean(noise**-2)).astype(np.float32),
            "class_weight": trust.astype(np.float32),
        }
    )
