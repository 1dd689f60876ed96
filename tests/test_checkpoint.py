"""A checkpoint counts only if it is whole: cut off anywhere, or changed anywhere, the one before it is used."""

from __future__ import annotations

import os
import shutil
import zipfile
import zlib
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

import raykeras as rk
from raykeras import checkpoint
from raykeras.archive import crc_of_archive, stored_member
from raykeras.checkpoint import MODEL_FILE, STATE_FILE, Checkpoint, RunFolder
from raykeras.plain import NotPlainError, from_plain, to_plain
from tests.resuming import fit


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with its three newest checkpoints."""
    folder = tmp_path_factory.mktemp("finished")
    fit(str(folder), "run", epochs=2)
    return folder / "run"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> RunFolder:
    shutil.copytree(finished, tmp_path / "run")
    return RunFolder(str(tmp_path / "run"))


def newest(run: RunFolder) -> tuple[Checkpoint | None, list[str]]:
    """The newest whole one, and the messages about others."""
    told: list[str] = []
    found = run.newest_whole(lambda damaged, error: told.append(str(error)))
    return found, told


def in_order(path: str) -> list[str]:
    """A checkpoint's files as they are written."""
    return sorted(os.listdir(path), key=lambda name: name == STATE_FILE)


def test_cut_off_at_every_byte_the_one_before_is_used(run: RunFolder) -> None:
    *_, before, last = run.checkpoints()
    files = {name: Path(last.path, name).read_bytes() for name in in_order(last.path)}
    assert list(files)[-1] == STATE_FILE
    assert newest(run)[0] == last
    for name in files:
        Path(last.path, name).unlink()
    for name, data in files.items():  # as storage without a rename has it: file after file, byte after byte
        path = Path(last.path, name)
        for size in range(len(data)):
            if name == STATE_FILE or size < 2:
                path.write_bytes(data[:size])
                assert newest(run)[0] == before
        path.write_bytes(data)
    assert newest(run) == (last, [])
    for name in list(files)[:-1]:  # every file but the last was cut off, and the last is there none the less
        path, data = Path(last.path, name), files[name]
        for size in range(len(data)):
            path.write_bytes(data[:size])
            with pytest.raises(rk.CheckpointError, match=f"{name} is damaged: its size is {size}; "):
                last.verify()
        path.write_bytes(data)
    last.verify()


def test_a_bit_that_changed_is_found(run: RunFolder) -> None:
    *_, before, last = run.checkpoints()
    for name in in_order(last.path):
        path = Path(last.path, name)
        data = path.read_bytes()
        for at in range(0, len(data), 1 if name == STATE_FILE else 97):
            for bit in range(8) if at % 5 == 0 else (at % 8,):
                changed = bytearray(data)
                changed[at] ^= 1 << bit
                path.write_bytes(changed)
                with pytest.raises(rk.CheckpointError, match="damaged"):
                    last.verify()
        found, told = newest(run)
        assert found == before and len(told) == 1 and name in told[0]
        path.write_bytes(data)


def test_a_damaged_checkpoint_is_told_of_and_training_goes_on_from_the_one_before(
    run: RunFolder, tmp_path: Path
) -> None:
    whole = fit(str(tmp_path), "whole", epochs=3)
    *_, before, last = run.checkpoints()
    position = (before.epoch, before.state["step"])
    path = Path(last.path, MODEL_FILE)
    path.write_bytes(path.read_bytes()[:-1])
    seen: list[rk.events.Event] = []
    result = fit(str(tmp_path), "run", epochs=3, on_event=seen.append)
    damaged = [event for event in seen if isinstance(event, rk.events.CheckpointDamaged)]
    assert [event.path for event in damaged] == [last.path] and MODEL_FILE in damaged[0].cause
    started = next(event for event in seen if isinstance(event, rk.events.RunStarted))
    assert (started.initial_epoch, started.initial_step) == position
    assert result.history == whole.history
    for ours, theirs in zip(result.model().get_weights(), whole.model().get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("storage", ["local", "memory"])
def test_a_writing_that_fails_leaves_no_checkpoint_behind(storage: str, tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path / "run") if storage == "local" else f"memory://{tmp_path.name}")

    def write(folder: str) -> None:
        Path(folder, MODEL_FILE).write_bytes(b"half")
        raise OSError("no space left")

    with pytest.raises(rk.CheckpointError, match="no space left"):
        checkpoint.store(run, "epoch-000009", write)
    assert run.checkpoints() == []
    if storage == "local":
        assert os.listdir(run / checkpoint.FOLDER) == []


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    result = fit(str(tmp_path), "run", epochs=4, run={"keep": 2, "monitor": "val_loss"}, validation_data=None)
    assert [c.state["epoch"] for c in result.checkpoints] == [3, 4]
    result = fit(str(tmp_path), "best", epochs=5, run={"keep": 1, "monitor": "val_accuracy"})
    values = result.history["val_accuracy"]
    best = result.best_checkpoint("val_accuracy")
    assert best.state["logs"]["val_accuracy"] == max(values)
    assert len(result.checkpoints) <= 2 and result.checkpoints[-1].epoch == 5


