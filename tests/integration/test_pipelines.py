"""The pipelines that come with the project match plain Keras on the same Parquet."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import raykeras as rk
from raykeras.cli.pipeline import load_pipeline
from tests.support.compare import assert_same_training

ROOT = Path(__file__).parents[2]
MULTI_IO, IMBALANCED = ROOT / "pipelines" / "multi_io.py", ROOT / "pipelines" / "imbalanced.py"


class Watchdog(keras.callbacks.Callback):
    """A user-defined callback without registration."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        self.losses.append((logs or {})["val_loss"])


def fitted(loaded: rk.Pipeline, storage: Path) -> rk.Result:
    """Fit as the pipeline defines, but without shuffling and with another callback."""
    watch = Watchdog()
    options: dict[str, Any] = {"validation_data": loaded.validation, **loaded.fit, "shuffle": False, "verbose": 0}
    options["callbacks"] = [*options.get("callbacks", ()), watch]
    result = rk.fit(loaded.model, loaded.train, **options, run=rk.Run(storage=str(storage)))
    assert watch.losses == result.history["val_loss"]
    return result


def plain_fit(loaded: rk.Pipeline, *data: Any, **options: Any) -> tuple[dict[str, list[float]], Any]:
    """Fit the pipeline's model in plain Keras; return the history and the model."""
    keras.utils.set_random_seed(0)
    model = loaded.model()
    options = {"shuffle": False, "verbose": 0, "batch_size": loaded.fit["batch_size"], **options}
    return model.fit(*data, epochs=loaded.fit["epochs"], **options).history, model


def numpy(table: pa.Table, *names: str) -> list[np.ndarray]:
    return [table[name].to_numpy() for name in names]


def test_multi_io_matches_keras(tmp_path: Path) -> None:
    loaded = load_pipeline(MULTI_IO, {"data": str(tmp_path / "data"), "rows": "160", "epochs": "2"})

    def arrays(part: str) -> tuple[Any, Any, Any]:
        table = pq.read_table(tmp_path / "data" / part)
        lists = table["series"].to_pylist()
        assert len({len(values) for values in lists}) > 5
        series = np.zeros((len(lists), 24, 10), np.float32)
        for row, values in zip(series, lists, strict=True):
            row[: len(values) // 10] = np.reshape(values, (-1, 10))
        image = table["image"].combine_chunks().to_numpy_ndarray().astype(np.float32) / 255
        score, label, *weights = numpy(table, "score", "class", "score_weight", "class_weight")
        x = {"img_input": image, "ts_input": series}
        return x, [score, keras.utils.to_categorical(label, 5)], weights  # Keras 3 accepts these weights only as a list

    x, y, weights = arrays("train")
    expected = plain_fit(loaded, x, y, sample_weight=weights, validation_data=arrays("test"))
    assert_same_training(fitted(loaded, tmp_path), *expected)


def test_imbalanced_matches_keras(tmp_path: Path) -> None:
    parameters = {"epochs": "6", "patience": "1"}
    loaded, again = load_pipeline(IMBALANCED, parameters), load_pipeline(IMBALANCED, parameters)
    assert isinstance(loaded.train.x, list)
    table = pq.read_table(IMBALANCED.parent / "crashes" / "train")
    x = np.stack(numpy(table, *loaded.train.x), axis=1).astype(np.float32)
    dead, weight = numpy(table, "dead", "weight")
    assert 0.04 < dead.mean() < 0.05
    num_train = int(len(x) * 0.8)
    class_weight = loaded.fit["class_weight"]
    # plain Keras does not accept both together
    both = weight * np.where(dead == 1, class_weight[1], class_weight[0]).astype(np.float32)
    validation = tuple(array[num_train:] for array in (x, dead, weight))
    (stopping,), (plain_stopping,) = loaded.fit["callbacks"], again.fit["callbacks"]
    train = {"sample_weight": both[:num_train], "validation_data": validation, "callbacks": [plain_stopping]}
    history, model = plain_fit(loaded, x[:num_train], dead[:num_train], **train)
    assert_same_training(fitted(loaded, tmp_path), history, model)
    assert stopping.best_epoch == plain_stopping.best_epoch
    assert stopping.stopped_epoch == plain_stopping.stopped_epoch
    np.testing.assert_allclose(stopping.best, max(history["val_auc"]), rtol=1e-5)
    assert stopping.best > 0.85


def test_multi_io_data_is_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    loaded = load_pipeline(MULTI_IO, {"rows": "8"})
    (folder,) = tmp_path.iterdir()
    written = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert load_pipeline(MULTI_IO, {"rows": "8"}).train.paths == loaded.train.paths
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == written
    load_pipeline(MULTI_IO, {"rows": "8", "data": str(tmp_path / "other" / "data")})
    assert pq.read_table(tmp_path / "other" / "data").equals(pq.read_table(folder))
    with pytest.raises(OSError, match="not empty"):
        load_pipeline(MULTI_IO, {"rows": "8", "data": str(folder / "train")})
