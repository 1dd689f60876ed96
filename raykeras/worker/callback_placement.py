"""Decide which callbacks run on which worker, where their files go, and what they return to the driver.

On several workers, each callback has a placement:

    every    affects training, or is user-defined: runs on every worker. Its logs are reduced over all replicas, so
             that all workers make the same decisions.
    chief    only writes or reports: runs on the chief, which is rank 0.
    saves    reads variables, in which all workers must take part: runs on every worker; the chief's files are kept.
    driver   logs to the run of an experiment tracker, which belongs to the driver's process: runs there, on the events.
    refused  cannot run on several workers.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import functools
import io
import os
import pickle
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from raykeras.checkpoint.store import RunFolder
from raykeras.compat.keras_callbacks import FIT_ATTRIBUTES, PATH_ATTRIBUTES
from raykeras.core.errors import OptionError
from raykeras.core.storage_errors import retry
from raykeras.core.temporary import TemporaryFolder

FOLDER = "artifacts"
"""Folder of the artifacts in the run's folder."""

Placement = Literal["every", "chief", "saves", "driver", "refused"]

PLACEMENTS: Mapping[str, Placement] = {
    "BackupAndRestore": "saves",
    "BaseLogger": "refused",
    "CSVLogger": "chief",
    "Callback": "every",
    "CallbackList": "every",
    "EarlyStopping": "every",
    "History": "every",
    "LambdaCallback": "every",
    "LearningRateScheduler": "every",
    "ModelCheckpoint": "saves",
    "OrbaxCheckpoint": "refused",
    "ProgbarLogger": "chief",
    "ReduceLROnPlateau": "every",
    "RemoteMonitor": "chief",
    "SidecarEvaluatorModelExport": "refused",
    "SwapEMAWeights": "every",
    "TensorBoard": "saves",
    "TerminateOnNaN": "every",
}
"""Placement of the callbacks of Keras 3 and tf_keras, by class name."""

_REFUSALS: Mapping[str, str] = {
    "BaseLogger": "reads what `fit` no longer provides, even in tf_keras. Leave it out: the logs are means already",
    "OrbaxCheckpoint": (
        "saves with JAX, which several TensorFlow workers do not have. Use ModelCheckpoint, or the checkpoints of the "
        "run"
    ),
    "SidecarEvaluatorModelExport": (
        "is for `keras.utils.SidecarEvaluator`, which runs in another process. Use ModelCheckpoint(save_best_only=True)"
    ),
}
"""Why a callback is refused, and what to do."""

_TRACKER_CALLBACKS: Mapping[str, tuple[str, ...]] = {
    "mlflow": ("MlflowCallback",),
    "wandb": ("WandbMetricsLogger",),
    "comet_ml": ("CometKerasCallback", "CometEmptyKerasCallback"),
}
"""Classes that need logs only, by the tracker's package; its other callbacks need the model."""

_LOG_FILES: Mapping[str, str] = {
    "mlflow": "mlflow.log_artifacts(checkpoint.path)",
    "wandb": "wandb.log_artifact(checkpoint.path, name='model', type='model')",
    "comet_ml": "experiment.log_model('model', checkpoint.path)",
}
"""How to log the files of a checkpoint, by the tracker's package."""

_VARIABLE_HOLDERS = ("Layer", "Metric", "Optimizer", "OptimizerV2", "Variable", "DistributedVariable")


@dataclass(frozen=True)
class OnChief:
    """A callback that runs on the chief only; created by `on_chief`."""

    callback: Any


class Artifacts:
    """The files that callbacks write on the chief, and their copies in the run's folder.

    Args:
        run: The run's folder, on any storage.

    Attributes:
        path: Local folder for the relative paths of callbacks.
    """

    def __init__(self, run: RunFolder) -> None:
        self._run = run
        self._staging = None if run.is_local else TemporaryFolder("artifacts")
        self.path = self._staging.name if self._staging else run / FOLDER
        self._versions: dict[str, tuple[int, int]] = {}
        if self._staging:
            retry(self._download)

    def collect(self) -> list[str]:
        """Store the files that are new or have changed; return their paths on the run's storage."""
        stored = []
        for parent, _, names in sorted(os.walk(self.path)):
            for name in sorted(names):
                path = os.path.join(parent, name)
                status = os.stat(path)
                version = (status.st_mtime_ns, status.st_size)
                if self._versions.get(path) == version:
                    continue
                self._versions[path] = version
                target = f"{self._run / FOLDER}/{os.path.relpath(path, self.path)}"
                if self._staging:
                    retry(functools.partial(self._put, path, target))
                stored.append(target)
        return stored

    def close(self) -> None:
        """Remove the local copies of files that are kept elsewhere."""
        if self._staging:
            self._staging.cleanup()

    def _download(self) -> None:
        """Copy the files of an interrupted run that is resumed."""
        if self._run.fs.exists(self._run / FOLDER):
            self._run.fs.get(f"{self._run / FOLDER}/", f"{self.path}/", recursive=True)

    def _put(self, path: str, target: str) -> None:
        self._run.fs.makedirs(os.path.dirname(target), exist_ok=True)
        self._run.fs.put_file(path, target)