def test_two_drivers_do_not_share_a_run(tmp_path: Path) -> None:
    class TakesOver(rk.DriverCallback):
        def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
            if epoch == 0:
                RunFolder(str(tmp_path / "run")).claim("another driver")

    with pytest.raises(rk.CheckpointError, match="another one has taken over"):
        fit(str(tmp_path), "run", [TakesOver()], epochs=50)


@pytest.mark.parametrize("kind", ["memory", "local"])
def test_storage_that_fails_for_a_while_holds_nothing_up(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = str(tmp_path) if kind == "local" else f"memory://{tmp_path.name}"
    fails = {"left": 3}
    target = checkpoint if kind == "local" else fsspec.get_filesystem_class("memory")
    name = "_store_local" if kind == "local" else "put_file"
    original = getattr(target, name)

    def flaky(*args: Any, **kwargs: Any) -> Any:
        if "checkpoints" in str(args) and fails["left"]:
            fails["left"] -= 1
            raise OSError("storage is away")
        return original(*args, **kwargs)

    monkeypatch.setattr(target, name, flaky)
    seen: list[rk.events.Event] = []
    result = fit(storage, "run", epochs=3, on_event=seen.append)
    failed = [event for event in seen if isinstance(event, rk.events.StorageFailed)]
    assert len(failed) == 3 and all("storage is away" in event.cause for event in failed)
    assert result.checkpoints[-1].epoch == 3
    result.checkpoints[-1].verify()


def test_storage_that_stays_away_fails_the_run_at_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from raykeras import saving

    def away(*args: Any) -> None:
        raise OSError("storage is away")

    monkeypatch.setattr(checkpoint, "_store_local", away)
    monkeypatch.setattr(saving, "LAST_WAIT_S", 1.0)
    with pytest.raises(rk.CheckpointError, match="storage is away"):
        fit(str(tmp_path), "run", epochs=2)


def test_plain_values_come_back_as_they_were() -> None:
    import collections

    values = {
        "numbers": [1, 2.5, float("inf"), None, True],
        ("a", 1): {"x", "y"},
        "arrays": [np.arange(3), np.float32(0.5), (np.zeros((2, 2), np.int8),)],
        "last": collections.deque([1, 2]),
        "function": np.less,
    }
    arrays: dict[str, np.ndarray] = {}
    back = from_plain(to_plain(values, arrays, "v"), arrays)
    assert list(back) == list(values) and back["numbers"] == values["numbers"] and back["a", 1] == {"x", "y"}
    np.testing.assert_array_equal(back["arrays"][0], np.arange(3))
    assert back["arrays"][1] == np.float32(0.5) and back["arrays"][1].dtype == np.float32
    assert isinstance(back["arrays"][2], tuple) and back["arrays"][2][0].dtype == np.int8
    assert back["last"] == values["last"] and back["function"] is np.less
    for value in (object(), lambda: 0, [object()], np.array([object()])):
        with pytest.raises(NotPlainError):
            to_plain(value, {}, "v")


@pytest.mark.parametrize("size", [0, 1, 77, 70_000])
def test_a_member_that_is_written_in_place_is_a_member_as_any(size: int, tmp_path: Path) -> None:
    data = np.random.default_rng(size).bytes(size)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("first", b"one")
    with open(tmp_path / "a.zip", "r+b") as file:
        with stored_member(file, "second") as member:
            member.seek(size // 2)
            member.write(data[size // 2 :])
            member.seek(0)
            member.write(data[: size // 2])
        whole = crc_of_archive(file, member)
    assert whole == zlib.crc32((tmp_path / "a.zip").read_bytes())
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert archive.testzip() is None and archive.namelist() == ["first", "second"]
        assert archive.read("first") == b"one" and archive.read("second") == data
