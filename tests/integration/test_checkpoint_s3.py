"""Checkpoints on S3 with failing requests: temporary failures are retried, permanent ones are raised."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

import raykeras as rk
from raykeras.checkpoint import store, writer
from raykeras.checkpoint.store import MODEL_FILE, OWNER_FILE, STATE_FILE, Checkpoint, RunFolder
from raykeras.checkpoint.writer import AsyncCheckpointWriter
from raykeras.core import events, storage_errors
from raykeras.core.events import Event
from tests.support.s3 import S3
from tests.support.train_state import STATE

TIMEOUT_S = 60.0


class Snapshot:
    """A stand-in for the state of a run."""

    def __init__(self, epoch: int) -> None:
        self._epoch = epoch

    def write(self, folder: str) -> None:
        Path(folder, MODEL_FILE).write_bytes(np.random.default_rng(self._epoch).bytes(300))
        store.write_state(folder, {**STATE, "epoch": self._epoch})

    def release(self) -> None:
        """Do nothing, since no memory is held."""


@pytest.fixture(autouse=True)
def fail_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not pause between attempts; limit s3fs to one attempt and one second."""
    monkeypatch.setattr("s3fs.core.S3FileSystem.retries", 1)
    monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": {"read_timeout": 1}})
    monkeypatch.setattr(storage_errors, "READ_PAUSES_S", (0.0, 0.0))
    monkeypatch.setattr(writer, "_BACKOFF_S", (0.01,))


@pytest.fixture
def run(bucket: str) -> RunFolder:
    run = RunFolder(f"{bucket}/run")
    run.make()
    run.claim("token")
    return run


def write_checkpoint(run: RunFolder, epoch: int) -> Checkpoint:
    return store.store(run, store.checkpoint_name(epoch), Snapshot(epoch).write)


def keep(run: RunFolder, num_epochs: int) -> list[Event]:
    """Write a checkpoint for each epoch, as training does; return the events."""
    seen: list[Event] = []
    checkpoint_writer = AsyncCheckpointWriter(run, "token", rk.Run(keep=2), seen.append)
    for epoch in range(1, num_epochs + 1):
        saved = events.CheckpointSaved(rank=0, epoch=epoch - 1, step=0, path="")
        checkpoint_writer.put(store.checkpoint_name(epoch), Snapshot(epoch), saved, time.time())  # type: ignore[arg-type]
        wait_for(lambda epoch=epoch: len(kinds(seen, events.CheckpointSaved)) == epoch or checkpoint_writer._failure)
    checkpoint_writer.close()
    return seen


def kinds(seen: list[Event], kind: type[Event]) -> list[Event]:
    return [event for event in seen if isinstance(event, kind)]


def wait_for(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("fault", "file"),
    [
        ("unavailable", MODEL_FILE),
        ("dropped", STATE_FILE),
        ("hangs", MODEL_FILE),
        ("applied", STATE_FILE),
        ("unavailable", OWNER_FILE),
    ],
)
def test_write_is_retried_after_temporary_failure(run: RunFolder, s3_server: S3, fault: str, file: str) -> None:
    method = "GET" if file == OWNER_FILE else "PUT"
    with s3_server.failing(fault, method=method, path=file, last=1 if fault == "hangs" else 2):
        seen = keep(run, 1)
    assert kinds(seen, events.StorageFailed)
    (kept,) = run.checkpoints()
    kept.verify()


@pytest.mark.parametrize(("fault", "what"), [("denied", "AccessDenied"), ("expired", "ExpiredToken")])
def test_write_is_not_retried_after_permanent_failure(run: RunFolder, s3_server: S3, fault: str, what: str) -> None:
    with (
        s3_server.failing(fault, method="PUT", path=MODEL_FILE) as denied,
        pytest.raises(rk.CheckpointError, match=f"{what}.*Retrying will not help"),
    ):
        keep(run, 1)
    assert denied.num_requests == 1
    assert run.checkpoints() == []


def test_failed_removal_leaves_no_partial_checkpoint(run: RunFolder, s3_server: S3) -> None:
    with s3_server.failing("applied", method="POST", path="delete", last=2):
        keep(run, 4)
    assert [kept.epoch for kept in run.checkpoints()] == [3, 4]
    names = {path.split("/")[3] for path in run.fs.find(run / store.FOLDER)}
    assert names == {store.checkpoint_name(epoch) for epoch in (3, 4)}


def newest(run: RunFolder) -> tuple[Checkpoint | None, list[str]]:
    errors: list[str] = []
    return run.newest_complete(lambda damaged, error: errors.append(str(error))), errors


@pytest.mark.parametrize("fault", ["short", "garbled"])
@pytest.mark.parametrize("file", [MODEL_FILE, STATE_FILE])
def test_previous_checkpoint_is_used_if_newest_is_damaged(run: RunFolder, s3_server: S3, fault: str, file: str) -> None:
    before, _ = write_checkpoint(run, 1), write_checkpoint(run, 2)
    with s3_server.failing(fault, method="GET", path=f"{store.checkpoint_name(2)}/{file}"):
        found, errors = newest(run)
    assert found == before
    assert len(errors) == 1 and "damaged" in errors[0]


@pytest.mark.parametrize("fault", ["unavailable", "dropped", "hangs", "short"])
def test_read_is_retried_after_temporary_failure(run: RunFolder, s3_server: S3, fault: str) -> None:
    write_checkpoint(run, 1)
    last = write_checkpoint(run, 2)
    with s3_server.failing(fault, method="GET", path=MODEL_FILE, last=1):
        assert newest(run) == (last, [])
    with s3_server.failing(fault, method="GET", path=MODEL_FILE, last=1), last.local_file(MODEL_FILE) as path:
        assert Path(path).stat().st_size == 300


@pytest.mark.parametrize("fault", ["unavailable", "denied"])
def test_unreadable_storage_is_not_reported_as_damage(run: RunFolder, s3_server: S3, fault: str) -> None:
    write_checkpoint(run, 1)
    with (
        s3_server.failing(fault, method="GET", path=MODEL_FILE),
        pytest.raises(rk.CheckpointError, match="cannot be read at the moment"),
    ):
        newest(run)


def test_checkpoints_of_other_processes_are_found(run: RunFolder) -> None:
    assert run.checkpoints() == []
    write_checkpoint(run, 1)
    assert len(run.checkpoints()) == 1
    other = fsspec.filesystem("s3", skip_instance_cache=True, use_listings_cache=False)
    for path in other.find(f"{run.path}/{store.FOLDER}"):
        other.copy(path, path.replace(store.checkpoint_name(1), store.checkpoint_name(2)))
    assert len(run.checkpoints()) == 2


def test_unwritable_storage_is_reported_at_start(bucket: str, s3_server: S3) -> None:
    with (
        s3_server.failing("denied", method="PUT"),
        pytest.raises(rk.CheckpointError, match="must be readable and writable"),
    ):
        RunFolder(f"{bucket}/run").claim("token")
