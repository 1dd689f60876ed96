"""A run continues with as many workers as fit and grows when there is room; hung workers are restarted."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import raykeras as rk
from raykeras.checkpoint.store import RunFolder
from raykeras.data.streaming.resources import CpuBudget
from raykeras.driver import worker_pool
from raykeras.driver.elastic import capacity, wait_for_capacity
from tests.support import four_nodes, two_nodes
from tests.support.compare import assert_same_weights
from tests.support.cpus import all_held_but
from tests.support.fork_server import ForkServer
from tests.support.models import TWO
from tests.support.resuming import fit


@pytest.mark.usefixtures("tensorflow")
def test_node_is_lost_comes_back_and_is_drained(forked: ForkServer, tmp_path: Path) -> None:
    ended = forked.run(two_nodes.main, str(tmp_path), timeout_s=600)
    assert ended.exit_code == 0, ended.output
    *events, last = [json.loads(line) for line in ended.output.splitlines() if line.startswith("{")]
    uninterrupted = fit(str(tmp_path), "uninterrupted", epochs=two_nodes.EPOCHS, dropout=0)
    for name, values in uninterrupted.history.items():
        np.testing.assert_allclose(last["history"][name], values, rtol=1e-5, err_msg=name)
    newest = RunFolder(str(tmp_path / "elastic")).checkpoints()[-1]
    assert_same_weights(newest.load_model(), uninterrupted.model(), rtol=1e-4, atol=1e-5)

    resized = [(e["before"], e["workers"]) for e in events if e["event"] == "WorldResized"]
    assert resized == [(2, 1), (1, 2), (2, 1)]
    restarted = [(e["epoch"], e["step"]) for e in events if e["event"] == "RunRestarted"]
    assert restarted == sorted(restarted) and restarted[0] >= (1, 1)
    times_resized = itertools.accumulate(event["event"] == "WorldResized" for event in events)
    failed = [
        (event, number) for event, number in zip(events, times_resized, strict=True) if event["event"] == "WorkerFailed"
    ]
    assert failed and all(event["cause"] and event["next"] for event, _ in failed)
    assert all(number < 2 for _, number in failed)  # all workers leave a drained node before it is removed


@pytest.mark.exhaustive
@pytest.mark.usefixtures("tensorflow")
@pytest.mark.parametrize("kind", ["fixed", "elastic"])
def test_four_workers_on_four_nodes_match_one(kind: str, forked: ForkServer, tmp_path: Path) -> None:
    ended = forked.run(four_nodes.main, str(tmp_path), kind, timeout_s=600)
    assert ended.exit_code == 0, ended.output
    *events, last = [json.loads(line) for line in ended.output.splitlines() if line.startswith("{")]
    uninterrupted = fit(str(tmp_path), "uninterrupted", epochs=four_nodes.EPOCHS, dropout=0)
    for name, values in uninterrupted.history.items():
        np.testing.assert_allclose(last["history"][name], values, rtol=1e-5, err_msg=name)
    newest = RunFolder(str(tmp_path / kind)).checkpoints()[-1]
    assert_same_weights(newest.load_model(), uninterrupted.model(), rtol=1e-4, atol=1e-5)
    nodes = [path.read_text() for path in tmp_path.glob("node-of-rank-*")]
    assert len(set(nodes)) == 4
    if kind == "fixed":
        assert set(nodes) == set(last["trainers"])
    else:
        assert [(e["before"], e["workers"]) for e in events if e["event"] == "WorldResized"] == [(4, 2), (2, 4)]


def hanging(folder: Path, rank: int) -> Any:
    """Return a callback that hangs once, on one worker."""
    import keras

    class Hangs(keras.callbacks.Callback):  # type: ignore[misc]
        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            import ray.train

            once = folder / "hung"
            if epoch == 1 and ray.train.get_context().get_world_rank() == rank and not once.exists():
                once.touch()
                time.sleep(600)

    return Hangs()


@pytest.mark.usefixtures("ray_cluster")
def test_hanging_worker_is_restarted(tmp_path: Path) -> None:
    seen: list[rk.Event] = []
    run = {"hang_timeout_s": 6.0}
    result = fit(str(tmp_path), "run", [hanging(tmp_path, 1)], scale=TWO, dropout=0, run=run, on_event=seen.append)
    expected = fit(str(tmp_path), "uninterrupted", dropout=0)
    assert result.epoch == expected.epoch
    for name, values in expected.history.items():
        np.testing.assert_allclose(result.history[name], values, rtol=1e-5, err_msg=name)
    failed = [event for event in seen if isinstance(event, rk.WorkerFailed)]
    assert len(failed) == 1 and "no step for 6 s" in failed[0].cause
    stacks = {path.name: path.read_text() for path in Path(result.path, "stacks").iterdir()}
    assert "attempt-0-rank-1.txt" in stacks  # also rank 0's, unless its process ended first
    assert "on_epoch_begin" in stacks["attempt-0-rank-1.txt"]


@pytest.mark.usefixtures("ray_cluster")
def test_capacity_counts_partially_used_cpu() -> None:
    """More workers than fit next to their read tasks would never be scheduled."""
    job: Any = SimpleNamespace(requested_scale=TWO, scale=TWO, budget=CpuBudget(1.0))
    worker_pool.prepare(rk.Scale(workers=3), 1.0)  # ends idle workers of earlier tests
    with all_held_but(2.75):
        assert wait_for_capacity(job) == 2
    with all_held_but(2.0):
        assert capacity(job, allow_partial_cpu=True) == 1  # the other CPU is for read tasks
