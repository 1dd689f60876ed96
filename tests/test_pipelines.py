"""The pipelines that are shipped: beside plain Keras on the same Parquet, and by their own first command."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import raykeras as rk
from raykeras.pipeline import load_pipeline

ROOT = Path(__file__).parent.parent
MULTI_IO, IMBALANCED = ROOT / "pipelines" / "multi_io.py", ROOT / "pipelines" / "imbalanced.py"


class Watch(keras.callbacks.Callback):
    """A callback of the user's own, registered nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        self.losses.append((logs or {})["val_loss"])


def fitted(loaded: rk.Pipeline, storage: Path) -> rk.Result:
    """The pipeline's own fit, in the order of its files, with a callback more."""
    watch = Watch()
    options: dict[str, Any] = {"validation_data": loaded.validation, **loaded.fit, "shuffle": False, "verbose": 0}
    options["callbacks"] = [*options.get("callbacks", ()), watch]
    result = rk.fit(loaded.model, loaded.train, **options, run=rk.Run(storage=str(storage)))
    assert watch.losses == result.history["val_loss"]
    return result


def plain(loaded: rk.Pipeline, *data: Any, **options: Any) -> tuple[dict[str, list[float]], Any]:
    """Plain Keras' fit of the same model: its history, and the model."""
    keras.utils.set_random_seed(0)
    model = loaded.model()
    options = {"shuffle": False, "verbose": 0, "batch_size": loaded.fit["batch_size"], **options}
    return model.fit(*data, epochs=loaded.fit["epochs"], **options).history, model


def assert_same(result: rk.Result, history: dict[str, list[float]], model: Any) -> None:
    assert set(result.history) == set(history)
    for name, values in history.items():
        np.testing.assert_allclose(result.history[name], values, rtol=1e-5, err_msg=name)
    for ours, theirs in zip(result.model().get_weights(), model.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def numpy(table: pa.Table, *names: str) -> list[np.ndarray]:
    return [table[name].to_numpy() for name in names]


def test_two_inputs_and_two_outputs_train_as_in_plain_keras(tmp_path: Path) -> None:
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
        return x, [score, keras.utils.to_categorical(label, 5)], weights  # Keras 3 takes such weights as a list only

    x, y, weights = arrays("train")
    history, model = plain(loaded, x, y, sample_weight=weights, validation_data=arrays("test"))
    assert_same(fitted(loaded, tmp_path), history, model)


def test_class_weights_multiply_with_sample_weights_and_the_best_weights_come_back(tmp_path: Path) -> None:
    parameters = {"epochs": "6", "patience": "1"}
    loaded, again = load_pipeline(IMBALANCED, parameters), load_pipeline(IMBALANCED, parameters)
    assert isinstance(loaded.train.x, list)
    table = pq.read_table(IMBALANCED.parent / "crashes" / "train")
    x = np.stack(numpy(table, *loaded.train.x), axis=1).astype(np.float32)
    dead, weight = numpy(table, "dead", "weight")
    assert 0.04 < dead.mean() < 0.05
    kept, held_out = slice(0, int(len(x) * 0.8)), slice(int(len(x) * 0.8), None)
    class_weight = loaded.fit["class_weight"]
    # Keras itself refuses the two together
    both = weight[kept] * np.where(dead[kept] == 1, class_weight[1], class_weight[0]).astype(np.float32)
    validation = (x[held_out], dead[held_out], weight[held_out])
    (theirs,) = again.fit["callbacks"]
    history, model = plain(
        loaded, x[kept], dead[kept], sample_weight=both, validation_data=validation, callbacks=[theirs]
    )
    assert_same(fitted(loaded, tmp_path), history, model)
    (ours,) = loaded.fit["callbacks"]
    assert (ours.best_epoch, ours.stopped_epoch) == (theirs.best_epoch, theirs.stopped_epoch)
    np.testing.assert_allclose(ours.best, max(history["val_auc"]), rtol=1e-5)
    assert ours.best > 0.85


def test_data_that_are_made_are_whole_and_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    loaded = load_pipeline(MULTI_IO, {"rows": "8"})
    (folder,) = tmp_path.iterdir()
    made = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert load_pipeline(MULTI_IO, {"rows": "8"}).train.paths == loaded.train.paths
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == made
    load_pipeline(MULTI_IO, {"rows": "8", "data": str(tmp_path / "other" / "data")})
    assert pq.read_table(tmp_path / "other" / "data").equals(pq.read_table(folder))
    with pytest.raises(OSError, match="not empty"):
        load_pipeline(MULTI_IO, {"rows": "8", "data": str(folder / "train")})


@pytest.mark.parametrize(
    ("path", "options", "num_epochs", "metric"),
    [
        (MULTI_IO, ["-s", "data={folder}/data"], {5}, "val_class_output_categorical_accuracy"),
        (IMBALANCED, [], set(range(3, 13)), "val_auc"),
    ],
    ids=["multi_io", "imbalanced"],
)
def test_the_first_command_runs_as_it_stands(
    path: Path, options: list[str], num_epochs: set[int], metric: str, tmp_path: Path
) -> None:
    documentation = ast.get_docstring(ast.parse(path.read_text())) or ""
    command = shlex.split(re.findall(r"^ +(raykeras .*)$", documentation, re.MULTILINE)[0])
    command = [sys.executable, "-m", "raykeras.cli", *command[1:], "--storage", str(tmp_path / "runs")]
    command += [option.format(folder=tmp_path) for option in options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    shown = re.findall(rf"^epoch (\d+)/.* {metric} ([\d.]+)", done.stdout, re.MULTILINE)
    assert [int(epoch) for epoch, _ in shown] == list(range(1, len(shown) + 1))
    assert len(shown) in num_epochs
    assert float(shown[-1][1]) > float(shown[0][1])
    assert list((tmp_path / "runs").glob(f"{path.stem}-*/checkpoints/epoch-{len(shown):06d}/model.keras"))
