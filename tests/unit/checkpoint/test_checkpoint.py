"""Checkpoints are complete or absent: truncated, altered and partially written ones are detected."""

from __future__ import annotations

import collections
import contextlib
import copy
import os
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import raykeras as rk
from raykeras.checkpoint import store
from raykeras.checkpoint.serialization import NotSerializableError, from_json, to_json
from raykeras.checkpoint.store import ARRAYS_FILE, MODEL_FILE, STATE_FILE, Checkpoint, RunFolder
from raykeras.checkpoint.train_state import dump_state, parse_state
from tests.support.train_state import STATE


def write_checkpoint(run: RunFolder, epoch: int, **logs: float) -> Checkpoint:
    """Write a checkpoint of a few hundred bytes."""
    rng = np.random.default_rng(epoch)

    def write(folder: str) -> None:
        Path(folder, MODEL_FILE).write_bytes(rng.bytes(300))
        Path(folder, ARRAYS_FILE).write_bytes(rng.bytes(200))
        store.write_state(folder, {**STATE, "epoch": epoch, "logs": logs})

    return store.store(run, store.checkpoint_name(epoch), write)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """Return a run folder with two checkpoints."""
    run = RunFolder(str(tmp_path / "run"))
    for epoch in (1, 2):
        write_checkpoint(run, epoch)
    return run


def newest(run: RunFolder) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest complete checkpoint and the errors of newer ones."""
    errors: list[str] = []
    return run.newest_complete(lambda damaged, error: errors.append(str(error))), errors


def files_in_order(path: str) -> list[Path]:
    """Return a checkpoint's files in the order in which they are written."""
    return sorted(Path(path).iterdir(), key=lambda file: file.name == STATE_FILE)


def test_checkpoint_is_incomplete_until_its_last_byte(run: RunFolder) -> None:
    """Storage without an atomic rename receives one file after another, byte by byte."""
    before, last = run.checkpoints()
    contents = {path: path.read_bytes() for path in files_in_order(last.path)}
    assert newest(run) == (last, [])
    for path in contents:
        path.unlink()
    for path, data in contents.items():
        for size in range(len(data)):
            path.write_bytes(data[:size])
            assert newest(run)[0] == before
        path.write_bytes(data)
    assert newest(run) == (last, [])


def test_truncated_file_is_detected(run: RunFolder) -> None:
    _, last = run.checkpoints()
    *files, _ = files_in_order(last.path)
    for path in files:
        data = path.read_bytes()
        for size in range(len(data)):
            path.write_bytes(data[:size])
            with pytest.raises(rk.CheckpointError, match=f"{path.name} is damaged: its size is {size}; "):
                last.verify()
        path.write_bytes(data)
    last.verify()


def test_bit_flip_is_detected(run: RunFolder) -> None:
    before, last = run.checkpoints()
    for path in files_in_order(last.path):
        data = path.read_bytes()
        for at in range(len(data)):
            changed = bytearray(data)
            changed[at] ^= 1 << at % 8
            path.write_bytes(changed)
            with pytest.raises(rk.CheckpointError, match="damaged"):
                last.verify()
        found, errors = newest(run)
        assert found == before
        assert len(errors) == 1 and path.name in errors[0]
        path.write_bytes(data)


@pytest.mark.parametrize("storage", ["local", "memory"])
def test_failed_write_leaves_no_checkpoint(storage: str, tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path / "run") if storage == "local" else f"memory://{tmp_path.name}")

    def write(folder: str) -> None:
        Path(folder, MODEL_FILE).write_bytes(b"half")
        raise OSError("no space left")

    with pytest.raises(rk.CheckpointError, match="no space left"):
        store.store(run, "epoch-000009", write)
    assert run.checkpoints() == []
    if storage == "local":
        assert os.listdir(run / store.FOLDER) == []