def on_chief(callback: Any) -> OnChief:
    """Let a callback run once, on the chief (rank 0), instead of on every worker.

    Use it for actions that must happen only once, such as sending a message. The callback must not read the model's
    variables, in which all workers would have to take part; `model.stop_training` stops all of them.

    Args:
        callback: A Keras callback.

    Returns:
        The callback, wrapped, to pass in the `callbacks` of `fit`.
    """
    return OnChief(callback)


def unwrapped(callbacks: Sequence[Any]) -> list[Any]:
    """Return the callbacks without `on_chief`."""
    return [callback.callback if isinstance(callback, OnChief) else callback for callback in callbacks]


def named(callbacks: Sequence[Any]) -> dict[str, Any]:
    """Return the callbacks without `on_chief`, by class name and number among those of the class."""
    by_name: dict[str, Any] = {}
    counts: collections.Counter[str] = collections.Counter()
    for callback in unwrapped(callbacks):
        kind = type(callback).__qualname__
        by_name[f"{kind} {counts[kind]}"] = callback
        counts[kind] += 1
    return by_name


def placement_of(callback: Any) -> Placement:
    """Return the placement of a callback, by the nearest of its base classes that Keras or a tracker provides."""
    inner = unwrapped([callback])[0]
    if (tracker := tracker_of(inner)) is not None:
        names = {cls.__name__ for cls in type(inner).__mro__}
        return "refused" if names.isdisjoint(_TRACKER_CALLBACKS[tracker]) else "driver"
    if isinstance(callback, OnChief):
        return "chief"
    return next((PLACEMENTS[name] for name in _keras_classes(callback) if name in PLACEMENTS), "every")


def tracker_of(callback: Any) -> str | None:
    """Return the package of the experiment tracker that a callback comes from; None if it is no tracker's."""
    roots = (cls.__module__.split(".")[0] for cls in type(callback).__mro__)
    return next((root for root in roots if root in _TRACKER_CALLBACKS), None)


def pack(callbacks: Sequence[Any], dumps: Callable[[Any], bytes]) -> bytes:
    """Pickle callbacks for several workers.

    Args:
        callbacks: The user's callbacks, some in `on_chief`.
        dumps: Pickles an object.

    Raises:
        OptionError: If a callback cannot run on several workers or cannot be pickled; names the attribute.
    """
    copies = []
    for callback in callbacks:
        inner = unwrapped([callback])[0]
        if (placement := placement_of(callback)) in ("driver", "refused"):
            reason = _why_refused(inner, placement)
            raise OptionError(f"{type(inner).__name__} cannot run on several workers: it {reason}.")
        duplicate = copy.copy(inner)
        for name in FIT_ATTRIBUTES:
            vars(duplicate).pop(name, None)
        try:
            dumps(duplicate)
        except Exception as error:
            raise _not_picklable(duplicate, dumps, error) from None
        copies.append(OnChief(duplicate) if isinstance(callback, OnChief) else duplicate)
    return dumps(copies)


@contextlib.contextmanager
def placed(
    callbacks: Sequence[Any], artifacts: str | None, from_chief: Callable[[Any], Any]
) -> Iterator[dict[str, Any]]:
    """Yield the callbacks that run on one of several workers, by name, with their files redirected.

    Args:
        callbacks: The user's callbacks, unpickled in this process.
        artifacts: Folder for relative paths on the chief; None on all other workers.
        from_chief: Returns on every worker the value passed on the chief; all workers must call it.
    """
    with TemporaryFolder("unkept") as unkept:
        chosen = {}
        for index, (name, inner) in enumerate(named(callbacks).items()):
            placement = placement_of(callbacks[index])
            if artifacts is None and placement == "chief":
                continue
            if placement != "every":
                _redirect(inner, artifacts or os.path.join(unkept, str(index)), keep_absolute=artifacts is not None)
            if hasattr(inner, "backup_dir"):
                files = from_chief({} if artifacts is None else _read_files(inner.backup_dir))
                if artifacts is None:
                    _write_files(inner.backup_dir, files)
            chosen[name] = inner
        yield chosen


