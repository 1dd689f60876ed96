"""The log of a run continues an earlier one, and its failures do not fail the run."""

from __future__ import annotations

import csv
import json
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import fsspec
import pytest

from raykeras.checkpoint.store import RunFolder
from raykeras.core import events
from raykeras.core.events import Event
from raykeras.driver import event_log
from raykeras.driver.event_log import EventDispatcher, RunLog
from tests.support.s3 import S3

HISTORY = "epoch,loss,val_loss\r\n0,0.5,0.6\r\n1,0.4,\r\n"


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder for temporary folders; shorten pauses, and limit s3fs to one attempt."""
    monkeypatch.setattr("s3fs.core.S3FileSystem.retries", 1)
    monkeypatch.setattr(event_log, "_PAUSES_S", (0.01,))
    monkeypatch.setattr(event_log, "LAST_WAIT_S", 1.0)
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def started(epoch: int = 0) -> Event:
    return events.RunStarted(params={}, workers=1, replicas=1, initial_epoch=epoch, path="")


def log_epochs(folder: RunFolder, *epochs: int) -> None:
    """Log a run of some epochs as `fit` does."""
    folder.claim("token")
    log = RunLog(folder, "token")
    dispatcher = EventDispatcher([log], (epochs[0], 0))
    dispatcher.send(started(epochs[0]))
    for epoch in epochs:
        dispatcher.send(events.EpochEnded(epoch=epoch, step=1, logs={"loss": 0.25}))
    dispatcher.close(events.RunEnded(status="completed", logs={}))
    try:
        dispatcher.raise_failure()
    finally:
        log.close()


def written(folder: str) -> tuple[list[str], list[dict[str, Any]]]:
    """Return the names of the events, and the rows of the history."""
    fs, path = fsspec.core.url_to_fs(folder, use_listings_cache=False)
    lines = fs.cat_file(f"{path}/events.jsonl").decode().splitlines()
    rows = fs.cat_file(f"{path}/history.csv").decode().splitlines()
    return [json.loads(line)["event"] for line in lines], list(csv.DictReader(rows))


@pytest.mark.parametrize("storage", ["local", "s3"])
def test_log_continues_earlier_log(storage: str, bucket: str, tmp_path: Path, temporary: Path) -> None:
    folder = RunFolder(f"{bucket}/run" if storage == "s3" else str(tmp_path / "run"))
    folder.make()
    log_epochs(folder, 0, 1)
    log_epochs(folder, 1, 2)
    names, rows = written(folder.path)
    once = ["RunStarted", "EpochEnded", "EpochEnded", "RunEnded"]
    assert names == once * 2
    assert [row["epoch"] for row in rows] == ["0", "1", "2"]
    assert not os.listdir(temporary)


@pytest.mark.parametrize("storage", ["local", "s3"])
def test_log_is_left_to_driver_that_has_taken_over(storage: str, bucket: str, tmp_path: Path) -> None:
    folder = RunFolder(f"{bucket}/run" if storage == "s3" else str(tmp_path / "run"))
    folder.make()
    folder.claim("first")
    log = RunLog(folder, "first")
    log(started())
    log_epochs(folder, 0, 1)
    log(events.EpochEnded(epoch=0, step=1, logs={"loss": 9.0}))
    log(events.BatchEnded(epoch=1, step=1, logs={"loss": 9.0}, num_steps=1))
    log(events.RunEnded(status="failed", logs={}))
    log.close()
    names, rows = written(folder.path)
    assert names[-4:] == ["RunStarted", "EpochEnded", "EpochEnded", "RunEnded"]
    assert [row["loss"] for row in rows] == ["0.25", "0.25"]


def test_epochs_that_a_lost_worker_did_not_report_are_logged(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "run"))
    folder.make()
    folder.claim("token")
    log = RunLog(folder, "token")
    ended: list[tuple[int | None, float]] = []

    def record(event: Event) -> None:
        if isinstance(event, events.EpochEnded):
            ended.append((event.epoch, event.logs["loss"]))

    dispatcher = EventDispatcher([log, record])
    history = {"loss": [0.5, 0.25], "val_loss": [0.1], "epoch": [0, 1]}
    for event in (
        started(),
        events.EpochEnded(epoch=0, step=1, logs={"loss": 0.5}),
        started(2),  # after a restart
        events.RunRestarted(epoch=2, step=0, workers=2, attempt=1, history=history),
    ):
        dispatcher.send(event)
    whole = {"loss": [0.5, 0.25, 0.125], "epoch": [0, 1, 2]}
    dispatcher.close(events.RunEnded(status="completed", logs={}, history=whole))
    log.close()
    names, rows = written(folder.path)
    assert names == ["RunStarted", "EpochEnded", "EpochEnded", "RunRestarted", "EpochEnded", "RunEnded"]
    assert [(row["epoch"], row["loss"]) for row in rows] == [("0", "0.5"), ("1", "0.25"), ("2", "0.125")]
    assert ended == [(0, 0.5), (1, 0.25), (2, 0.125)]


@pytest.mark.parametrize("fault", ["unavailable", "dropped", "applied"])
def test_upload_is_retried_after_temporary_failure(fault: str, bucket: str, s3_server: S3, temporary: Path) -> None:
    with s3_server.failing(fault, method="PUT", path="events.jsonl", last=3) as failing, warnings.catch_warnings():
        warnings.simplefilter("error")
        log_epochs(RunFolder(f"{bucket}/run"), 0)
    assert failing.num_requests > 3
    assert written(f"{bucket}/run")[0] == ["RunStarted", "EpochEnded", "RunEnded"]
    assert not os.listdir(temporary)


@pytest.mark.parametrize("fault", ["denied", "unavailable"])
def test_log_is_kept_locally_if_upload_fails(fault: str, bucket: str, s3_server: S3, temporary: Path) -> None:
    with s3_server.failing(fault, method="PUT", path="events.jsonl"), pytest.warns(UserWarning) as warned:
        log_epochs(RunFolder(f"{bucket}/run"), 0, 1)
    (name,) = os.listdir(temporary)
    (warning,) = warned
    assert str(temporary / name) in str(warning.message) and f"{bucket}/run" in str(warning.message)
    assert written(str(temporary / name))[0] == ["RunStarted", "EpochEnded", "EpochEnded", "RunEnded"]


def test_full_disk_does_not_fail_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RunLog, "_write_history", full)
    with pytest.warns(UserWarning, match="could not be written to .*: OSError: .*No space left"):
        log_epochs(RunFolder(str(tmp_path)), 0)


@pytest.mark.parametrize(
    ("text", "epochs"),
    [
        (HISTORY, ["0", "1", "7"]),
        (HISTORY + "2,0.3", ["0", "1", "7"]),
        (HISTORY + "2,0.3,0.2,9\r\nthree,1,1\r\n,,\r\n-1,0,0\r\n3,x,0\r\n4,0.1,0.1\r\n", ["0", "1", "4", "7"]),
        ("loss,val_loss\r\n0.5,0.6\r\n", ["7"]),
        ("", ["7"]),
        ("\0\x80\xff,\0", ["7"]),
        ('"' + "x" * 200_000, ["7"]),
    ],
    ids=["complete", "truncated", "bad rows", "no epoch", "empty", "binary", "unterminated"],
)
def test_malformed_history_rows_are_dropped(text: str, epochs: list[str], tmp_path: Path) -> None:
    (tmp_path / "history.csv").write_bytes(text.encode("latin-1"))
    log_epochs(RunFolder(str(tmp_path)), 7)
    assert [row["epoch"] for row in written(str(tmp_path))[1]] == epochs


@pytest.mark.parametrize(
    "data", [b'{"event": "RunEnded"}\n', b'{"event": "RunEnded"}\n{"event": "Ep', b'{"event"', b"\0" * 9, b""]
)
def test_truncated_event_is_dropped(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_bytes(data)
    log_epochs(RunFolder(str(tmp_path)), 0)
    assert written(str(tmp_path))[0] == ["RunEnded"] * data.count(b"\n") + ["RunStarted", "EpochEnded", "RunEnded"]
