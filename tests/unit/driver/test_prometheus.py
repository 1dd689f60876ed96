"""The gauges of a run's state, and the Grafana dashboard that shows them."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest

from raykeras.core import events
from raykeras.driver.prometheus import GAUGES, gauge_values
from raykeras.driver.run_state import RunState
from tests.support.markdown import ROOT

DASHBOARD = json.loads((ROOT / "docs" / "grafana" / "raykeras.json").read_text())


def expressions(panel: dict[str, Any]) -> list[str]:
    return [target["expr"] for target in panel["targets"]]


def test_every_gauge_has_values_and_tags() -> None:
    state = RunState()
    run = [
        events.RunStarted(params={"epochs": 2}, workers=2, replicas=2, initial_epoch=0, path="runs/a"),
        events.EpochStarted(epoch=0),
        events.EpochEnded(
            epoch=0, step=4, logs={"loss": 0.5, "f1": np.array([0.1, 0.2]), "val_loss": 0.25}, learning_rate=0.1
        ),
        events.CheckpointSaved(epoch=0, step=4, path="c", seconds=0.5, time=1000.0),
        events.RunRestarted(epoch=1, step=2, workers=1, attempt=1),
        events.EpochStarted(epoch=1),
        events.BatchEnded(epoch=1, step=3, logs={"loss": 0.4}, rows_per_s=100.0, data_wait=0.25),
        events.ValidationEnded(epoch=1, step=4, logs={"loss": 0.3}),
    ]
    for event in run:
        state(event)
    steps = events.WorkerStepsEnded(rank=1, epoch=0, num_steps=4, seconds=2.0, wait_s=0.5)
    unmeasured = events.WorkerStepsEnded(rank=0, epoch=0, num_steps=0, seconds=0.0, wait_s=0.0)
    values = {(name, *tags): value for name, tags, value in gauge_values(state, {0: unmeasured, 1: steps})}
    assert values == {
        ("raykeras_epoch",): 2,
        ("raykeras_step",): 3,
        ("raykeras_workers",): 1,
        ("raykeras_restarts",): 1,
        ("raykeras_rows_per_second",): 100.0,
        ("raykeras_data_wait_ratio",): 0.25,
        ("raykeras_batch_metric", "loss"): 0.4,
        ("raykeras_epoch_metric", "train", "loss"): 0.5,
        ("raykeras_epoch_metric", "train", "f1/0"): 0.1,
        ("raykeras_epoch_metric", "train", "f1/1"): 0.2,
        ("raykeras_epoch_metric", "validation", "loss"): 0.25,
        ("raykeras_learning_rate",): 0.1,
        ("raykeras_checkpoint_seconds",): 0.5,
        ("raykeras_checkpoint_timestamp_seconds",): 1000.0,
        ("raykeras_worker_step_seconds", "1"): 0.5,
        ("raykeras_worker_data_wait_ratio", "1"): 0.25,
    }
    assert {(name, len(tags)) for name, *tags in values} == {(name, len(tags)) for name, (tags, _) in GAUGES.items()}


def test_dashboard_shows_every_gauge_and_no_other() -> None:
    queries = [variable["definition"] for variable in DASHBOARD["templating"]["list"] if "definition" in variable]
    shown = [expression for panel in DASHBOARD["panels"] for expression in expressions(panel)]
    names = {name for expression in shown for name in re.findall(r"\bray_\w+", expression)}
    assert names == {f"ray_{name}" for name in GAUGES}
    assert {name for query in queries for name in re.findall(r"\bray_\w+", query)} <= names


@pytest.mark.parametrize("panel", DASHBOARD["panels"], ids=lambda panel: panel["title"])
def test_panel_uses_tags_that_its_gauge_has(panel: dict[str, Any]) -> None:
    for target in panel["targets"]:
        ((name, selector),) = re.findall(r"ray_(\w+)\{(.*)\}", target["expr"])
        tags = {"run", *GAUGES[name][0]}
        assert {"run"} <= set(re.findall(r"(\w+)=", selector)) <= tags
        assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= tags


def test_panels_do_not_overlap() -> None:
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in DASHBOARD["panels"])
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
