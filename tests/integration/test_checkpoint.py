"""Checkpoints of a run: which are kept, which one it resumes from, and what happens when storage fails."""

from __future__ import annotations

import collections
import contextlib
import io
import random
import shutil
import zipfile
import zlib
from pathlib import Path
from typing import Any

import fsspec
import pytest

import raykeras as rk
from raykeras.checkpoint import store, writer
from raykeras.checkpoint.snapshot import restore
from raykeras.checkpoint.store import ARRAYS_FILE, MODEL_FILE, STATE_FILE, RunFolder
from raykeras.checkpoint.train_state import dump_state
from raykeras.compat import keras3
from raykeras.compat.keras_api import KerasAPI
from raykeras.compat.versions import PrivateName
from tests.support.compare import assert_same_weights
from tests.support.resuming import X, Y, assert_same, build, fit, steering


def test_damaged_checkpoint_is_reported_and_skipped(tmp_path: Path) -> None:
    uninterrupted = fit(str(tmp_path), "uninterrupted", epochs=3)
    result = fit(str(tmp_path), "run", epochs=2)
    *_, before, last = result.checkpoints
    position = (before.epoch, before.state["step"])
    path = Path(last.path, MODEL_FILE)
    path.write_bytes(path.read_bytes()[:-1])
    seen: list[rk.Event] = []
    result = fit(str(tmp_path), "run", epochs=3, on_event=seen.append)
    (damaged,) = (event for event in seen if isinstance(event, rk.CheckpointDamaged))
    assert damaged.path == last.path and MODEL_FILE in damaged.cause
    (started,) = (event for event in seen if isinstance(event, rk.RunStarted))
    assert (started.initial_epoch, started.initial_step) == position
    assert_same(result, uninterrupted, rtol=0)


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Return an archive with bytes of it, or of a file inside it, changed, cut off or inserted."""
    if data[:2] == b"PK" and rng.random() < 0.7:
        buffer, archive = io.BytesIO(), zipfile.ZipFile(io.BytesIO(data))
        chosen = rng.choice(archive.namelist())
        with zipfile.ZipFile(buffer, "w") as changed:
            for name in archive.namelist():
                content = archive.read(name)
                if name != chosen or rng.random() < 0.9:
                    changed.writestr(name, mutated(content, rng) if name == chosen else content)
        return buffer.getvalue()
    at, kind = rng.randrange(len(data)), rng.randrange(4)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + rng.randbytes(8) + data[at:]
    return data[:at] + rng.randbytes(8 if kind == 2 else 1) + data[at + (8 if kind == 2 else 1) :]


def test_tampered_files_are_rejected_or_restored(tmp_path: Path) -> None:
    """The checksums match, since an attacker who can write to the storage can write them, too."""
    result = fit(str(tmp_path), "run", steering(), epochs=1, sample_weight=None)
    taken, model, rng, outcomes = result.checkpoints[-1], build(), random.Random(0), collections.Counter[str]()
    state, folder = dict(taken.state), tmp_path / "tampered"
    files = state.pop("files")
    for number in range(500):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(taken.path, folder)
        path = folder / (MODEL_FILE, ARRAYS_FILE)[number % 2]
        data = mutated(path.read_bytes(), rng)
        path.write_bytes(data)
        digest = {"size": len(data), "crc32": f"{zlib.crc32(data):08x}"}
        (folder / STATE_FILE).write_bytes(dump_state(state, {**files, path.name: digest}))
        try:
            restore(model, KerasAPI("keras"), rk.Checkpoint(str(folder)))
            outcomes["restored"] += 1
        except rk.CheckpointError as error:
            assert str(folder) in str(error)
            outcomes["damaged"] += 1
    assert min(outcomes["restored"], outcomes["damaged"]) > 50


@pytest.mark.parametrize("lacks", ["memory", "store"])
def test_weights_written_by_keras_are_saved(lacks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With little free memory, Keras writes a temporary file; without the store to replace, it writes the archive."""
    if lacks == "memory":
        monkeypatch.setattr("keras.src.saving.saving_lib.is_memory_sufficient", lambda model: False)
    else:
        missing = PrivateName("keras.src.saving.saving_lib:NoStore", "copy weights", "training waits")
        monkeypatch.setattr(keras3, "H5_STORE", missing)
    model = build()
    with pytest.warns(UserWarning, match="training waits") if lacks == "store" else contextlib.nullcontext():
        result = rk.fit(model, X, Y, epochs=1, run=rk.Run(storage=str(tmp_path)), verbose=0)
    saved = result.checkpoints[-1]
    saved.verify()
    assert sorted(path.name for path in Path(saved.path).iterdir()) == [MODEL_FILE, ARRAYS_FILE, STATE_FILE]
    with zipfile.ZipFile(Path(saved.path, MODEL_FILE)) as archive:
        assert archive.testzip() is None and len(set(archive.namelist())) == len(archive.namelist())
    assert_same_weights(saved.load_model(), model)


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

    with pytest.raises(rk.CheckpointError, match="another driver has taken over"):
        fit(str(tmp_path), "run", [TakesOver()], epochs=50)


@pytest.mark.parametrize("kind", ["memory", "local"])
def test_temporary_storage_failure_is_retried(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = str(tmp_path) if kind == "local" else f"memory://{tmp_path.name}"
    failures_left = 3
    target = store if kind == "local" else fsspec.get_filesystem_class("memory")
    name = "_store_local" if kind == "local" else "put_file"
    original = getattr(target, name)

    def flaky(*args: Any, **kwargs: Any) -> Any:
        nonlocal failures_left
        if "checkpoints" in str(args) and failures_left:
            failures_left -= 1
            raise OSError("storage is unavailable")
        return original(*args, **kwargs)

    monkeypatch.setattr(target, name, flaky)
    seen: list[rk.Event] = []
    result = fit(storage, "run", epochs=3, on_event=seen.append)
    failed = [event for event in seen if isinstance(event, rk.StorageFailed)]
    assert len(failed) == 3 and all("storage is unavailable" in event.cause for event in failed)
    assert result.checkpoints[-1].epoch == 3
    result.checkpoints[-1].verify()


def test_permanent_storage_failure_fails_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise OSError("storage is unavailable")

    monkeypatch.setattr(store, "_store_local", fail)
    monkeypatch.setattr(writer, "LAST_WAIT_S", 1.0)
    with pytest.raises(rk.CheckpointError, match="storage is unavailable"):
        fit(str(tmp_path), "run", epochs=2)
