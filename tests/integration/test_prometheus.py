"""The gauges that Ray's node exports to Prometheus."""

from __future__ import annotations

import time
import urllib.request
from pathlib import Path
from typing import Any

import keras
import pytest
from prometheus_client.parser import text_string_to_metric_families

import raykeras as rk
from raykeras.driver.prometheus import GAUGES
from tests.support.models import SCORE, TWO, X

EPOCHS, TIMEOUT_S = 2, 60


def build() -> Any:
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(0.01), "mse", metrics=["mae"])
    return model


def scraped(run: str) -> dict[tuple[str, ...], float]:
    """Return the values of a run, by gauge and tags."""
    import ray

    (node,) = (node for node in ray.nodes() if node["Alive"])
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(url) as response:
        families = list(text_string_to_metric_families(response.read().decode()))
    samples = [sample for family in families for sample in family.samples if sample.labels.get("run") == run]
    names = {f"ray_{name}": name for name in GAUGES}
    return {
        (names[sample.name], *(sample.labels[tag] for tag in GAUGES[names[sample.name]][0])): sample.value
        for sample in samples
    }


def fit(folder: Path, run: str) -> tuple[rk.Result, dict[tuple[str, ...], float]]:
    """Train a run on two workers; return its result and the exported values of its end."""
    result = rk.fit(
        build,
        X,
        SCORE,
        batch_size=16,
        epochs=EPOCHS,
        validation_split=0.2,
        callbacks=[keras.callbacks.LearningRateScheduler(lambda epoch: 0.01 / (1 + epoch))],
        verbose=0,
        scale=TWO,
        run=rk.Run(storage=str(folder), name=run),
    )
    deadline = time.monotonic() + TIMEOUT_S
    loss = ("raykeras_epoch_metric", "validation", "loss")
    while (values := scraped(run)).get(loss) != result.history["val_loss"][-1]:  # Ray exports every 10 s
        assert time.monotonic() < deadline, values
        time.sleep(1)
    return result, values


@pytest.mark.usefixtures("two_workers")
def test_exported_gauges_equal_history(tmp_path: Path) -> None:
    result, values = fit(tmp_path, "gauges")
    for name, history in result.history.items():
        data = "validation" if name.startswith("val_") else "train"
        assert values.pop(("raykeras_epoch_metric", data, name.removeprefix("val_"))) == history[-1]
        if data == "train" and name != "learning_rate":  # which is in the logs of epochs only
            assert values.pop(("raykeras_batch_metric", name)) == pytest.approx(history[-1])
    assert values.pop(("raykeras_learning_rate",)) == pytest.approx(0.005)
    assert values.pop(("raykeras_epoch",)) == EPOCHS
    assert values.pop(("raykeras_step",)) == result.params["steps"]
    assert values.pop(("raykeras_workers",)) == 2
    assert values.pop(("raykeras_restarts",)) == 0
    assert values.pop(("raykeras_checkpoint_timestamp_seconds",)) == pytest.approx(time.time(), abs=TIMEOUT_S)
    for rank in "01":
        assert values.pop(("raykeras_worker_step_seconds", rank)) > 0
        assert 0 <= values.pop(("raykeras_worker_data_wait_ratio", rank)) <= 1
    assert 0 <= values.pop(("raykeras_data_wait_ratio",)) <= 1
    assert values.keys() == {("raykeras_rows_per_second",), ("raykeras_checkpoint_seconds",)}
    assert min(values.values()) > 0


@pytest.mark.exhaustive
@pytest.mark.usefixtures("two_workers")
def test_gauges_of_ended_run_disappear(tmp_path: Path) -> None:
    fit(tmp_path, "ended")
    deadline = time.monotonic() + TIMEOUT_S
    while scraped("ended"):
        assert time.monotonic() < deadline
        time.sleep(1)
