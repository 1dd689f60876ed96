"""A run whose processes are killed ends like an uninterrupted one: same history, weights and callback calls.

A run in one process is killed at every point, and workers are killed at two representative points. At the others,
workers raise instead; `python -m benchmarks.kill_points` kills them at every point.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray

import raykeras as rk
from raykeras.driver import worker_pool
from raykeras.driver.worker_pool import run_on_workers
from tests.support.fork_server import ForkServer
from tests.support.models import TWO
from tests.support.resuming import POINTS, assert_same, events_of, fit, killer, loser, recorder, steering, train

KILLED_BY_RANK = {0: ["write"], 1: ["step 1 2"]}
LOST = ["step 0 0", "step 1 4", "test 1", "begin 2", "end 2", "step 3 1"]


def test_every_point_is_covered() -> None:
    assert sorted([*LOST, *KILLED_BY_RANK[0], *KILLED_BY_RANK[1]]) == sorted(POINTS)


@pytest.mark.usefixtures("tensorflow")
def test_run_resumes_after_kill_at_any_point(forked: ForkServer, tmp_path: Path) -> None:
    calls, expected_calls = recorder(), recorder()
    uninterrupted = fit(str(tmp_path), "uninterrupted", [expected_calls, *steering()])
    for number, point in enumerate(POINTS):
        ended = forked.run(partial(train, points=POINTS), str(tmp_path))
        assert ended.exit_code == -signal.SIGKILL, ended.output
        assert (tmp_path / point).exists()
        assert not any((tmp_path / later).exists() for later in POINTS[number + 1 :])
    result = fit(str(tmp_path), "run", [calls, *steering()])
    assert_same(result, uninterrupted)
    assert calls.calls == expected_calls.calls
    starts = [(e["initial_epoch"], e["initial_step"]) for e in events_of(result.path) if e["event"] == "RunStarted"]
    assert starts == sorted(starts)
    assert len(starts) == len(POINTS) + 1
    assert any(step for _, step in starts)  # some of them mid-epoch


@pytest.fixture(scope="module")
def uninterrupted(kept_workers: None, tmp_path_factory: pytest.TempPathFactory) -> rk.Result:
    """Return the result of an uninterrupted run on two workers."""
    return fit(str(tmp_path_factory.mktemp("uninterrupted")), "uninterrupted", steering(), scale=TWO)


def test_killed_workers_are_restarted(uninterrupted: rk.Result, tmp_path: Path) -> None:
    seen: list[rk.Event] = []
    killers = [killer(points, str(tmp_path), rank) for rank, points in KILLED_BY_RANK.items()]
    started = time.time()
    result = fit(str(tmp_path), "run", [*steering(), *killers], scale=TWO, on_event=seen.append)
    goodput, wall_s = result.goodput, time.time() - started
    assert sum(goodput.values()) == pytest.approx(wall_s, rel=0.02)
    assert goodput["restart"] > 0 and goodput["steps"] > 0
    assert_same(result, uninterrupted)
    failed = assert_restarted(seen, len(KILLED_BY_RANK))
    assert {event.rank for event in failed} <= {0, 1} and all(event.node for event in failed)
    assert all("because" in event.cause or "Error" in event.cause for event in failed), [e.cause for e in failed]


@pytest.mark.usefixtures("two_workers")
def test_spares_take_the_place_of_lost_workers(
    uninterrupted: rk.Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spares: list[Any] = []

    def take_spares(standing_by: Any, take: Any = worker_pool._Spares.take) -> Any:
        spares.append(take(standing_by))
        return spares[-1]

    monkeypatch.setattr(worker_pool, "_SPARES_AFTER_S", 0.1)
    monkeypatch.setattr(worker_pool._Spares, "take", take_spares)
    seen: list[rk.Event] = []
    callbacks = [*steering(), killer(["step 1 2"], str(tmp_path), 1)]
    result = fit(str(tmp_path), "run", callbacks, scale=rk.Scale(workers=2), on_event=seen.append)
    assert_same(result, uninterrupted)
    (failed,) = assert_restarted(seen, 1)
    assert failed.rank == 1
    assert [group.is_usable for group in spares] == [True]  # they stay up for the next call


@pytest.mark.usefixtures("two_workers")
def test_run_resumes_after_lost_worker_at_any_point(uninterrupted: rk.Result, tmp_path: Path) -> None:
    seen: list[rk.Event] = []
    callbacks = [*steering(), loser(LOST, str(tmp_path))]
    result = fit(str(tmp_path), "run", callbacks, scale=TWO, on_event=seen.append)
    assert_same(result, uninterrupted)
    failed = assert_restarted(seen, len(LOST))
    assert [point for point, event in zip(LOST, failed, strict=True) if repr(point) not in event.cause] == []


def assert_restarted(seen: list[rk.Event], num_times: int) -> list[Any]:
    """Assert that failures and restarts were announced; return the failures."""
    failed = [event for event in seen if isinstance(event, rk.WorkerFailed)]
    assert len(failed) == num_times and all(event.next for event in failed)
    restarted = [event for event in seen if isinstance(event, rk.RunRestarted)]
    assert [event.attempt for event in restarted] == list(range(1, num_times + 1))
    return failed


@pytest.mark.usefixtures("two_workers")
def test_run_fails_after_max_failures_without_progress(tmp_path: Path) -> None:
    import keras

    class Fails(keras.callbacks.Callback):  # type: ignore[misc]
        def on_train_begin(self, logs: Any = None) -> None:
            raise rk.WorkerLostError("The worker of rank 1 was lost.")

    seen: list[rk.Event] = []
    options: dict[str, Any] = {"scale": TWO, "run": {"max_failures": 1}, "on_event": seen.append}
    with pytest.raises(rk.WorkerLostError, match="failure 2 without a new checkpoint; `max_failures` is 1"):
        fit(str(tmp_path), "run", [Fails()], **options)
    failed = [event.next for event in seen if isinstance(event, rk.WorkerFailed)]
    assert failed == ["training starts over", "the run fails"]


def wait_to_be_ended(config: dict[str, Any]) -> None:
    """Run on workers whose controller is killed."""
    import ray.train

    Path(config["folder"], str(ray.train.get_context().get_world_rank())).touch()
    time.sleep(600)


@pytest.mark.usefixtures("ray_cluster")
def test_lost_controller_leaves_no_placement_group(tmp_path: Path) -> None:
    def kill_controller() -> None:
        while len(os.listdir(tmp_path)) < TWO.workers:
            time.sleep(0.05)
        os.kill(youngest_process("ray::Controller"), signal.SIGKILL)

    before = placement_groups()
    threading.Thread(target=kill_controller, daemon=True).start()
    with pytest.raises(rk.WorkerLostError, match="controller") as caught:
        run_on_workers(wait_to_be_ended, {"folder": str(tmp_path)}, scale=TWO, cpus_per_worker=0.5)
    assert "controller" in caught.value.reason
    assert placement_groups() <= before  # idle workers of earlier tests end


def placement_groups() -> set[str]:
    """Return the ids of the groups that reserve resources."""
    return {name for name, group in ray.util.placement_group_table().items() if group["state"] != "REMOVED"}


def youngest_process(title: str) -> int:
    """Return the id of the youngest process with a title of this process's Ray."""
    parents, titled, started = {}, [], {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            fields = (path / "stat").read_text().rpartition(")")[2].split()
            parents[int(path.name)], started[int(path.name)] = int(fields[1]), int(fields[19])
            if (path / "cmdline").read_text().startswith(title):
                titled.append(int(path.name))
    of_this_ray = [pid for pid in titled if parents[parents[pid]] == os.getpid()]  # via the raylet
    return max(of_this_ray, key=lambda pid: started[pid])


@pytest.fixture(scope="module")
def killed_driver(kept_workers: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, rk.Result]:
    """Return the folder of a two-worker run whose driver was killed mid-epoch, and an uninterrupted run's result."""
    folder = tmp_path_factory.mktemp("driver")
    uninterrupted = fit(str(folder), "uninterrupted", steering(), scale=TWO, dropout=0)
    plan = {"storage": str(folder), "workers": 2, "driver_epoch": 1, "dropout": 0}
    (folder / "plan.json").write_text(json.dumps(plan))
    ended = subprocess.run(
        [sys.executable, "-m", "tests.support.resuming", str(folder / "plan.json")],
        env={**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    return folder / "run", uninterrupted


@pytest.mark.parametrize("workers", [2, 1, pytest.param(3, marks=pytest.mark.exhaustive)])
def test_run_of_killed_driver_resumes_on_any_number_of_workers(
    workers: int, killed_driver: tuple[Path, rk.Result], kept_workers: None, tmp_path: Path
) -> None:
    interrupted, uninterrupted = killed_driver
    shutil.copytree(interrupted, tmp_path / "run")
    result = fit(str(tmp_path), "run", steering(), scale=rk.Scale(workers=workers), dropout=0)
    assert_same(result, uninterrupted, rtol=1e-6 if workers == 2 else 1e-5)
    starts = [(e["initial_epoch"], e["initial_step"]) for e in events_of(result.path) if e["event"] == "RunStarted"]
    assert len(starts) == 2 and starts[1] > (0, 0) and starts[1][1] > 0
