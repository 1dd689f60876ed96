"""What a run leaves in its folder: `run.json`, TensorBoard's scalars, and events that give its result and goodput."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import keras
import numpy as np
import pytest
from click.testing import CliRunner

import raykeras as rk
from raykeras.cli.main import main
from raykeras.core import events
from raykeras.driver.tensorboard import TensorBoardLog
from tests.support.models import SCORE, TWO, X

EPOCHS, PAUSE_S = 3, 0.7
PIPELINE = """
import keras, numpy as np, raykeras as rk

def pipeline(api_key: str, rows: int = 64) -> rk.Pipeline:
    def build():
        model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
        model.compile("sgd", "mse")
        return model

    x = np.ones((rows, 2), "float32")
    return rk.Pipeline(model=build, train=rk.npy({path!r}, x="x", y="y"), fit={{"verbose": 0}})
"""


class Pausing(keras.callbacks.Callback):  # type: ignore[misc]
    """Makes a run long enough for its time to be compared with that of its buckets."""

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        time.sleep(PAUSE_S)


def build() -> Any:
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(0.01), "mse", metrics=["mae"])
    return model


@dataclass
class Trained:
    """A run, how long its calls of `fit` took, and what they returned."""

    storage: str
    seconds: float = 0.0
    results: list[rk.Result] = field(default_factory=list)

    def fit(self, epochs: int, **options: Any) -> None:
        run = rk.Run(storage=self.storage, name="run", seed=3)
        callbacks = [Pausing(), keras.callbacks.ReduceLROnPlateau("loss", factor=0.5, patience=0, min_delta=10)]
        begun = time.perf_counter()
        result = rk.fit(
            build, X, SCORE, batch_size=16, epochs=epochs, validation_data=(X, SCORE), verbose=0, run=run,
            callbacks=[*callbacks, *options.pop("callbacks", [])], **options,
        )  # fmt: skip
        self.seconds += time.perf_counter() - begun
        self.results.append(result)

    @property
    def record(self) -> dict[str, Any]:
        with fsspec.open(f"{self.storage}/run/run.json") as file:
            return json.load(file)  # type: ignore[no-any-return]


def check(trained: Trained, folder: Path) -> None:
    """Check the run's result, goodput and scalars; `folder` holds a copy of the run."""
    result = trained.results[-1]
    opened = rk.open_run(f"{trained.storage}/run")
    assert opened.epoch == list(range(EPOCHS)) and opened.history == result.history
    assert [saved.path for saved in opened.checkpoints] == [saved.path for saved in result.checkpoints]

    assert sum(result.goodput.values()) == pytest.approx(trained.seconds, rel=0.02)
    assert opened.goodput == result.goodput
    assert result.goodput["other"] >= EPOCHS * PAUSE_S
    assert all(result.goodput[name] > 0 for name in ("start", "build", "steps", "validation", "checkpoints"))
    assert result.goodput["lost"] == result.goodput["restart"] == 0

    train, validation = scalars(folder / "tensorboard/train"), scalars(folder / "tensorboard/validation")
    for name, values in result.history.items():
        written = validation if name.startswith("val_") else train
        np.testing.assert_allclose(written[f"epoch_{name.removeprefix('val_')}"], values, rtol=1e-6)
    np.testing.assert_allclose(train["epoch_learning_rate"], [0.01, 0.01, 0.005], rtol=1e-6)
    assert len(train["rows_per_second"]) == len(train["data_wait"]) == EPOCHS

    (info,) = rk.runs(trained.storage)
    assert (info.name, info.status, info.epochs, info.total_epochs) == ("run", "completed", EPOCHS, EPOCHS)
    assert info.logs["val_loss"] == result.history["val_loss"][-1]
    assert info.seconds == pytest.approx(sum(result.goodput.values()))


