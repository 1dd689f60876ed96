"""`run.json` and TensorBoard's files, written without TensorFlow."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from raykeras.core import events
from raykeras.driver.record import RunRecord, called_by_pipeline, git_state, parse_record

STARTED = events.RunStarted(
    params={"validation": True}, workers=1, replicas=1, initial_epoch=0, path="", model={"class": "Model"}
)
WRITE_SCALARS = """
import sys
import numpy as np
from raykeras.core import events
from raykeras.driver.tensorboard import TensorBoardLog

log = TensorBoardLog(sys.argv[1])
log(events.RunStarted(params={"validation": True}, workers=1, replicas=1, initial_epoch=0, path=""))
log(events.EpochEnded(epoch=0, step=1, logs={"loss": 0.5, "val_f1": np.array([0.1, 0.2])}, learning_rate=0.1))
log(events.RunRestarted(epoch=0, step=0, workers=1, attempt=1))
log(events.RunEnded(status="completed", logs={}))
print([name for name in ("tensorflow", "keras", "ray") if name in sys.modules])
"""


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=n", "-c", "user.email=e"]
    subprocess.run(["git", *identity, "-C", str(folder), *arguments], check=True, capture_output=True)


def test_state_of_repository(tmp_path: Path) -> None:
    assert git_state(str(tmp_path)) is None
    git(tmp_path, "init")
    assert git_state(str(tmp_path)) is None  # no commit yet
    (tmp_path / "file").write_text("a")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-m", "first")
    state = git_state(str(tmp_path))
    assert state is not None and len(state["commit"]) == 40 and state["dirty"] is False
    (tmp_path / "untracked").write_text("a")
    assert git_state(str(tmp_path)) == state
    (tmp_path / "file").write_text("b")
    assert git_state(str(tmp_path)) == {**state, "dirty": True}


def record_call(folder: Path, call: dict[str, Any]) -> dict[str, Any]:
    record = RunRecord(str(folder), {"git": None, "pipeline": None, **call})
    for event in (events.PhaseStarted(phase="build"), STARTED, events.RunEnded(status="completed", logs={})):
        record(event)
    return parse_record((folder / "run.json").read_text())


@pytest.mark.parametrize("before", [None, "{", '{"calls": [{"time": "earlier"}], "model": {"class": "Other"}}'])
def test_record_has_entry_per_call(tmp_path: Path, before: str | None) -> None:
    if before is not None:
        (tmp_path / "run.json").write_text(before)
    record_call(tmp_path, {"time": "first"})
    record = record_call(tmp_path, {"time": "second"})
    earlier = ["earlier"] if before and "earlier" in before else []
    assert [call["time"] for call in record["calls"]] == [*earlier, "first", "second"]
    assert record["model"] == {"class": "Model"}


def test_scalars_are_written_without_tensorflow(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITE_SCALARS, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    (train,) = (tmp_path / "tensorboard/train").iterdir()
    (validation,) = (tmp_path / "tensorboard/validation").iterdir()
    assert b"epoch_loss" in train.read_bytes() and b"epoch_learning_rate" in train.read_bytes()
    assert b"epoch_f1/1" in validation.read_bytes()


def test_pipeline_is_recorded_for_calls_in_block_only() -> None:
    from raykeras.driver import record

    with called_by_pipeline("line.py", {"token": "abc", "rows": "3", "data": "s3://me:secret@host/x"}):
        recorded = record._PIPELINE.get()
    assert recorded is not None and recorded["file"].endswith("/line.py")
    assert recorded["parameters"] == {"token": "***", "rows": "3", "data": "s3://***@host/x"}
    assert record._PIPELINE.get() is None
    json.dumps(recorded)
