"""Sources, storage, artifacts and predictions on S3 while some requests fail."""

from __future__ import annotations

import csv
import json
from typing import Any

import fsspec
import keras
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import raykeras as rk
from raykeras.checkpoint.store import MODEL_FILE, STATE_FILE
from raykeras.core import storage_errors
from tests.support.compare import assert_same_weights
from tests.support.models import TWO
from tests.support.s3 import S3

ROWS, BATCH = 96, 16
RNG = np.random.default_rng(0)
X = RNG.normal(size=(ROWS, 4)).astype(np.float32)
Y = (X[:, :1] > 0).astype(np.float32)


def build() -> Any:
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(5, "relu"), keras.layers.Dense(1, "sigmoid")])
    model.compile("adam", "binary_crossentropy", metrics=["accuracy"])
    return model


@pytest.fixture
def source(bucket: str) -> rk.Source:
    fs, folder = fsspec.core.url_to_fs(f"{bucket}/data")
    table = pa.table({**{f"f{i}": X[:, i] for i in range(4)}, "y": Y[:, 0]})
    for part in range(3):
        with fs.open(f"{folder}/{part}.parquet", "wb") as file:
            pq.write_table(table.slice(part * 32, 32), file, row_group_size=16)
    return rk.parquet(f"{bucket}/data", x=[f"f{i}" for i in range(4)], y=["y"])


def events_of(path: str) -> list[str]:
    with fsspec.open(f"{path}/events.jsonl") as file:
        return [json.loads(line)["event"] for line in file]


@pytest.mark.usefixtures("two_workers")
def test_two_workers_match_keras_while_requests_fail(bucket: str, source: rk.Source, s3_server: S3) -> None:
    model = build()
    expected = model.fit(X, Y, batch_size=BATCH, epochs=3, shuffle=False, validation_data=(X, Y), verbose=0).history
    run = rk.Run(storage=f"{bucket}/runs", name="run")

    def fit(epochs: int) -> rk.Result:
        callbacks = [
            keras.callbacks.ModelCheckpoint("best.keras", save_best_only=True),
            keras.callbacks.TensorBoard("tb"),
        ]
        return rk.fit(
            build, source, batch_size=BATCH, epochs=epochs, shuffle=False, validation_data=source, callbacks=callbacks,
            scale=TWO, run=run, verbose=0,
        )  # fmt: skip

    with (
        s3_server.failing("unavailable", method="PUT", path=f"checkpoints/epoch-000001/{MODEL_FILE}", last=1),
        s3_server.failing("dropped", method="PUT", path=f"checkpoints/epoch-000001/{STATE_FILE}", last=1),
        s3_server.failing("applied", method="PUT", path="best.keras", last=1),
        s3_server.failing("unavailable", method="PUT", path="events.jsonl", last=1),
    ):
        fit(2)
    result = fit(3)
    for name, values in expected.items():
        np.testing.assert_allclose(result.history[name], values, rtol=1e-5, atol=1e-6, err_msg=name)
    assert result.checkpoints[-1].epoch == 3
    assert_same_weights(result.model(), model, rtol=1e-4, atol=1e-5)
    events = events_of(result.path)
    assert "StorageFailed" in events and events.count("RunEnded") == 2
    with fsspec.open(f"{result.path}/history.csv", "r") as file:
        np.testing.assert_allclose([float(row["loss"]) for row in csv.DictReader(file)], result.history["loss"])
    fs, folder = fsspec.core.url_to_fs(f"{result.path}/artifacts", use_listings_cache=False)
    artifacts = {path[len(folder) :].strip("/") for path in fs.find(folder)}
    assert "best.keras" in artifacts and any(name.startswith("tb/train/events") for name in artifacts)

    output = f"{bucket}/out"
    with s3_server.failing("unavailable", method="PUT", path="out/part-", first=2, last=2):
        rk.predict(result.checkpoints[-1], source, batch_size=BATCH, scale=TWO, output=output)
    opened = rk.parquet(output, x="prediction").open()
    assert opened.unit_rows.sum() == ROWS
    fs, folder = fsspec.core.url_to_fs(output)
    table = pa.concat_tables(pq.read_table(path, filesystem=fs) for path in fs.glob(f"{folder}/*.parquet"))
    predicted = np.stack([np.ravel(value) for value in table["prediction"].to_pylist()])
    np.testing.assert_allclose(predicted, model.predict(X, verbose=0), atol=1e-5)


def test_incomplete_predictions_are_refused_as_source(
    bucket: str, source: rk.Source, s3_server: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_errors, "READ_PAUSES_S", (0.0,))
    output, model = f"{bucket}/out", build()
    with (
        s3_server.failing("unavailable", method="PUT", path="out/part-", first=3),
        pytest.raises(rk.RaykerasError, match=r"It holds 2 parts .* Call `predict` again with the same `output`"),
    ):
        rk.predict(model, source, output=output)
    with pytest.raises(rk.SourceError, match="A source must be complete"):
        rk.parquet(output, x="prediction").open()
    rk.predict(model, source, output=output)
    assert rk.parquet(output, x="prediction").open().unit_rows.sum() == ROWS


def test_failed_log_upload_hides_neither_result_nor_error(bucket: str, s3_server: S3) -> None:
    class Fails(keras.callbacks.Callback):  # type: ignore[misc]
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            raise LookupError("in the callback")

    options: dict[str, Any] = {"batch_size": BATCH, "epochs": 1, "verbose": 0}
    with s3_server.failing("denied", method="PUT", path="events.jsonl"):
        with pytest.warns(UserWarning, match="Some files of the run.s log could not be written"):
            result = rk.fit(build, X, Y, run=rk.Run(storage=bucket, name="done"), **options)
        assert len(result.history["loss"]) == 1 and result.checkpoints[-1].epoch == 1
        with (
            pytest.warns(UserWarning, match="Some files of the run.s log could not be written"),
            pytest.raises(rk.UserCodeError, match="in the callback"),
        ):
            rk.fit(build, X, Y, callbacks=[Fails()], run=rk.Run(storage=bucket, name="fails"), **options)
