"""A run's folder and the checkpoints in it, on any fsspec storage.

A checkpoint is a folder `checkpoints/{name}` with `model.keras`, `state.npz` and `train_state.json`. The latter is
written last and holds the size and digest of every other file: a folder without it is incomplete, and one whose files
do not match it is damaged.
"""

from __future__ import annotations

import errno
import functools
import math
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any, TypeVar

import fsspec

from raykeras.checkpoint.train_state import dump_state, parse_state
from raykeras.compat.keras_api import KerasAPI
from raykeras.core.errors import CheckpointError
from raykeras.core.storage_errors import is_corrupted, is_storage_error, retry
from raykeras.core.temporary import TemporaryFolder

MODEL_FILE = "model.keras"

WEIGHTS_FILE = "model.weights.h5"
"""Replaces `MODEL_FILE` if Keras cannot serialise the model."""

ARRAYS_FILE = "state.npz"

STATE_FILE = "train_state.json"

FOLDER = "checkpoints"

OWNER_FILE = "owner"

RESTORED = "-restored"
"""Suffix of a checkpoint of weights that a callback restored; training does not resume from it."""

_PREFIX = "epoch-"

_BUFFER_NBYTES = 4 << 20

T = TypeVar("T")


def filesystem(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return the filesystem of a path or URL, and the path in it.

    Its listings are not cached, since other processes also write to it.
    """
    fs, inside = fsspec.core.url_to_fs(path, use_listings_cache=False)
    return fs, inside


def is_better(monitor: str, value: float, than: float) -> bool:
    """Return whether a metric's value is better than another, in the direction of Keras' "auto" mode.

    Args:
        monitor: Name of the metric.
        value: The new value; NaN is never better.
        than: The value to compare with; anything but NaN is better than NaN.
    """
    if math.isnan(value):
        return False
    maximise = any(part in monitor for part in ("acc", "auc", "precision", "recall", "fmeasure", "f1"))
    return math.isnan(than) or (value > than if maximise else value < than)


@dataclass(frozen=True)
class RunFolder:
    """A run's folder on any fsspec storage. Picklable.

    Its methods raise `CheckpointError` if storage fails.

    Attributes:
        path: Absolute path or fsspec URL.
    """

    path: str

    @classmethod
    def under(cls, storage: str, name: str) -> RunFolder:
        """Return the folder of the run `name` in a storage folder or URL."""
        root = storage if "://" in storage else os.path.abspath(os.path.expanduser(storage))
        return cls(f"{root.rstrip('/')}/{name}")

    @property
    def is_local(self) -> bool:
        return "://" not in self.path

    @property
    def fs(self) -> fsspec.AbstractFileSystem:
        return filesystem(self.path)[0]

    def __truediv__(self, name: str) -> str:
        return f"{self.path}/{name}"

    def is_empty(self) -> bool:
        """Return whether the folder is empty or does not exist."""
        return self._retried(lambda: not self.fs.exists(self.path) or not self.fs.ls(self.path))

    def is_run(self) -> bool:
        """Return whether the folder holds a run."""
        return self._retried(lambda: bool(self.fs.exists(self / OWNER_FILE)))

    def folders(self) -> list[str]:
        """Return the paths of the folders in this folder, sorted by name."""

        def list_folders() -> list[str]:
            found = self.fs.ls(self.path, detail=True) if self.fs.exists(self.path) else []
            names = [str(entry["name"]).rstrip("/") for entry in found if entry["type"] == "directory"]
            return [self / os.path.basename(name) for name in sorted(names)]

        return self._retried(list_folders)

    def read(self, name: str, start: int = 0) -> bytes:
        """Return the contents of a file from an offset; nothing if the file does not exist or is shorter."""

        def read_file() -> bytes:
            fs, path = self.fs, self / name
            return bytes(fs.cat_file(path, start=start)) if fs.exists(path) and fs.size(path) > start else b""

        return self._retried(read_file)

    def download(self, name: str, path: str) -> None:
        """Copy a file to a local path; does nothing if the file does not exist."""

        def copy() -> None:
            fs = self.fs
            if fs.exists(self / name):
                fs.get_file(self / name, path)

        self._retried(copy)

    def make(self) -> None:
        """Create the folder."""
        self._retried(lambda: self.fs.makedirs(self.path, exist_ok=True))

    def claim(self, token: str) -> None:
        """Make the driver with this token the only one that writes checkpoints to the folder."""
        self._retried(lambda: self.fs.pipe_file(self / OWNER_FILE, token.encode()))

    def _retried(self, call: Callable[[], T]) -> T:
        """Call a function, retrying temporary failures; raise storage failures as `CheckpointError`."""
        try:
            return retry(call)
        except Exception as error:
            if not is_storage_error(error):
                raise
            raise CheckpointError(
                f"A run's storage must be readable and writable; {self.path!r} is not: {type(error).__name__}: {error} "
                "Choose another `storage`, or fix this one."
            ) from error

    def is_claimed_by(self, token: str) -> bool:
        """Return whether the driver with this token was the last to claim the folder."""
        with self.fs.open(self / OWNER_FILE, "r") as file:
            return bool(file.read() == token)

    def checkpoints(self) -> list[Checkpoint]:
        """Return the complete checkpoints, oldest first."""
        return [Checkpoint(path) for path, is_complete in self._list_checkpoints().items() if is_complete]

    def incomplete(self) -> list[str]:
        """Return the folders of checkpoints that were not, or are not yet, written completely."""
        return [path for path, is_complete in self._list_checkpoints().items() if not is_complete]

    def _list_checkpoints(self) -> dict[str, bool]:
        """Return the sorted folders of all checkpoints, and whether each is complete."""
        fs, root = self.fs, self / FOLDER

        def list_folders() -> dict[str, bool]:
            paths = fs.ls(root, detail=False) if fs.exists(root) else []
            names = sorted(os.path.basename(str(path).rstrip("/")) for path in paths)
            return {
                f"{root}/{name}": not name.startswith(".") and fs.exists(f"{root}/{name}/{STATE_FILE}")
                for name in names
                if name.lstrip(".").startswith(_PREFIX)
            }

        return self._retried(list_folders)

    def newest_complete(self, on_damaged: Callable[[Checkpoint, CheckpointError], None]) -> Checkpoint | None:
        """Return the newest checkpoint from which training can resume; None if there is none.

        Args:
            on_damaged: Called with each newer checkpoint that is damaged, and the error.

        Raises:
            CheckpointError: Storage failed, so that it is unknown whether a checkpoint is damaged.
        """
        for checkpoint in reversed(self.checkpoints()):
            if checkpoint.path.endswith(RESTORED):
                continue
            try:
                checkpoint.verify()
            except CheckpointError as error:
                if error.__cause__ is not None:  # Storage failed.
                    raise
                on_damaged(checkpoint, error)
            else:
                return checkpoint
        return None


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint.

    Attributes:
        path: The checkpoint's folder.
    """

    path: str

    @property
    def state(self) -> dict[str, Any]:
        """The contents of `train_state.json`: position, logs and versions.

        Raises:
            CheckpointError: If the file is damaged or cannot be read.
        """
        path = f"{self.path}/{STATE_FILE}"
        fs, inside = filesystem(path)
        return parse_state(self._read(lambda: fs.cat_file(inside)), path)

    @property
    def model_file(self) -> str:
        """The path of the model's `.keras` file.

        Raises:
            CheckpointError: If Keras could not serialise the model.
        """
        if self.weights_file == WEIGHTS_FILE:
            raise CheckpointError(
                f"The checkpoint of a model that Keras cannot serialise holds the weights only; {self.path} has no "
                f"{MODEL_FILE}. Build the model and call `model.load_weights` with the checkpoint's {WEIGHTS_FILE}, or "
                "pass the function that builds it to `fit` to resume the run."
            )
        return f"{self.path}/{MODEL_FILE}"

    @property
    def weights_file(self) -> str:
        """The name of the file that holds the weights."""
        return MODEL_FILE if MODEL_FILE in self.state["files"] else WEIGHTS_FILE

    @property
    def epoch(self) -> int:
        """The number of epochs that were finished when the checkpoint was taken."""
        return int(self.state["epoch"])

    def verify(self) -> None:
        """Check that the checkpoint's files have the recorded sizes and digests.

        Raises:
            CheckpointError: If a file is missing or was changed. If storage failed instead, the error has a cause.
        """
        files = self.state["files"]
        fs, root = filesystem(self.path)
        for name, expected in files.items():  # All sizes first, since they need no reading.
            size = self._read(functools.partial(fs.size, f"{root}/{name}"))
            _compare(f"{self.path}/{name}", {"size": size}, expected)
        for name, expected in files.items():
            digest = self._read(functools.partial(_digest_in, fs, f"{root}/{name}"))
            _compare(f"{self.path}/{name}", digest, expected)

    def _read(self, read: Callable[[], T]) -> T:
        """Call a function, retrying temporary failures; raise storage failures as `CheckpointError`.

        The error has a cause if storage failed, and none if the checkpoint is damaged.
        """
        try:
            return retry(read)
        except Exception as error:
            if not is_storage_error(error):
                raise
            bad_disk = "://" not in self.path and getattr(error, "errno", None) == errno.EIO
            if isinstance(error, FileNotFoundError) or is_corrupted(error) or bad_disk:
                raise CheckpointError(f"{self.path} is damaged: {type(error).__name__}: {error}") from None
            raise CheckpointError(
                f"{self.path} cannot be read at the moment: {type(error).__name__}: {error} Try again once the storage "
                "is reachable."
            ) from error

    def load_model(self, **options: Any) -> Any:
        """Load the compiled model, including its optimizer.

        Args:
            **options: Keyword arguments of `keras.saving.load_model`, such as `custom_objects`.

        Returns:
            A Keras 3 or tf_keras model, as it was saved.

        Raises:
            CheckpointError: If the checkpoint holds the weights only.
        """
        name = os.path.basename(self.model_file)
        api = KerasAPI(str(self.state["keras"]["package"]))
        with self.local_file(name) as path:
            return api.module.models.load_model(path, **options)

    @contextmanager
    def local_file(self, name: str) -> Iterator[str]:
        """Yield a local path of one of the checkpoint's files, which is valid while the block runs.

        Args:
            name: Name of the file.

        Raises:
            CheckpointError: If the file cannot be read.
        """
        if "://" not in self.path:
            yield f"{self.path}/{name}"
            return
        with TemporaryFolder("model") as folder:
            fs, path = filesystem(f"{self.path}/{name}")
            self._read(lambda: fs.get_file(path, f"{folder}/{name}"))
            yield f"{folder}/{name}"


def checkpoint_name(epoch: int, step: int = 0) -> str:
    """Return the name of a checkpoint; names sort in the order of training.

    Args:
        epoch: Number of epochs finished.
        step: Number of steps finished in the next epoch.
    """
    return f"{_PREFIX}{epoch:06d}" + (f"-step-{step:09d}" if step else "")


def write_state(folder: str, state: Mapping[str, Any]) -> None:
    """Write `train_state.json`, which completes a checkpoint.

    Args:
        folder: Local folder of the checkpoint, with all other files.
        state: See `raykeras.checkpoint.snapshot`.
    """
    files = {}
    for name in sorted(os.listdir(folder)):
        with open(os.path.join(folder, name), "rb") as file:
            files[name] = digest_of(file)
    with open(os.path.join(folder, STATE_FILE), "wb") as file:
        file.write(dump_state(state, files))


def _compare(path: str, actual: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for key, value in actual.items():
        if value != expected[key]:
            raise CheckpointError(f"{path} is damaged: its {key} is {value}; it was {expected[key]} when written.")


def digest_of(file: IO[bytes]) -> dict[str, Any]:
    """Return the size and CRC-32 of an open file, from its position on.

    CRC-32 takes less CPU time from the training than a cryptographic hash would.
    """
    crc, size = 0, 0
    while data := file.read(_BUFFER_NBYTES):
        crc, size = zlib.crc32(data, crc), size + len(data)
    return {"size": size, "crc32": f"{crc:08x}"}


def _digest_in(fs: fsspec.AbstractFileSystem, path: str) -> dict[str, Any]:
    with fs.open(path, "rb") as file:
        return digest_of(file)


def store(run: RunFolder, name: str, write: Callable[[str], None]) -> Checkpoint:
    """Save a checkpoint in a run's folder; it becomes visible only once it is complete.

    Args:
        run: The run's folder.
        name: Name of the checkpoint.
        write: Writes the checkpoint's files into an empty local folder.

    Returns:
        The saved checkpoint.

    Raises:
        CheckpointError: Storage failed, for the reason in its cause.
    """
    fs, target = run.fs, f"{run / FOLDER}/{name}"
    try:
        if run.is_local:
            _store_local(target, write)
            return Checkpoint(target)
        with TemporaryFolder("checkpoint") as folder:
            write(folder)
            fs.makedirs(target, exist_ok=True)
            if fs.exists(f"{target}/{STATE_FILE}"):
                fs.rm(f"{target}/{STATE_FILE}")
            for file in sorted(os.listdir(folder), key=lambda file: file == STATE_FILE):
                fs.put_file(os.path.join(folder, file), f"{target}/{file}")
    except Exception as error:
        if not is_storage_error(error):
            raise
        raise CheckpointError(
            f"A checkpoint could not be written to {target!r}: {type(error).__name__}: {error}"
        ) from error
    return Checkpoint(target)


def _store_local(target: str, write: Callable[[str], None]) -> None:
    """Write a checkpoint into a folder next to the target, then rename it."""
    partial = os.path.join(os.path.dirname(target), f".{os.path.basename(target)}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    os.makedirs(partial)
    try:
        write(partial)
        for name in os.listdir(partial):
            with open(os.path.join(partial, name), "rb") as file:
                os.fsync(file.fileno())
        shutil.rmtree(target, ignore_errors=True)
        os.replace(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def prune(run: RunFolder, keep: int, monitor: str) -> None:
    """Remove old and incomplete checkpoints.

    Args:
        run: The run's folder.
        keep: Number of newest checkpoints to keep.
        monitor: Metric whose best checkpoint is kept as well.
    """
    checkpoints = run.checkpoints()
    best: tuple[float, str] | None = None
    for checkpoint in checkpoints:
        try:
            value = checkpoint.state["logs"].get(monitor)
        except CheckpointError as error:
            if error.__cause__ is not None:  # Storage failed.
                raise
            continue
        if isinstance(value, int | float) and is_better(monitor, value, best[0] if best else math.nan):
            best = (value, checkpoint.path)
    for checkpoint in checkpoints[:-keep]:
        if best is None or checkpoint.path != best[1]:
            run.fs.rm(f"{checkpoint.path}/{STATE_FILE}")  # First, so that a partly removed checkpoint is incomplete.
            run.fs.rm(checkpoint.path, recursive=True)
    for path in run.incomplete():
        run.fs.rm(path, recursive=True)
