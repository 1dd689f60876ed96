"""A run whose processes were killed ends as one that was not: the same history, weights and calls of callbacks."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray

import raykeras as rk
from tests.kept import KeptWorkers
from tests.resuming import POINTS, assert_same, events_of, fit, killer, recorder, steering


def die(folder: Path, storage: Path, points: list[str], **plan: Any) -> None:
    """A process of its own that trains and is killed."""
    path = folder / "plan.json"
    path.write_text(
        json.dumps({"storage": str(storage), "name": "run", "folder": str(folder), "points": points, **plan})
    )
    command = [sys.executable, "-m", "tests.resuming", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]


def test_killed_at_any_point_in_this_process(tmp_path: Path) -> None:
    mine, theirs = recorder(), recorder()
    undisturbed = fit(str(tmp_path), "undisturbed", [theirs, *steering()])
    for number, point in enumerate(POINTS):
        die(tmp_path, tmp_path, list(POINTS))
        assert (tmp_path / point).exists()
        assert not any((tmp_path / later).exists() for later in POINTS[number + 1 :])
    result = fit(str(tmp_path), "run", [mine, *steering()])
    assert_same(result, undisturbed)
    assert mine.calls == theirs.calls
    begun = [(e["initial_epoch"], e["initial_step"]) for e in events_of(result.path) if e["event"] == "RunStarted"]
    assert begun == sorted(begun) and len(begun) == len(POINTS) + 1
    assert any(step for _, step in begun)  # some of them in the middle of an epoch


def test_killed_at_any_point_on_two_workers(kept_workers: KeptWorkers, tmp_path: Path) -> None:
    scale = rk.Scale(workers=2)
    with kept_workers.used():
        undisturbed = fit(str(tmp_path), "undisturbed", steering(), scale=scale)
    seen: list[rk.events.Event] = []
    half = len(POINTS) // 2
    killers = [killer(POINTS[:half], str(tmp_path), 1), killer(POINTS[half:], str(tmp_path), 0)]
    result = fit(str(tmp_path), "run", [*steering(), *killers], scale=scale, on_event=seen.append)
    assert all((tmp_path / point).exists() for point in POINTS)
    assert_same(result, undisturbed)
    failed = [event for event in seen if isinstance(event, rk.events.WorkerFailed)]
    assert len(failed) == len(POINTS)
    assert {event.rank for event in failed} <= {0, 1} and all(event.node and event.next for event in failed)
    assert all("because" in event.cause or "Error" in event.cause for event in failed), [e.cause for e in failed]
    restarted = [event for event in seen if isinstance(event, rk.events.RunRestarted)]
    assert [event.attempt for event in restarted] == list(range(1, len(POINTS) + 1))


def test_a_lost_controller_leaves_no_placement_group(tmp_path: Path) -> None:
    seen: list[rk.events.Event] = []

    def on_event(event: rk.events.Event) -> None:
        if isinstance(event, rk.events.CheckpointSaved) and not any(isinstance(e, type(event)) for e in seen):
            os.kill(youngest_process_of("ray::Controller"), signal.SIGKILL)
        seen.append(event)

    scale = rk.Scale(workers=2, cpus_per_worker=0.5)  # there is room for the next attempt, whatever is left behind
    before = placement_groups()
    result = fit(str(tmp_path), "run", steering(), scale=scale, on_event=on_event, dropout=0)
    assert_same(result, fit(str(tmp_path), "undisturbed", steering(), dropout=0), rtol=1e-5)
    assert [type(e) for e in seen].count(rk.events.RunRestarted) == 1
    (failed,) = (event for event in seen if isinstance(event, rk.events.WorkerFailed))
    assert "controller" in failed.cause
    assert placement_groups() == before


def placement_groups() -> set[str]:
    """Those that take something."""
    return {name for name, group in ray.util.placement_group_table().items() if group["state"] != "REMOVED"}


def youngest_process_of(title: str) -> int:
    """Of those of such a title, of the Ray that this process started."""
    parents, titled, started = {}, [], {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            fields = (path / "stat").read_text().rpartition(")")[2].split()
            parents[int(path.name)], started[int(path.name)] = int(fields[1]), int(fields[19])
            if (path / "cmdline").read_text().startswith(title):
                titled.append(int(path.name))
    ours = [pid for pid in titled if parents[parents[pid]] == os.getpid()]  # by way of the raylet
    return max(ours, key=lambda pid: started[pid])


@pytest.fixture(scope="module")
def killed_driver(kept_workers: KeptWorkers, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, rk.Result]:
    """A run of two workers whose driver was killed in the middle of an epoch, and the same run undisturbed."""
    folder = tmp_path_factory.mktemp("driver")
    with kept_workers.used():
        undisturbed = fit(str(folder), "undisturbed", steering(), scale=rk.Scale(workers=2), dropout=0)
    die(folder, folder, [], workers=2, dropout=0, driver_epoch=1)
    return folder / "run", undisturbed


@pytest.mark.parametrize("workers", [2, 1, 3])
def test_a_killed_driver_of_two_workers_is_resumed_by_others(
    workers: int, killed_driver: tuple[Path, rk.Result], tmp_path: Path
) -> None:
    left, undisturbed = killed_driver
    shutil.copytree(left, tmp_path / "run")
    result = fit(str(tmp_path), "run", steering(), scale=rk.Scale(workers=workers), dropout=0)
    assert_same(result, undisturbed, rtol=1e-6 if workers == 2 else 1e-5)
    begun = [(e["initial_epoch"], e["initial_step"]) for e in events_of(result.path) if e["event"] == "RunStarted"]
    assert len(begun) == 2 and begun[1] > (0, 0) and begun[1][1] > 0