def states_of(callbacks: Sequence[Any], has_keras: bool) -> list[dict[str, bytes]]:
    """Return the attributes of each callback, pickled one by one.

    What holds variables is left out: reading them on one worker could wait forever for the others.

    Args:
        callbacks: The chief's callbacks, after training.
        has_keras: Whether to include attributes that need Keras or TensorFlow to be unpickled.
    """
    from ray import cloudpickle

    class Pickler(cloudpickle.CloudPickler):
        def reducer_override(self, value: Any) -> Any:
            if any(name in _VARIABLE_HOLDERS for name in _keras_classes(value)):
                raise pickle.PicklingError(f"{type(value).__name__} holds variables")
            return super().reducer_override(value)

    states = []
    for callback in callbacks:
        for name in FIT_ATTRIBUTES:
            vars(callback).pop(name, None)
    for callback in callbacks:
        state = {}
        for name, value in vars(callback).items():
            if name in PATH_ATTRIBUTES or isinstance(value, types.FunctionType | types.MethodType):
                continue  # the driver's callback has them
            buffer = io.BytesIO()
            try:
                Pickler(buffer).dump(value)
            except Exception:  # such as an open file
                continue
            data = buffer.getvalue()
            if has_keras or not any(package in data for package in (b"keras", b"tensorflow")):
                state[name] = data
        states.append(state)
    return states


def restore_callbacks(
    callbacks: Sequence[Any], states: Sequence[Mapping[str, bytes]], loads: Callable[[bytes], Any]
) -> None:
    """Set the chief's attributes on the user's callbacks.

    Args:
        callbacks: The user's callbacks, some in `on_chief`.
        states: Pickled attributes of each, as `states_of` returns them.
        loads: Unpickles a value.
    """
    for callback, state in zip(unwrapped(callbacks), states, strict=True):
        for name, data in state.items():
            vars(callback)[name] = loads(data)


def resume_loggers(callbacks: Iterable[Any], epoch: int) -> None:
    """Let loggers continue the files that they wrote before an interruption.

    Args:
        callbacks: Callbacks that have not begun training.
        epoch: Number of finished epochs; lines of later epochs are removed.
    """
    for callback in callbacks:
        if "CSVLogger" not in _keras_classes(callback) or not os.path.exists(callback.filename):
            continue
        with open(callback.filename, newline="") as file:
            lines = file.readlines()
        with open(callback.filename, "w", newline="") as file:
            file.writelines(line for line in lines if not _is_repeated(line, callback.sep, epoch))
        callback.append = True


def is_transient_attribute(callback: Any, attribute: str) -> bool:
    """Return whether an attribute belongs to a `fit` call or a process instead of the training."""
    if attribute in FIT_ATTRIBUTES or attribute in PATH_ATTRIBUTES:
        return True
    return any(name in ("CSVLogger", "ProgbarLogger") for name in _keras_classes(callback))


def _keras_classes(value: Any) -> Iterator[str]:
    """Yield the names of an object's classes that Keras or TensorFlow define."""
    for cls in type(value).__mro__:
        if cls.__module__.split(".")[0] in ("keras", "tf_keras", "tensorflow"):
            yield cls.__name__


def _why_refused(callback: Any, placement: Placement) -> str:
    tracker = tracker_of(callback)
    if tracker is None:
        return next(_REFUSALS[name] for name in _keras_classes(callback) if name in _REFUSALS)
    if placement == "driver":
        return f"logs to {tracker} from this process, to which only `fit` sends events. Log what `evaluate` returns"
    return (
        f"needs the model in the process of the {tracker} run, and the workers have the model. After `fit`, log a "
        f"checkpoint from this process: `checkpoint = result.best_checkpoint()` and `{_LOG_FILES[tracker]}`"
    )


def _not_picklable(callback: Any, dumps: Callable[[Any], bytes], error: Exception) -> OptionError:
    kind = type(callback).__name__
    for name, value in vars(callback).items():
        try:
            dumps(value)
        except Exception as attribute_error:
            return OptionError(
                f"Callbacks are pickled for the workers; `{kind}.{name}`, a {type(value).__name__}, cannot be pickled: "
                f"{attribute_error}. Create it in `on_train_begin`, on the worker, or use a `raykeras.DriverCallback`, "
                "which stays in this process."
            )
    return OptionError(f"Callbacks are pickled for the workers; {kind} cannot be pickled: {error}.")


def _redirect(callback: Any, folder: str, keep_absolute: bool) -> None:
    """Move the paths of a Keras callback into a folder."""
    for name in PATH_ATTRIBUTES:
        path = vars(callback).get(name)
        if not isinstance(path, str | os.PathLike):
            continue
        path = str(path)
        if keep_absolute and (os.path.isabs(path) or "://" in path):
            continue
        moved = os.path.normpath(os.path.join(folder, path.split("://")[-1].lstrip("/")))
        os.makedirs(os.path.dirname(moved), exist_ok=True)
        setattr(callback, name, moved)


def _read_files(folder: str) -> dict[str, bytes]:
    """Return the contents of the files in a folder by relative path; nothing if it does not exist."""
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()
    }


def _write_files(folder: str, files: Mapping[str, bytes]) -> None:
    for name, data in files.items():
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def _is_repeated(line: str, separator: str, first_epoch: int) -> bool:
    """Return whether a line of a CSV log is of an epoch that is trained again."""
    epoch = line.split(separator)[0]
    return epoch.isdigit() and int(epoch) >= first_epoch