def scalars(folder: Path) -> dict[str, list[float]]:
    """Return the values that TensorBoard shows, by tag."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    points = {tag: accumulator.Scalars(tag) for tag in accumulator.Tags()["scalars"]}
    assert all([point.step for point in of_tag] == list(range(EPOCHS)) for of_tag in points.values())
    return {tag: [point.value for point in of_tag] for tag, of_tag in points.items()}


def test_run_is_recorded(tmp_path: Path) -> None:
    trained = Trained(str(tmp_path))
    logs = tmp_path / "own"
    trained.fit(EPOCHS, class_weight={0: 1.0}, callbacks=[keras.callbacks.TensorBoard(str(logs))])
    assert list(logs.glob("train/events.out.tfevents.*"))
    check(trained, tmp_path / "run")
    record = trained.record
    (call,) = record["calls"]
    arguments = call["arguments"]
    assert (arguments["batch_size"], arguments["epochs"], arguments["class_weight"]) == (16, EPOCHS, {"0": 1.0})
    assert (arguments["run"]["seed"], arguments["scale"]["workers"]) == (3, 1)
    assert call["model"] == "build" and call["callbacks"] == ["Pausing", "ReduceLROnPlateau", "TensorBoard"]
    assert call["data"]["train"]["rows"] == len(X) and call["data"]["train"]["fingerprint"]
    assert call["data"]["train"]["schema"]["x"] == ["dense", "float32", [8]]
    assert call["versions"]["keras"] == keras.__version__ and call["versions"]["python"] == platform.python_version()
    assert set(call["git"] or {"commit", "dirty"}) == {"commit", "dirty"}
    assert call["nodes"][0]["resources"]["CPU"] > 0
    assert record["model"]["parameters"] == 9 and "Total params: 9" in record["model"]["summary"]
    assert record["model"]["optimizer"]["class"] == "SGD"
    assert record["model"]["optimizer"]["learning_rate"] == pytest.approx(0.01)


@pytest.mark.usefixtures("two_workers")
def test_run_on_two_workers_is_recorded(tmp_path: Path) -> None:
    trained = Trained(str(tmp_path))
    trained.fit(EPOCHS, scale=TWO)
    check(trained, tmp_path / "run")
    assert trained.record["calls"][0]["arguments"]["scale"]["workers"] == 2
    assert trained.record["model"]["parameters"] == 9


def test_resumed_run_on_remote_storage_is_one_run(tmp_path: Path) -> None:
    trained = Trained(f"memory://{tmp_path.name}")
    trained.fit(EPOCHS - 1)
    trained.fit(EPOCHS)
    fsspec.filesystem("memory").get(f"/{tmp_path.name}/run/", f"{tmp_path}/run/", recursive=True)
    check(trained, tmp_path / "run")
    assert [call["arguments"]["epochs"] for call in trained.record["calls"]] == [EPOCHS - 1, EPOCHS]


def test_pipeline_is_recorded_without_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez(tmp_path / "data.npz", x=np.ones((64, 2), "float32"), y=np.ones((64, 1), "float32"))
    (tmp_path / "line.py").write_text(PIPELINE.format(path=str(tmp_path / "data.npz")))
    parameters = ["-s", "api_key=abc123==", "-s", "rows=32"]
    arguments = ["fit", f"{tmp_path}/line.py", *parameters, "--storage", f"{tmp_path}/runs"]
    monkeypatch.setattr(sys, "argv", ["raykeras", *arguments])
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    ((folder),) = (tmp_path / "runs").iterdir()
    text = (folder / "run.json").read_text() + (folder / "events.jsonl").read_text()
    assert "abc123" not in text
    (call,) = json.loads((folder / "run.json").read_text())["calls"]
    assert call["pipeline"] == {"file": f"{tmp_path}/line.py", "parameters": {"api_key": "***", "rows": "32"}}
    assert call["command"][:5] == ["raykeras", "fit", f"{tmp_path}/line.py", "-s", "api_key=***"]
    assert call["data"]["train"]["kind"] == "NpySource"
    listed = CliRunner().invoke(main, ["runs", f"{tmp_path}/runs"], env={"COLUMNS": "120"})
    assert "completed" in listed.output and "loss" in listed.output and folder.name in listed.output
    watched = CliRunner().invoke(main, ["watch", str(folder)])
    assert watched.exit_code == 0 and "Epoch 1/1: 2/2" in watched.output
    assert watched.output.splitlines()[-1].endswith(")") and "in training steps" in watched.output.splitlines()[-1]


@pytest.mark.parametrize("is_new_call", [False, True])
def test_tensorboard_shows_repeated_epochs_once(tmp_path: Path, is_new_call: bool) -> None:
    log = TensorBoardLog(str(tmp_path))
    position = {"params": {}, "replicas": 1, "path": ""}
    log(events.RunStarted(workers=1, initial_epoch=0, **position))
    for epoch in range(EPOCHS):
        log(events.EpochEnded(epoch=epoch, step=1, logs={"loss": 1.0}))
    if is_new_call:  # after this process was killed
        log = TensorBoardLog(str(tmp_path))
        log(events.RunStarted(workers=1, initial_epoch=1, **position))
    else:
        log(events.RunRestarted(epoch=1, step=2, workers=1, attempt=1))
    for epoch in (1, 2):
        log(events.EpochEnded(epoch=epoch, step=1, logs={"loss": 0.5}))
    log(events.RunEnded(status="completed", logs={}))
    assert scalars(tmp_path / "tensorboard/train")["epoch_loss"] == [1.0, 0.5, 0.5]


def test_tensorboard_command_reads_run(tmp_path: Path) -> None:
    rk.fit(build, X, SCORE, verbose=0, run=rk.Run(storage=str(tmp_path), name="run"))
    command = [sys.executable, "-m", "raykeras.cli.main", "tensorboard", f"{tmp_path}/run", "--inspect"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "epoch_loss" in done.stdout and f"{tmp_path}/run/tensorboard/train" in done.stdout


def test_commands_on_folders_without_runs_exit_with_2(tmp_path: Path) -> None:
    for command in ("runs", "watch", "tensorboard"):
        done = CliRunner().invoke(main, [command, str(tmp_path)])
        assert done.exit_code == 2 and "raykeras: error: " in done.output
