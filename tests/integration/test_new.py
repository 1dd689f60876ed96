"""From one's own Parquet file to predictions: `inspect`, `new`, `fit`, `report` and `predict`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

import raykeras as rk
from raykeras.cli.main import main

NUM_ROWS = 300


def run(*arguments: object) -> Any:
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return done


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: Path) -> None:
    """Write rows whose species follows from the sex and the brightness of the picture."""
    rng = np.random.default_rng(0)
    sex, brightness = rng.integers(0, 2, NUM_ROWS), rng.integers(1, 255, NUM_ROWS)
    species = np.where(sex == 0, "adelie", np.where(brightness > 128, "gentoo", "chinstrap"))
    pictures = np.broadcast_to(brightness[:, None, None, None], (NUM_ROWS, 8, 8, 3)).astype(np.uint8)
    table = {
        "sex": np.array(["male", "female"])[sex],
        "brightness": pa.array(brightness, mask=rng.random(NUM_ROWS) < 0.1),
        "mass": np.where(rng.random(NUM_ROWS) < 0.1, np.nan, rng.normal(4000, 500, NUM_ROWS)),
        "island": rng.integers(0, 3, NUM_ROWS),
        "picture": pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(pictures)),
        "calls": [list(range(rng.integers(0, 4))) for _ in range(NUM_ROWS)],
        "ring": [f"ring {i}" for i in range(NUM_ROWS)],
        "species": species,
    }
    pq.write_table(pa.table(table), path, row_group_size=50)


def test_five_commands_from_a_file_to_predictions(folder: Path) -> None:
    write(folder / "birds.parquet")
    assert "300 rows in 1 file" in run("inspect", "birds.parquet", "--balance", "species").output
    written = run("new", "birds.py", "--data", "birds.parquet", "--y", "species", "--category", "island")
    assert written.output.splitlines()[-1].strip() == "raykeras fit birds.py"
    run("fit", "birds.py", "-s", "epochs=8", "--name", "first", "--verbose", "0")
    losses = rk.open_run("runs/first").history["val_loss"]
    assert len(losses) == 8 and losses[-1] < 0.8 * losses[0]
    run("report", "runs/first")
    assert (folder / "report.html").stat().st_size > 10_000
    checkpoint = "runs/first/checkpoints/epoch-000008"
    run("predict", "birds.py", "--checkpoint", checkpoint, "--output", "predicted", "--column", "species")
    table = pq.read_table(folder / "predicted")
    assert table.num_rows == NUM_ROWS
    predicted = table["prediction"].combine_chunks().to_numpy_ndarray().argmax(1)
    accuracy = (np.array(["adelie", "chinstrap", "gentoo"])[predicted] == table["species"].to_numpy()).mean()
    assert accuracy > 0.6


@pytest.mark.parametrize(
    ("values", "loss"),
    [
        (np.arange(64) % 2, "binary_crossentropy"),
        (np.arange(64) % 3 * 10 - 10, "sparse_categorical_crossentropy"),
        (np.arange(64) * 1e5, "mean_squared_error"),
    ],
)
def test_every_kind_of_target_trains(folder: Path, values: np.ndarray, loss: str) -> None:
    vectors = pa.array(np.ones((64, 3)).tolist(), pa.list_(pa.float32(), 3))
    columns = {"flag": np.arange(64) % 4 == 0, "n": np.arange(64), "vector": vectors, "label": values}
    order = np.random.default_rng(0).permutation(64)
    pq.write_table(pa.table(columns).take(order), "data.parquet")
    assert f"loss {loss}" in run("new", "p", "--data", "data.parquet").output
    run("fit", "p.py", "-s", "epochs=1", "--name", "r", "--verbose", "0")
    history = rk.open_run("runs/r").history
    assert np.isfinite(history["loss"]).all() and np.isfinite(history["val_loss"]).all()


def test_first_batch_is_the_one_that_fit_trains_on(folder: Path) -> None:
    import keras

    seen: list[np.ndarray] = []

    class Recorder(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.dense = keras.layers.Dense(1)

        def call(self, x: Any) -> Any:
            return self.dense(x)

        def train_step(self, data: Any) -> dict[str, Any]:
            seen.append(data[0].numpy())
            return super().train_step(data)

    pq.write_table(pa.table({"x": np.arange(100.0), "y": np.zeros(100)}), "data.parquet", row_group_size=10)
    source = rk.parquet("data.parquet", x=["x"], y="y")
    model = Recorder()
    model.compile(loss="mse", run_eagerly=True)
    rk.fit(model, source, batch_size=16, epochs=1, verbose=0, run=rk.Run(seed=5))
    np.testing.assert_array_equal(seen[0], source.batch(16, seed=5)[0])


def test_dataset_is_described_once_it_has_run(folder: Path) -> None:
    import ray

    source = rk.dataset(ray.data.from_items([{"a": i, "b": [i]} for i in range(10)]), x="a", y="a")
    assert str(source).startswith("DatasetSource: `source.schema` reads its columns")
    assert source.head(3)["a"].tolist() == [0, 1, 2]
    x, y = source.batch(4, shuffle=False)
    assert x.tolist() == y.tolist() == [0, 1, 2, 3]
    assert "integer, int64" in str(source)
