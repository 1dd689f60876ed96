"""The examples of docs/guides/trackers.md on one worker and on two: what a tracker stored equals `Result.history`.

The trackers are imported where used, since importing them takes 5 s.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import raykeras as rk
from tests.support.markdown import ROOT, python_blocks
from tests.support.models import SCORE, TWO, X
from tests.support.resuming import loser
from tests.support.tracked import Stored, in_comet, in_mlflow, in_tensorboard, in_wandb

PAGE = ROOT / "docs" / "guides" / "trackers.md"
EPOCHS = 3
STEPS = 2  # 60 rows in batches of 32

NumWorkers = pytest.mark.parametrize("workers", [1, 2])
pytestmark = pytest.mark.usefixtures("two_workers")


def build() -> Any:
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse", metrics=["mae"])
    return model


@pytest.fixture(scope="module", autouse=True)
def quiet_trackers() -> Iterator[None]:
    """Let trackers send nothing about themselves, and restore what W&B replaces in Python."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("DO_NOT_TRACK", "MLFLOW_DISABLE_TELEMETRY", "WANDB_SILENT"):
            patch.setenv(name, "true")
        for name in ("COMET_ERROR_TRACKING_ENABLE", "WANDB_ERROR_REPORTING"):
            patch.setenv(name, "false")
        patch.setenv("COMET_LOGGING_CONSOLE", "ERROR")
        for name in ("excepthook", "exit"):
            patch.setattr(sys, name, getattr(sys, name))
        yield


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let trackers write to the test's folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the SQLite file of a store of MLflow without runs, which takes seconds to make."""
    import mlflow

    folder = tmp_path_factory.mktemp("mlflow")
    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # for the artifacts of the runs
        mlflow.search_runs(output_format="list")
    return folder / "mlflow.db"


@pytest.fixture
def mlflow_store(empty_store: Path, folder: Path) -> Iterator[str]:
    """Return the URI of an empty store in the test's folder; end MLflow's runs and autologging after the test."""
    import mlflow.keras
    import mlflow.tensorflow

    shutil.copy(empty_store, folder / "mlflow.db")
    yield f"sqlite:///{folder}/mlflow.db"
    for flavor in (mlflow.tensorflow, mlflow.keras):
        flavor.autolog(disable=True)
    while mlflow.active_run():
        mlflow.end_run()


@pytest.fixture
def wandb_ends() -> Iterator[None]:
    """End W&B's process, which keeps the folder of the first run, after the test."""
    import wandb

    yield
    wandb.teardown()


def run_example(section: str, workers: int = 2, flavor: str = "tensorflow", **names: Any) -> dict[str, Any]:
    """Run the first block of a section of the page.

    Args:
        section: Heading of the section.
        workers: Number of workers.
        flavor: Module of MLflow.
        names: Names that the block uses, in place of the usual ones.

    Returns:
        The names that it leaves.
    """
    heading = PAGE.read_text().splitlines().index(f"## {section}")
    code = next(block.code for block in python_blocks(PAGE) if not block.code[:heading].strip())
    code = code.replace("workers=2", f"workers={workers}")
    code = code.replace("mlflow.tensorflow", f"mlflow.{flavor}")
    code = code.replace("sqlite:///", f"sqlite:///{Path.cwd()}/")  # MLflow keeps the connection to a URI
    names = {"rk": rk, "keras": keras, "build": build, "x": X, "y": SCORE, **names}
    exec(compile(code, PAGE.name, "exec"), names)
    return names


def in_history(result: rk.Result) -> Stored:
    assert all(len(values) == len(result.epoch) for values in result.history.values())
    return {name: [*enumerate(values)] for name, values in result.history.items()}


def assert_equal(stored: Stored, expected: Stored) -> None:
    assert set(stored) == set(expected)
    for name, points in expected.items():
        assert [epoch for epoch, _ in stored[name]] == [epoch for epoch, _ in points], name
        np.testing.assert_allclose(*([value for _, value in of] for of in (stored[name], points)), rtol=1e-6)


