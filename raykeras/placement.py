"""Which callback runs on which worker, where its files go, and what it hands back.

Enters: the user's callbacks. Leaves: in the driver, their pickles; on each worker, those that run
there; after training, the chief's attributes for the user's own objects.

    every   steers training, or is the user's own: runs on every worker. The logs that they see are
            reduced over all replicas, so all decide alike
    chief   only writes or talks: runs on the chief, which is rank 0
    saves   reads variables, in which all workers must take part: runs on every worker, the chief's
            files are kept
    refused cannot run on several workers
"""

from __future__ import annotations

import collections
import contextlib
import copy
import io
import os
import pickle
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from raykeras.errors import OptionError
from raykeras.temporary import TemporaryFolder

Placement = Literal["every", "chief", "saves", "refused"]

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
"""The callbacks of Keras 3 and tf_keras, by name."""

_REFUSED: Mapping[str, str] = {
    "BaseLogger": "reads what `fit` no longer gives, in tf_keras itself too. Leave it out: logs are means already",
    "OrbaxCheckpoint": (
        "saves by means of JAX, which several TensorFlow workers do not have. Use ModelCheckpoint, or the run's own "
        "checkpoints"
    ),
    "SidecarEvaluatorModelExport": (
        "is for `keras.utils.SidecarEvaluator`, in a process beside training. Use ModelCheckpoint(save_best_only=True)"
    ),
}
"""Why, and what to do."""

_TRACKERS: Mapping[str, str] = {
    "mlflow": "mlflow.log_metrics(logs, step=epoch, run_id=...)",
    "wandb": "wandb.log({**logs, 'epoch': epoch})",
    "comet_ml": "experiment.log_metrics(logs, epoch=epoch)",
}
"""Packages whose callbacks log to a run of the process that made them, and how to log there."""

_PATHS = (
    "filepath",
    "filename",
    "log_dir",
    "backup_dir",
    "_weights_path",
    "_training_metadata_path",
    "_prev_weights_path",
    "_prev_training_metadata_path",
)
_OF_A_FIT = ("model", "_model", "params", "_train_step", "_val_step", "_writers", "summary")
"""Attributes that Keras sets when `fit` begins; a callback that was used before still has them."""

_HOLDS_VARIABLES = ("Layer", "Metric", "Optimizer", "OptimizerV2", "Variable", "DistributedVariable")


@dataclass(frozen=True)
class OnChief:
    """A callback for the chief only; made by `on_chief`."""

    callback: Any


def on_chief(callback: Any) -> OnChief:
    """Lets a callback run once, on the chief (rank 0), and not on every worker.

    For what must not happen several times, such as sending a message. It must not read the model's
    variables, in which all workers would have to take part; `model.stop_training` stops all of them.

    Args:
        callback: A Keras callback.
    """
    return OnChief(callback)


def unwrapped(callbacks: Sequence[Any]) -> list[Any]:
    """The callbacks themselves."""
    return [callback.callback if isinstance(callback, OnChief) else callback for callback in callbacks]


def named(callbacks: Sequence[Any]) -> dict[str, Any]:
    """The callbacks themselves, by a name for each: its class, and which of its kind it is."""
    found: dict[str, Any] = {}
    counts: collections.Counter[str] = collections.Counter()
    for callback in unwrapped(callbacks):
        kind = type(callback).__qualname__
        found[f"{kind} {counts[kind]}"] = callback
        counts[kind] += 1
    return found


def is_no_state(callback: Any, attribute: str) -> bool:
    """Whether an attribute belongs to a `fit` or to a process, and not to the training."""
    if attribute in _OF_A_FIT or attribute in _PATHS:
        return True
    return any(name in ("CSVLogger", "ProgbarLogger") for name in _keras_classes(callback))


def go_on_writing(callbacks: Iterable[Any], epoch: int) -> None:
    """Lets loggers go on in the files that they have written before an interruption.

    Args:
        callbacks: Not trained with yet.
        epoch: Epochs that are not trained again.
    """
    for callback in callbacks:
        if "CSVLogger" not in _keras_classes(callback) or not os.path.exists(callback.filename):
            continue
        with open(callback.filename, newline="") as file:
            lines = file.readlines()
        with open(callback.filename, "w", newline="") as file:
            file.writelines(line for line in lines if not _is_of_epoch(line, callback.sep, epoch))
        callback.append = True


def _is_of_epoch(line: str, separator: str, least: int) -> bool:
    first = line.split(separator)[0]
    return first.isdigit() and int(first) >= least


def placement_of(callback: Any) -> Placement:
    """By the nearest of its classes that is Keras' own."""
    if isinstance(callback, OnChief):
        return "chief"
    if _tracker_of(callback) is not None:
        return "refused"
    return next((PLACEMENTS[name] for name in _keras_classes(callback) if name in PLACEMENTS), "every")


def pack(callbacks: Sequence[Any], dumps: Callable[[Any], bytes]) -> bytes:
    """The callbacks, pickled for several workers.

    Raises:
        OptionError: If one cannot run there, or cannot be pickled; names the attribute.
    """
    bare = []
    for callback in callbacks:
        inner = unwrapped([callback])[0]
        if placement_of(callback) == "refused":
            reason = _why_refused(inner)
            raise OptionError(f"{type(inner).__name__} cannot run on several workers: it {reason}.")
        made = copy.copy(inner)
        for name in _OF_A_FIT:
            vars(made).pop(name, None)
        try:
            dumps(made)
        except Exception as error:
            raise _not_picklable(made, dumps, error) from None
        bare.append(OnChief(made) if isinstance(callback, OnChief) else made)
    return dumps(bare)


