"""A run goes on with the workers that there are, and with more once there is room; and one that hangs is restarted."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import raykeras as rk
from raykeras.checkpoint import RunFolder
from raykeras.cluster import Room, connect
from raykeras.world import _room, wait_for_room
from tests.cpus import all_held_but
from tests.resuming import fit
from tests.two_nodes import EPOCHS


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> rk.Result:
    """The same training in one process."""
    return fit(str(tmp_path_factory.mktemp("plain")), "undisturbed", epochs=EPOCHS, dropout=0)


@pytest.mark.parametrize("how", ["lost", "drained"])
def test_a_node_goes_in_mid_epoch_and_comes_back(how: str, undisturbed: rk.Result, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.two_nodes", str(tmp_path), how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    *events, last = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    for name, values in undisturbed.history.items():
        np.testing.assert_allclose(last["history"][name], values, rtol=1e-5, err_msg=name)
    newest = RunFolder(str(tmp_path / "run")).checkpoints()[-1]
    pairs = zip(newest.load_model().get_weights(), undisturbed.model().get_weights(), strict=True)
    for ours, theirs in pairs:
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)

    resized = [(e["before"], e["workers"]) for e in events if e["event"] == "WorldResized"]
    assert resized[0] == (2, 1) and resized[-1] == (1, 2)
    restarted = [(e["epoch"], e["step"]) for e in events if e["event"] == "RunRestarted"]
    assert restarted == sorted(restarted) and restarted[0] >= (1, 1)
    failed = [event for event in events if event["event"] == "WorkerFailed"]
    if how == "drained":  # all leave before it goes
        assert not failed
    else:
        assert failed and all(event["cause"] and event["next"] for event in failed)


def hangs(folder: str, rank: int) -> Any:
    """A callback that stands still on one worker, once."""
    import keras

    class Hangs(keras.callbacks.Callback):  # type: ignore[misc]
        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            import ray.train

            once = Path(folder, "hung")
            if epoch == 1 and ray.train.get_context().get_world_rank() == rank and not once.exists():
                once.touch()
                time.sleep(600)

    return Hangs()


def test_a_worker_that_hangs_is_found_out_and_the_run_restarts(tmp_path: Path) -> None:
    scale, seen = rk.Scale(workers=2), []
    run = {"hang_timeout_s": 30.0}
    result = fit(str(tmp_path), "run", [hangs(str(tmp_path), 1)], scale=scale, dropout=0, run=run, on_event=seen.append)
    expected = fit(str(tmp_path), "undisturbed", dropout=0)
    assert result.epoch == expected.epoch
    for name, values in expected.history.items():
        np.testing.assert_allclose(result.history[name], values, rtol=1e-5, err_msg=name)
    failed = [event for event in seen if isinstance(event, rk.events.WorkerFailed)]
    assert len(failed) == 1 and "no step for 30 s" in failed[0].cause
    stacks = {path.name: path.read_text() for path in Path(result.path, "stacks").iterdir()}
    assert "attempt-0-rank-1.txt" in stacks  # and, if it was not ended before, that of the one that waited for it
    assert "on_epoch_begin" in stacks["attempt-0-rank-1.txt"]


def test_failures_without_progress_are_counted_and_then_the_run_fails(tmp_path: Path) -> None:
    import keras

    class Dies(keras.callbacks.Callback):  # type: ignore[misc]
        def on_train_begin(self, logs: Any = None) -> None:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGKILL)

    seen: list[rk.events.Event] = []
    options: dict[str, Any] = {"scale": rk.Scale(workers=2), "run": {"max_failures": 1}, "on_event": seen.append}
    with pytest.raises(rk.WorkerLostError, match="failure 2 without a new checkpoint; `max_failures` is 1"):
        fit(str(tmp_path), "run", [Dies()], **options)
    failed = [event.next for event in seen if isinstance(event, rk.events.WorkerFailed)]
    assert failed == ["training begins again", "the run fails"]


def test_workers_have_room_beside_the_part_of_a_cpu_that_another_job_holds() -> None:
    """They would wait for the rest of it for ever."""
    scale = rk.Scale(workers=2)
    orders: Any = SimpleNamespace(widest=scale, scale=scale, room=Room(1.0))
    connect(scale, in_process=False)
    with all_held_but(2.75):
        assert wait_for_room(orders) == 2
    with all_held_but(2.0):
        assert _room(orders, in_parts=True) == 1  # the other CPU is for reading