@NumWorkers
@pytest.mark.usefixtures("mlflow_store")
def test_mlflow_callback_stores_history(workers: int) -> None:
    result = run_example("MLflow", workers)["result"]
    assert_equal(in_mlflow(), in_history(result))


@pytest.mark.parametrize(
    ("workers", "flavor"),
    [(1, "tensorflow"), (1, "keras"), (2, "tensorflow"), pytest.param(2, "keras", marks=pytest.mark.exhaustive)],
)
@pytest.mark.usefixtures("mlflow_store")
def test_mlflow_autolog_stores_history(workers: int, flavor: str) -> None:
    import mlflow

    model = build() if (workers, flavor) == (1, "tensorflow") else build
    result = run_example("MLflow's autologging", workers, flavor=flavor, build=model)["result"]
    assert mlflow.active_run() is None
    assert_equal(in_mlflow(), in_history(result))


@NumWorkers
@pytest.mark.usefixtures("wandb_ends")
def test_wandb_callback_stores_history(workers: int) -> None:
    result = run_example("Weights & Biases", workers)["result"]
    rate = [(epoch, 0.01) for epoch in range(EPOCHS)]
    assert_equal(in_wandb(), {**in_history(result), "learning_rate": rate})


@NumWorkers
def test_comet_callback_stores_history(workers: int) -> None:
    result = run_example("Comet", workers)["result"]
    assert_equal(in_comet(result.history, STEPS), in_history(result))


def test_tensorboard_callback_stores_history() -> None:
    result = run_example("TensorBoard", workers=1)["result"]
    stored = in_tensorboard(Path("logs"))
    stored.pop("learning_rate", None)
    assert_equal(stored, in_history(result))


@pytest.mark.usefixtures("wandb_ends")
def test_restarted_and_resumed_run_is_stored_once(mlflow_store: str, folder: Path) -> None:
    import mlflow.tensorflow
    import wandb
    from wandb.integration.keras import WandbMetricsLogger

    mlflow.set_tracking_uri(mlflow_store)
    fit_and_log = run_example("Restarts and resuming", mlflow=mlflow)["fit_and_log"]
    for epochs in (EPOCHS, EPOCHS + 1):
        with wandb.init(project="digits", id="digits-1", resume="allow", mode="offline"):
            schedule = keras.callbacks.LearningRateScheduler(lambda epoch: 0.01 / (epoch + 1))
            callbacks = [WandbMetricsLogger(), schedule, loser(("begin 2",), str(folder))]
            result = fit_and_log("digits", epochs, *callbacks)
    assert Path(result.path, "events.jsonl").read_text().count('"RunRestarted"') == 1
    history = in_history(result)
    assert history["learning_rate"] == [(epoch, pytest.approx(0.01 / (epoch + 1))) for epoch in range(EPOCHS + 1)]
    assert_equal(in_mlflow(), history)
    assert_equal(in_wandb(), history)


@pytest.mark.usefixtures("wandb_ends")
def test_callbacks_that_need_the_model_or_steps_are_refused() -> None:
    import wandb
    from mlflow.tensorflow import MlflowCallback, MlflowModelCheckpointCallback
    from wandb.integration.keras import WandbMetricsLogger, WandbModelCheckpoint

    with wandb.init(project="digits", mode="offline"):
        refused = {
            r"`mlflow\.log_artifacts\(checkpoint\.path\)`": MlflowModelCheckpointCallback(),
            r"`wandb\.log_artifact\(checkpoint\.path": WandbModelCheckpoint("model.keras"),
            r"MlflowCallback with `log_every_n_steps=2`": MlflowCallback(False, 2),
            r"WandbMetricsLogger with `log_freq=1`": WandbMetricsLogger("batch"),
        }
        for message, callback in refused.items():
            with pytest.raises(rk.OptionError, match=message):
                rk.fit(build, X, SCORE, callbacks=[callback], scale=TWO)
        with pytest.raises(rk.OptionError, match="Log what `evaluate` returns"):
            rk.evaluate(build, X, SCORE, callbacks=[WandbMetricsLogger()], scale=TWO)