def _why_refused(callback: Any) -> str:
    if (tracker := _tracker_of(callback)) is not None:
        return (
            f"logs to the {tracker} run of this process, which they do not have. Log from this process, in the "
            f"`on_epoch_end(self, epoch, logs)` of a `raykeras.DriverCallback`: `{_TRACKERS[tracker]}`"
        )
    return next(_REFUSED[name] for name in _keras_classes(callback) if name in _REFUSED)


def _tracker_of(callback: Any) -> str | None:
    roots = (cls.__module__.split(".")[0] for cls in type(callback).__mro__)
    return next((root for root in roots if root in _TRACKERS), None)


def _not_picklable(callback: Any, dumps: Callable[[Any], bytes], error: Exception) -> OptionError:
    kind = type(callback).__name__
    for name, value in vars(callback).items():
        try:
            dumps(value)
        except Exception as own:
            return OptionError(
                f"A callback goes to the workers as a pickle; `{kind}.{name}`, a {type(value).__name__}, cannot: "
                f"{own}. Make it in `on_train_begin`, there; or use a `raykeras.DriverCallback`, which stays here."
            )
    return OptionError(f"A callback goes to the workers as a pickle; {kind} cannot: {error}.")


@contextlib.contextmanager
def placed(
    callbacks: Sequence[Any], rank: int, artifacts: str, from_chief: Callable[[Any], Any]
) -> Iterator[dict[str, Any]]:
    """The callbacks that run on one of several workers, by name, their files where they belong.

    Args:
        callbacks: The user's, unpickled here.
        rank: This worker's.
        artifacts: The chief's folder, for relative paths.
        from_chief: Gives on every worker what the chief put in; all must call it.
    """
    with TemporaryFolder("unkept") as unkept:
        chosen = {}
        for index, (name, inner) in enumerate(named(callbacks).items()):
            placement = placement_of(callbacks[index])
            if rank and placement == "chief":
                continue
            if placement != "every":
                _redirect(inner, os.path.join(unkept, str(index)) if rank else artifacts, keep_absolute=not rank)
            if hasattr(inner, "backup_dir"):
                files = from_chief({} if rank else _files_of(inner.backup_dir))
                if rank:
                    _write_files(inner.backup_dir, files)
            chosen[name] = inner
        yield chosen


def _redirect(callback: Any, folder: str, keep_absolute: bool) -> None:
    """Moves the paths of one of Keras' callbacks under a folder."""
    for name in _PATHS:
        path = vars(callback).get(name)
        if not isinstance(path, str | os.PathLike):
            continue
        path = str(path)
        if keep_absolute and (os.path.isabs(path) or "://" in path):
            continue
        moved = os.path.normpath(os.path.join(folder, path.split("://")[-1].lstrip("/")))
        os.makedirs(os.path.dirname(moved), exist_ok=True)
        setattr(callback, name, moved)


def _files_of(folder: str) -> dict[str, bytes]:
    """The files of a folder, by relative path; none if it is not there."""
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()
    }


def _write_files(folder: str, files: Mapping[str, bytes]) -> None:
    for name, data in files.items():
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def states_of(callbacks: Sequence[Any], keras_there: bool) -> list[dict[str, bytes]]:
    """Each callback's attributes, pickled one by one.

    What holds variables stays behind: reading them here, on one worker, could wait for all others for ever.

    Args:
        callbacks: The chief's, after training.
        keras_there: Whether what needs Keras or TensorFlow to be read may go back, too.
    """
    from ray import cloudpickle

    class Pickler(cloudpickle.CloudPickler):
        def reducer_override(self, value: Any) -> Any:
            if any(name in _HOLDS_VARIABLES for name in _keras_classes(value)):
                raise pickle.PicklingError(f"{type(value).__name__} holds variables")
            return super().reducer_override(value)

    states = []
    for callback in callbacks:
        for name in _OF_A_FIT:
            vars(callback).pop(name, None)
    for callback in callbacks:
        state = {}
        for name, value in vars(callback).items():
            if name in _PATHS or isinstance(value, types.FunctionType | types.MethodType):
                continue  # the user's own object has its own
            buffer = io.BytesIO()
            try:
                Pickler(buffer).dump(value)
            except Exception:  # an open file, a writer: it stays where it is
                continue
            data = buffer.getvalue()
            if keras_there or not any(package in data for package in (b"keras", b"tensorflow")):
                state[name] = data
        states.append(state)
    return states


def _keras_classes(value: Any) -> Iterator[str]:
    """Names of an object's classes that are Keras' or TensorFlow's."""
    for cls in type(value).__mro__:
        if cls.__module__.split(".")[0] in ("keras", "tf_keras", "tensorflow"):
            yield cls.__name__


def hand_back(callbacks: Sequence[Any], states: Sequence[Mapping[str, bytes]], loads: Callable[[bytes], Any]) -> None:
    """Puts the chief's attributes into the user's own objects."""
    for callback, state in zip(unwrapped(callbacks), states, strict=True):
        for name, data in state.items():
            vars(callback)[name] = loads(data)
