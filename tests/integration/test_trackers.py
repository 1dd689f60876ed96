"""MLflow and Weights & Biases, offline, with raykeras. They are imported where used, since importing takes 3 s."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import pytest

import raykeras as rk
from tests.support.kept_workers import TWO
from tests.support.models import SCORE, X

EPOCHS = 3


def build() -> Any:
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse", metrics=["mae"])
    return model


def fit(folder: Path, *callbacks: Any, model: Any = build, **options: Any) -> list[float]:
    run = rk.Run(storage=str(folder / "runs"))
    result = rk.fit(model, X, SCORE, epochs=EPOCHS, callbacks=list(callbacks), verbose=0, run=run, **options)
    return result.history["mae"]


@pytest.fixture
def mlflow_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    import mlflow.tensorflow

    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    with mlflow.start_run() as run:
        yield run


def logged(run: Any) -> list[float]:
    import mlflow

    mlflow.flush_async_logging()
    assert len(mlflow.search_runs(output_format="list")) == 1  # no other run was started
    client = mlflow.MlflowClient()
    metrics = sorted(client.get_metric_history(run.info.run_id, "mae"), key=lambda metric: metric.step)
    assert [metric.step for metric in metrics] == list(range(EPOCHS))
    return [metric.value for metric in metrics]


@pytest.fixture
def wandb_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    import wandb

    monkeypatch.chdir(tmp_path)
    for name in ("excepthook", "exit"):  # wandb replaces them permanently
        monkeypatch.setattr(sys, name, getattr(sys, name))
    run = wandb.init(project="test", mode="offline", settings=wandb.Settings(silent=True))
    yield run
    run.finish()


@pytest.mark.parametrize("is_instance", [False, True], ids=["function", "instance"])
def test_mlflow_autolog_logs_metrics(is_instance: bool, mlflow_run: Any, tmp_path: Path) -> None:
    import mlflow

    model = build() if is_instance else build
    mlflow.tensorflow.autolog(log_models=False)
    try:
        expected = fit(tmp_path, model=model)
    finally:
        mlflow.tensorflow.autolog(disable=True)
    assert logged(mlflow_run) == pytest.approx(expected)


def test_mlflow_callback_logs_metrics(mlflow_run: Any, tmp_path: Path) -> None:
    import mlflow

    expected = fit(tmp_path, mlflow.tensorflow.MlflowCallback())
    assert logged(mlflow_run) == pytest.approx(expected)
    assert "opt_learning_rate" in mlflow.get_run(mlflow_run.info.run_id).data.params


def test_wandb_callback_logs_metrics(wandb_run: Any, tmp_path: Path) -> None:
    from wandb.integration.keras import WandbMetricsLogger

    expected = fit(tmp_path, WandbMetricsLogger())
    assert wandb_run.summary["epoch/epoch"] == EPOCHS - 1
    assert wandb_run.summary["epoch/mae"] == pytest.approx(expected[-1])


def test_tracker_callbacks_are_refused_on_two_workers(wandb_run: Any, tmp_path: Path) -> None:
    from mlflow.tensorflow import MlflowCallback
    from wandb.integration.keras import WandbMetricsLogger

    for callback, remedy in ((MlflowCallback(), r"mlflow\.log_metrics"), (WandbMetricsLogger(), r"wandb\.log")):
        with pytest.raises(rk.OptionError, match=rf"DriverCallback`: `{remedy}"):
            fit(tmp_path, callback, scale=TWO)


@pytest.mark.usefixtures("two_workers")
def test_driver_callback_logs_to_trackers_on_two_workers(mlflow_run: Any, wandb_run: Any, tmp_path: Path) -> None:
    import mlflow
    import wandb

    class Log(rk.DriverCallback):
        def on_epoch_end(self, epoch: int, logs: Any) -> None:
            mlflow.log_metrics(logs, step=epoch, run_id=mlflow_run.info.run_id)
            wandb.log({**logs, "epoch": epoch})

    expected = fit(tmp_path, Log(), scale=TWO)
    assert logged(mlflow_run) == pytest.approx(expected)
    assert wandb_run.summary["mae"] == pytest.approx(expected[-1])
