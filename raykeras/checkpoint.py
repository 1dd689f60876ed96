"""A run's folder and the checkpoints in it.

Enters: a model and its position. Leaves: `checkpoints/{name}/{model.keras, train_state.json}`, on
any fsspec storage, without a pickle; and the complete ones, oldest first, when asked.

`train_state.json` is written last: a folder without it is not a checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import fsspec

from raykeras.errors import CheckpointError
from raykeras.keras_api import KerasAPI

MODEL_FILE = "model.keras"
STATE_FILE = "train_state.json"
FOLDER = "checkpoints"


@dataclass(frozen=True)
class RunFolder:
    """A run's folder on any fsspec storage. Picklable.

    Attributes:
        path: Absolute folder or fsspec URL.
    """

    path: str

    @classmethod
    def under(cls, storage: str, name: str) -> RunFolder:
        root = storage if "://" in storage else os.path.abspath(os.path.expanduser(storage))
        return cls(f"{root.rstrip('/')}/{name}")

    @property
    def is_local(self) -> bool:
        return "://" not in self.path

    @property
    def fs(self) -> fsspec.AbstractFileSystem:
        return fsspec.core.url_to_fs(self.path)[0]

    def __truediv__(self, name: str) -> str:
        return f"{self.path}/{name}"

    def exists(self) -> bool:
        return bool(self.fs.exists(self.path))

    def make(self) -> None:
        """Makes the folder. Raises CheckpointError if it cannot be written to."""
        try:
            self.fs.makedirs(self.path, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"A run's storage must be writable; {self.path!r} is not: {error}") from None

    def checkpoints(self) -> list[Checkpoint]:
        """The complete checkpoints, oldest first."""
        fs, root = self.fs, self / FOLDER
        if not fs.exists(root):
            return []
        names = sorted(os.path.basename(str(p).rstrip("/")) for p in fs.ls(root, detail=False))
        found = [Checkpoint(f"{root}/{name}") for name in names]
        return [checkpoint for checkpoint in found if fs.exists(f"{checkpoint.path}/{STATE_FILE}")]


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint.

    Attributes:
        path: Its folder.
    """

    path: str

    @property
    def state(self) -> dict[str, Any]:
        """Position, logs and versions, as written by `save_to`."""
        with fsspec.open(f"{self.path}/{STATE_FILE}", "r") as file:
            return dict(json.load(file))

    @property
    def epoch(self) -> int:
        """Epochs that were finished when it was taken."""
        return int(self.state["epoch"])

    def load_model(self, **options: Any) -> Any:
        """The model, compiled, its optimizer included.

        Args:
            **options: For `keras.saving.load_model`, such as `custom_objects`.
        """
        api = KerasAPI(str(self.state["keras"]["package"]))
        with self.local_file(MODEL_FILE) as path:
            return api.module.models.load_model(path, **options)

    @contextmanager
    def local_file(self, name: str) -> Iterator[str]:
        """A file of it on this machine."""
        if "://" not in self.path:
            yield f"{self.path}/{name}"
            return
        with tempfile.TemporaryDirectory() as folder:
            fs, path = fsspec.core.url_to_fs(f"{self.path}/{name}")
            fs.get(path, f"{folder}/{name}")
            yield f"{folder}/{name}"


def checkpoint_name(epoch: int) -> str:
    """Sorts as the epochs do."""
    return f"epoch-{epoch:06d}"


def write(folder: str, model: Any, state: dict[str, Any]) -> None:
    """Writes a checkpoint into a local folder. With several workers, all must call it."""
    model.save(os.path.join(folder, MODEL_FILE))
    with open(os.path.join(folder, STATE_FILE), "w") as file:
        json.dump(state, file, indent=1, sort_keys=True)


def store(run: RunFolder, name: str, folder: str, keep: int) -> Checkpoint:
    """Moves a written checkpoint into a run's folder, and removes the oldest beyond `keep`."""
    fs, target = run.fs, f"{run / FOLDER}/{name}"
    try:
        if run.is_local:
            _store_local(target, folder)
        else:
            fs.makedirs(target, exist_ok=True)
            for file in sorted(os.listdir(folder), key=lambda file: file == STATE_FILE):
                fs.put_file(os.path.join(folder, file), f"{target}/{file}")
    except OSError as error:
        raise CheckpointError(f"A checkpoint could not be written to {target!r}: {error}") from error
    for old in run.checkpoints()[:-keep]:
        fs.rm(old.path, recursive=True)
    return Checkpoint(target)


def _store_local(target: str, folder: str) -> None:
    """Copies beside the target, then renames: it is there whole or not at all."""
    os.makedirs(os.path.dirname(target), exist_ok=True)
    beside = os.path.join(os.path.dirname(target), f".{os.path.basename(target)}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    shutil.copytree(folder, beside)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(beside, target)