@pytest.mark.parametrize("num_uploaded", [0, 1, 2])
def test_interrupted_upload_leaves_no_checkpoint(
    num_uploaded: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory, uploads = fsspec.get_filesystem_class("memory"), iter(range(3))
    original = memory.put_file

    def interrupted(*args: Any, **kwargs: Any) -> None:
        if next(uploads) == num_uploaded:
            raise OSError("connection lost")
        original(*args, **kwargs)

    monkeypatch.setattr(memory, "put_file", interrupted)
    run = RunFolder(f"memory://{tmp_path.name}")
    with pytest.raises(rk.CheckpointError, match="connection lost"):
        write_checkpoint(run, 1)
    assert run.checkpoints() == []


@pytest.mark.parametrize(("monitor", "best"), [("val_loss", 2), ("val_accuracy", 1), ("missing", None)])
def test_newest_and_best_checkpoints_are_kept(monitor: str, best: int | None, tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path / "run"))
    for epoch, loss in enumerate([0.5, 0.2, 0.4, 0.3, 0.6], start=1):
        write_checkpoint(run, epoch, val_loss=loss, val_accuracy=0.9 - 0.1 * epoch)
        store.prune(run, 2, monitor)
    assert [kept.epoch for kept in run.checkpoints()] == [*([] if best is None else [best]), 4, 5]


MUTATIONS = [None, True, -1, 1 << 70, 0.5, "", "../x", [], {}, [[]], {"": None}, {"package": "os", "version": "1"}]


def places(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of keys to each value inside a JSON value."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [inner for key, item in pairs for inner in [(*place, key), *places(item, (*place, key))]]


@given(data=st.data())
@settings(max_examples=1000)
def test_tampered_state_is_rejected_or_valid(data: st.DataObject) -> None:
    """Anyone who can write to the storage can also write a matching checksum."""
    state = {**copy.deepcopy(STATE), "files": {MODEL_FILE: {"size": 3, "crc32": "00000000"}}}
    for _ in range(data.draw(st.integers(1, 3))):
        *outer, key = data.draw(st.sampled_from(places(state)))
        target: Any = state
        for step in outer:
            target = target[step]
        if isinstance(target, dict) and data.draw(st.booleans()):
            target[data.draw(st.text(max_size=5))] = target.pop(key)
        else:
            target[key] = copy.deepcopy(data.draw(st.sampled_from(MUTATIONS)))
    files = state.pop("files", {})
    try:
        parsed = parse_state(dump_state(state, files), "train_state.json")
    except rk.CheckpointError as error:
        assert str(error).startswith("train_state.json is damaged: ")
        return
    assert parsed["epoch"] >= 0 and parsed["step"] >= 0 and parsed["keras"]["package"] in ("keras", "tf_keras")
    assert all("/" not in name and name[0] != "." and file["size"] >= 0 for name, file in parsed["files"].items())
    for name in parsed["extra"]:
        with contextlib.suppress(ValueError, KeyError):
            from_json(parsed[name], {})


@given(data=st.binary(max_size=300) | st.text(max_size=300).map(str.encode))
def test_arbitrary_bytes_are_rejected_as_state(data: bytes) -> None:
    with pytest.raises(rk.CheckpointError, match="damaged"):
        parse_state(data, "train_state.json")


@pytest.mark.parametrize(
    "value",
    [
        {"raykeras": "function", "path": "numpy:save"},
        {"raykeras": "comparison", "package": "numpy", "name": "save"},
        {"raykeras": "comparison", "package": "os", "name": "less"},
        {"raykeras": "array", "name": "missing"},
        {"raykeras": "deque"},
        {"unknown": 1},
        {"raykeras": "dict", "keys": [[1]], "values": [1]},
    ],
)
def test_invalid_serialized_values_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="It is not a serialised value"):
        from_json(value, {})


def test_serialized_values_round_trip() -> None:
    values = {
        "numbers": [1, 2.5, float("inf"), None, True],
        ("a", 1): {"x", "y"},
        "arrays": [np.arange(3), np.float32(0.5), (np.zeros((2, 2), np.int8),)],
        "last": collections.deque([1, 2]),
        "function": np.less,
    }
    arrays: dict[str, np.ndarray] = {}
    back = from_json(to_json(values, arrays, "v"), arrays)
    assert list(back) == list(values) and back["numbers"] == values["numbers"] and back["a", 1] == {"x", "y"}
    np.testing.assert_array_equal(back["arrays"][0], np.arange(3))
    assert back["arrays"][1] == np.float32(0.5) and back["arrays"][1].dtype == np.float32
    assert isinstance(back["arrays"][2], tuple) and back["arrays"][2][0].dtype == np.int8
    assert back["last"] == values["last"] and back["function"] is np.less
    for value in (object(), lambda: 0, [object()], np.array([object()])):
        with pytest.raises(NotSerializableError):
            to_json(value, {}, "v")
