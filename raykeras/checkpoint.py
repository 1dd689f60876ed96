"""A run's folder and the checkpoints in it.

Enters: a folder with a model's files, and its position. Leaves: `checkpoints/{name}/{model.keras, state.npz,
train_state.json}`, on any fsspec storage, without a pickle; and the whole ones, oldest first, when asked.

`train_state.json` is written last and holds the size and the digest of every file: a folder without it is
not a checkpoint, and one that does not agree with it is damaged.
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

from raykeras.errors import CheckpointError
from raykeras.keras_api import KerasAPI
from raykeras.storage_errors import is_garbled, is_of_storage, retried
from raykeras.temporary import TemporaryFolder
from raykeras.train_state import dump_state, parse_state

MODEL_FILE = "model.keras"
WEIGHTS_FILE = "model.weights.h5"
"""In place of the model's file, where Keras cannot serialise the model."""

ARRAYS_FILE = "state.npz"
STATE_FILE = "train_state.json"
FOLDER = "checkpoints"
OWNER_FILE = "owner"
RESTORED = "-restored"
"""Ends the name of a checkpoint of weights that a callback restored: no training goes on from there."""

_PREFIX = "epoch-"
_BUFFER_NBYTES = 4 << 20

T = TypeVar("T")


def filesystem(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The filesystem of a path or URL, and the path in it. Its listings are new: other processes write, too."""
    fs, inside = fsspec.core.url_to_fs(path, use_listings_cache=False)
    return fs, inside


def is_better(monitor: str, value: float, than: float) -> bool:
    """Whether one value of a metric is better, in the direction that Keras' "auto" mode takes."""
    if math.isnan(value):
        return False
    maximise = any(part in monitor for part in ("acc", "auc", "precision", "recall", "fmeasure", "f1"))
    return math.isnan(than) or (value > than if maximise else value < than)


@dataclass(frozen=True)
class RunFolder:
    """A run's folder on any fsspec storage. Picklable. Methods raise CheckpointError if storage fails.

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
        return filesystem(self.path)[0]

    def __truediv__(self, name: str) -> str:
        return f"{self.path}/{name}"

    def is_empty(self) -> bool:
        """Whether it holds nothing, or is not there."""
        return self._reached(lambda: not self.fs.exists(self.path) or not self.fs.ls(self.path))

    def is_run(self) -> bool:
        """Whether it holds a run."""
        return self._reached(lambda: bool(self.fs.exists(self / OWNER_FILE)))

    def make(self) -> None:
        """Makes the folder."""
        self._reached(lambda: self.fs.makedirs(self.path, exist_ok=True))

    def claim(self, token: str) -> None:
        """Makes this driver the only one that writes checkpoints here."""
        self._reached(lambda: self.fs.pipe_file(self / OWNER_FILE, token.encode()))

    def _reached(self, call: Callable[[], T]) -> T:
        """What a function returns, which is called again where storage fails temporarily."""
        try:
            return retried(call)
        except Exception as error:
            if not is_of_storage(error):
                raise
            raise CheckpointError(
                f"A run's storage must be readable and writable; {self.path!r} is not: {type(error).__name__}: {error} "
                "Give another `storage`, or mend this one."
            ) from error

    def is_claimed_by(self, token: str) -> bool:
        """Whether no other driver has claimed it since."""
        with self.fs.open(self / OWNER_FILE, "r") as file:
            return bool(file.read() == token)

    def checkpoints(self) -> list[Checkpoint]:
        """The complete checkpoints, oldest first."""
        return [Checkpoint(path) for path, is_complete in self._listed().items() if is_complete]

    def incomplete(self) -> list[str]:
        """Folders of checkpoints whose writing was cut off, or still goes on."""
        return [path for path, is_complete in self._listed().items() if not is_complete]

    def _listed(self) -> dict[str, bool]:
        """Each folder of a checkpoint, sorted, and whether it is complete."""
        fs, root = self.fs, self / FOLDER

        def listed() -> dict[str, bool]:
            paths = fs.ls(root, detail=False) if fs.exists(root) else []
            names = sorted(os.path.basename(str(path).rstrip("/")) for path in paths)
            return {
                f"{root}/{name}": not name.startswith(".") and fs.exists(f"{root}/{name}/{STATE_FILE}")
                for name in names
                if name.lstrip(".").startswith(_PREFIX)
            }

        return self._reached(listed)

    def newest_whole(self, damaged: Callable[[Checkpoint, CheckpointError], None]) -> Checkpoint | None:
        """The newest checkpoint from which training can go on; None if there is none.

        Args:
            damaged: Called with each one that is newer and not whole, and with what is wrong.

        Raises:
            CheckpointError: If one cannot be read at present, which says nothing of whether it is whole.
        """
        for checkpoint in reversed(self.checkpoints()):
            if checkpoint.path.endswith(RESTORED):
                continue
            try:
                checkpoint.verify()
            except CheckpointError as error:
                if error.__cause__ is not None:  # storage failed
                    raise
                damaged(checkpoint, error)
            else:
                return checkpoint
        return None


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint.

    Attributes:
        path: Its folder.
    """

    path: str

    @property
    def state(self) -> dict[str, Any]:
        """Position, logs and versions, as `raykeras.snapshot` describes them.

        Raises:
            CheckpointError: If the file is damaged, or cannot be read.
        """
        path = f"{self.path}/{STATE_FILE}"
        fs, inside = filesystem(path)
        return parse_state(self._read(lambda: fs.cat_file(inside)), path)

    @property
    def model_file(self) -> str:
        """Path of the model's `.keras` file.

        Raises:
            CheckpointError: Keras could not serialise the model.
        """
        if self.weights_file == WEIGHTS_FILE:
            raise CheckpointError(
                f"A model that Keras cannot serialise is loaded by the function that builds it; {self.path} holds the "
                f"weights only. Build the model and call `model.load_weights` with its {WEIGHTS_FILE}, or pass the "
                "function to `fit` to go on with the run."
            )
        return f"{self.path}/{MODEL_FILE}"

    @property
    def weights_file(self) -> str:
        """Name of the file that holds the weights."""
        return MODEL_FILE if MODEL_FILE in self.state["files"] else WEIGHTS_FILE

    @property
    def epoch(self) -> int:
        """Epochs that were finished when it was taken."""
        return int(self.state["epoch"])

    def verify(self) -> None:
        """Raises CheckpointError if a file of it is missing or was changed; with a cause if storage failed."""
        written = self.state["files"]
        fs, root = filesystem(self.path)
        for name, expected in written.items():  # of all files, before one is read
            size = self._read(functools.partial(fs.size, f"{root}/{name}"))
            _compare(f"{self.path}/{name}", {"size": size}, expected)
        for name, expected in written.items():
            digest = self._read(functools.partial(_digest_in, fs, f"{root}/{name}"))
            _compare(f"{self.path}/{name}", digest, expected)

    def _read(self, read: Callable[[], T]) -> T:
        """What a function reads, which is called again where storage fails temporarily."""
        try:
            return retried(read)
        except Exception as error:
            if not is_of_storage(error):
                raise
            bad_disk = "://" not in self.path and getattr(error, "errno", None) == errno.EIO
            if isinstance(error, FileNotFoundError) or is_garbled(error) or bad_disk:
                raise CheckpointError(f"{self.path} is damaged: {type(error).__name__}: {error}") from None
            raise CheckpointError(
                f"{self.path} cannot be read at present: {type(error).__name__}: {error} Start again once storage can "
                "be reached."
            ) from error

    def load_model(self, **options: Any) -> Any:
        """The model, compiled, its optimizer included.

        Args:
            **options: For `keras.saving.load_model`, such as `custom_objects`.

        Raises:
            CheckpointError: It holds the weights only.
        """
        name = os.path.basename(self.model_file)
        api = KerasAPI(str(self.state["keras"]["package"]))
        with self.local_file(name) as path:
            return api.module.models.load_model(path, **options)

    @contextmanager
    def local_file(self, name: str) -> Iterator[str]:
        """A file of it on this machine."""
        if "://" not in self.path:
            yield f"{self.path}/{name}"
            return
        with TemporaryFolder("model") as folder:
            fs, path = filesystem(f"{self.path}/{name}")
            self._read(lambda: fs.get_file(path, f"{folder}/{name}"))
            yield f"{folder}/{name}"


def checkpoint_name(epoch: int, step: int = 0) -> str:
    """Sorts as training goes on.

    Args:
        epoch: Epochs that are finished.
        step: Steps of the next that are, too.
    """
    return f"{_PREFIX}{epoch:06d}" + (f"-step-{step:09d}" if step else "")


def write_state(folder: str, state: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Writes the file that makes a local folder a checkpoint: the state, and what all other files hold.

    Args:
        folder: Of the checkpoint.
        state: See `raykeras.snapshot`.
        known: Digests, as of `digest_of`, of files that need not be read for it.
    """
    files = dict(known)
    for name in sorted(set(os.listdir(folder)) - set(known)):
        with open(os.path.join(folder, name), "rb") as file:
            files[name] = digest_of(file)
    with open(os.path.join(folder, STATE_FILE), "wb") as file:
        file.write(dump_state(state, files))


def _compare(path: str, found: Mapping[str, Any], written: Mapping[str, Any]) -> None:
    for what, value in found.items():
        if value != written[what]:
            raise CheckpointError(f"{path} is damaged: its {what} is {value}; {written[what]} was written.")


def digest_of(file: IO[bytes]) -> dict[str, Any]:
    """Size and CRC-32 of an open file: a few times cheaper than a hash, while a model trains beside it."""
    crc, size = 0, 0
    while data := file.read(_BUFFER_NBYTES):
        crc, size = zlib.crc32(data, crc), size + len(data)
    return {"size": size, "crc32": f"{crc:08x}"}


def _digest_in(fs: fsspec.AbstractFileSystem, path: str) -> dict[str, Any]:
    with fs.open(path, "rb") as file:
        return digest_of(file)


def store(run: RunFolder, name: str, write: Callable[[str], None]) -> Checkpoint:
    """Puts a checkpoint into a run's folder; it is there whole or not at all.

    Args:
        run: The run's folder.
        name: The checkpoint's.
        write: Writes it into an empty local folder.

    Raises:
        CheckpointError: If storage failed; its cause says how.
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
        if not is_of_storage(error):
            raise
        raise CheckpointError(
            f"A checkpoint could not be written to {target!r}: {type(error).__name__}: {error}"
        ) from error
    return Checkpoint(target)


def _store_local(target: str, write: Callable[[str], None]) -> None:
    """Writes beside the target, then renames."""
    beside = os.path.join(os.path.dirname(target), f".{os.path.basename(target)}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    os.makedirs(beside)
    try:
        write(beside)
        for name in os.listdir(beside):
            with open(os.path.join(beside, name), "rb") as file:
                os.fsync(file.fileno())
        shutil.rmtree(target, ignore_errors=True)
        os.replace(beside, target)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def prune(run: RunFolder, keep: int, monitor: str) -> None:
    """Removes all checkpoints but the newest `keep`, and the best one by a metric; and what is none, or half of one."""
    kept = run.checkpoints()
    best: tuple[float, str] | None = None
    for checkpoint in kept:
        try:
            value = checkpoint.state["logs"].get(monitor)
        except CheckpointError as error:
            if error.__cause__ is not None:  # storage failed
                raise
            continue
        if isinstance(value, int | float) and is_better(monitor, value, best[0] if best else math.nan):
            best = (value, checkpoint.path)
    for checkpoint in kept[:-keep]:
        if best is None or checkpoint.path != best[1]:
            run.fs.rm(f"{checkpoint.path}/{STATE_FILE}")  # first: half of a checkpoint is none
            run.fs.rm(checkpoint.path, recursive=True)
    for path in run.incomplete():
        run.fs.rm(path, recursive=True)
