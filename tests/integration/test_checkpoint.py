"""Checkpoints of a training: which are kept, which is resumed from, and what happens when storage fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fsspec
import pytest

import raykeras as rk
from raykeras import checkpoint, saving
from raykeras.checkpoint import ARRAYS_FILE, MODEL_FILE, RunFolder
from tests.support.resuming import assert_same, fit


def test_damaged_checkpoint_is_reported_and_skipped(tmp_path: Path) -> None:
    undisturbed = fit(str(tmp_path), "undisturbed", epochs=3)
    result = fit(str(tmp_path), "run", epochs=2)
    *_, before, last = result.checkpoints
    position = (before.epoch, before.state["step"])
    path = Path(last.path, MODEL_FILE)
    path.write_bytes(path.read_bytes()[:-1])
    seen: list[rk.events.Event] = []
    result = fit(str(tmp_path), "run", epochs=3, on_event=seen.append)
    (damaged,) = (event for event in seen if isinstance(event, rk.events.CheckpointDamaged))
    assert damaged.path == last.path and MODEL_FILE in damaged.cause
    (started,) = (event for event in seen if isinstance(event, rk.events.RunStarted))
    assert (started.initial_epoch, started.initial_step) == position
    assert_same(result, undisturbed, rtol=0)


def test_newest_and_best_checkpoints_are_kept(tmp_path: Path) -> None:
    result = fit(str(tmp_path), "run", epochs=5, run={"keep": 1, "monitor": "val_accuracy"})
    values = result.history["val_accuracy"]
    assert result.best_checkpoint("val_accuracy").state["logs"]["val_accuracy"] == max(values)
    assert len(result.checkpoints) <= 2 and result.checkpoints[-1].epoch == 5
    for kept in result.checkpoints:
        assert set(kept.state["files"]) == {ARRAYS_FILE, MODEL_FILE}
        kept.verify()


def test_second_driver_takes_over_run(tmp_path: Path) -> None:
    class TakesOver(rk.DriverCallback):
        def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
            if epoch == 0:
                RunFolder(str(tmp_path / "run")).claim("another driver")

    with pytest.raises(rk.CheckpointError, match="another one has taken over"):
        fit(str(tmp_path), "run", [TakesOver()], epochs=50)


@pytest.mark.parametrize("kind", ["memory", "local"])
def test_temporary_storage_failure_is_retried(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = str(tmp_path) if kind == "local" else f"memory://{tmp_path.name}"
    failures_left = 3
    target = checkpoint if kind == "local" else fsspec.get_filesystem_class("memory")
    name = "_store_local" if kind == "local" else "put_file"
    original = getattr(target, name)

    def flaky(*args: Any, **kwargs: Any) -> Any:
        nonlocal failures_left
        if "checkpoints" in str(args) and failures_left:
            failures_left -= 1
            raise OSError("storage is away")
        return original(*args, **kwargs)

    monkeypatch.setattr(target, name, flaky)
    seen: list[rk.events.Event] = []
    result = fit(storage, "run", epochs=3, on_event=seen.append)
    failed = [event for event in seen if isinstance(event, rk.events.StorageFailed)]
    assert len(failed) == 3 and all("storage is away" in event.cause for event in failed)
    assert result.checkpoints[-1].epoch == 3
    result.checkpoints[-1].verify()


def test_permanent_storage_failure_fails_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise OSError("storage is away")

    monkeypatch.setattr(checkpoint, "_store_local", fail)
    monkeypatch.setattr(saving, "LAST_WAIT_S", 1.0)
    with pytest.raises(rk.CheckpointError, match="storage is away"):
        fit(str(tmp_path), "run", epochs=2)
