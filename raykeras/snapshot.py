"""The state of a training, copied out of the model at a step and put back later.

Enters: a model, and what else a training goes on from. Leaves: a `Snapshot`, which no longer needs the model, so
that a thread can write it while training goes on: `model.keras` (weights, optimizer), `state.npz` (metrics and
random seeds so far, arrays of callbacks) and `train_state.json` (everything else; see `raykeras.checkpoint`).

`model.keras` is written by Keras itself: `Model.save` runs with a store that copies each array, and what it
copied is put into the archive by Keras' own store, straight into its place (see `raykeras.archive`). Of a model that
Keras cannot serialise, `model.weights.h5` is written instead, by `Model.save_weights` in the same way.
"""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from raykeras import checkpoint
from raykeras.archive import crc_of_archive, stored_member
from raykeras.checkpoint import ARRAYS_FILE, MODEL_FILE, WEIGHTS_FILE, Checkpoint
from raykeras.errors import CheckpointError, RaykerasError
from raykeras.keras_api import KerasAPI
from raykeras.patching import replaced
from raykeras.plain import from_plain, to_plain
from raykeras.temporary import TemporaryFolder


class Buffers:
    """Memory for copies, used again: getting pages anew from the system takes several times as long as to copy.

    A snapshot of a model of M bytes, optimizer included, keeps M bytes; twice that where one is taken while the one
    before is still being written.
    """

    def __init__(self) -> None:
        self._free: dict[tuple[Any, ...], list[np.ndarray]] = {}

    def copy(self, array: np.ndarray) -> np.ndarray:
        """A copy, to be given back."""
        free = self._free.get((array.shape, array.dtype.str))
        if not free:
            return np.array(array)
        made = free.pop()
        np.copyto(made, array)
        return made

    def give_back(self, arrays: Iterable[np.ndarray]) -> None:
        for array in arrays:
            self._free.setdefault((array.shape, array.dtype.str), []).append(array)


@dataclass(frozen=True)
class Snapshot:
    """A training at a step.

    Attributes:
        archive: The bytes of `model.keras`, without weights; None of a model that Keras cannot serialise.
        groups: Path, metadata and arrays of each group of the weights' file.
        store: Keras' class that writes that file.
        arrays: Arrays beside the model, by name.
        state: Everything else, as JSON takes it.
        buffers: To which the groups' arrays go back.
        unserializable: Why Keras cannot serialise the model.
    """

    archive: bytes | None
    groups: list[_Group]
    store: Any
    arrays: dict[str, Any]
    state: Mapping[str, Any]
    buffers: Buffers
    unserializable: str = ""

    def release(self) -> None:
        """Gives its memory back; it cannot be written any more."""
        for group in self.groups:
            self.buffers.give_back(group.values())
            group.clear()

    def write(self, folder: str) -> None:
        """Writes a checkpoint into an empty local folder."""
        known = {}
        if self.archive is None:
            self._write_weights(os.path.join(folder, WEIGHTS_FILE))
        else:
            with open(os.path.join(folder, MODEL_FILE), "w+b") as file:
                file.write(self.archive)
                with stored_member(file, WEIGHTS_FILE) as member:
                    self._write_weights(member)
                size, crc = file.seek(0, os.SEEK_END), crc_of_archive(file, member)
            known[MODEL_FILE] = {"size": size, "crc32": f"{crc:08x}"}
        np.savez(os.path.join(folder, ARRAYS_FILE), allow_pickle=False, **self.arrays)
        checkpoint.write_state(folder, self.state, known)

    def _write_weights(self, path_or_file: Any) -> None:
        store = self.store(path_or_file, mode="w")
        for group in self.groups:
            made = store.make(group.path, **({"metadata": group.metadata} if group.metadata else {}))
            for name, value in group.items():
                made[name] = value
        store.close()


class _Group(dict[str, np.ndarray]):
    """Stands in for a group of the weights' file; copies what it is given."""

    def __init__(self, path: str, metadata: Any, buffers: Buffers) -> None:
        self.path, self.metadata, self._buffers = path, metadata, buffers

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, self._buffers.copy(_viewed(value)))


def _viewed(value: Any) -> np.ndarray:
    """A variable's numbers where they are, if that can be; `numpy()` would copy them."""
    import tensorflow as tf

    if isinstance(value, np.ndarray):
        return value
    try:
        return np.asarray(memoryview(tf.convert_to_tensor(getattr(value, "value", value))))
    except (TypeError, ValueError):  # bfloat16 is no type of a buffer's
        return np.asarray(value)


def _collecting(groups: list[_Group], buffers: Buffers) -> type:
    """A class that stands in for Keras' store of the weights' file."""

    class Collecting:
        archive: Any = None

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            """Nothing is opened."""

        def make(self, path: str, metadata: Any = None) -> _Group:
            groups.append(_Group(path, metadata, buffers))
            return groups[-1]

        def close(self) -> None:
            """Nothing is open."""

    return Collecting


def take(
    model: Any,
    api: KerasAPI,
    state: Mapping[str, Any],
    extra: Mapping[str, Any],
    buffers: Buffers,
    unserializable: str = "",
) -> Snapshot:
    """Copies a training's state. With several workers, all must call it.

    Args:
        model: Being trained.
        api: Its Keras.
        state: Position and the like, as JSON takes it.
        extra: Plain values by name, which may hold arrays; see `raykeras.plain`.
        buffers: Memory for the copies; given back by `Snapshot.release`.
        unserializable: Of an earlier snapshot of this model.
    """
    groups: list[_Group] = []
    saving = api.saving_lib
    original = saving.H5IOStore
    with TemporaryFolder("snapshot") as folder:
        path = os.path.join(folder, MODEL_FILE)
        with contextlib.ExitStack() as stack:
            stack.enter_context(replaced(saving, "H5IOStore", _collecting(groups, buffers)))
            if hasattr(saving, "is_memory_sufficient"):  # or Keras 3 would write a file
                stack.enter_context(replaced(saving, "is_memory_sufficient", lambda model: True))
            if not api.is_legacy:  # an optimizer hands over copies
                stack.enter_context(replaced(api.module.Variable, "numpy", _viewed))
            build_config = model.get_build_config() if model.built else None
            stack.enter_context(api.taken_as_built(model))
            if not unserializable:
                unserializable = _saved(model, path)
            if unserializable:
                buffers.give_back(array for group in groups for array in group.values())
                groups.clear()
                model.save_weights(os.path.join(folder, WEIGHTS_FILE))
                state = {**state, "build_config": build_config}
        archive = None if unserializable else Path(path).read_bytes()
    arrays: dict[str, np.ndarray] = {}
    beside = {"metrics": api.metric_variables(model), "seeds": api.seed_states(model)}
    for kind, variables in beside.items():
        arrays.update({f"{kind}/{i}": np.array(variable.numpy()) for i, variable in enumerate(variables)})
    rng = {"python": random.getstate(), "numpy": np.random.get_state()}
    values = {name: to_plain(value, arrays, name) for name, value in {**extra, "rng": rng}.items()}
    state = {**state, **values, "extra": list(values)}
    return Snapshot(archive, groups, original, arrays, state, buffers, unserializable)


def _saved(model: Any, path: str) -> str:
    """Save a model; return why Keras cannot serialise it, or an empty text."""
    try:
        model.save(path)
    except OSError:
        raise
    except Exception as error:  # Keras raises whatever the `get_config` of the user's classes does
        summary = str(error).strip().split("\n")[0]
        return f"{type(error).__name__}: {summary}"
    return ""


@dataclass(frozen=True)
class Restored:
    """What a checkpoint holds beside the model.

    Attributes:
        taken: The checkpoint.
        state: As `take` was given it.
        extra: As `take` was given it.
        metrics: Values of the metrics' variables, in their order.
    """

    taken: Checkpoint
    state: Mapping[str, Any]
    extra: Mapping[str, Any]
    metrics: list[np.ndarray]


def restore(model: Any, api: KerasAPI, taken: Checkpoint) -> Restored:
    """Puts a checkpoint's state into a built model; all but its metrics, which `fit` resets.

    Args:
        model: Built and compiled as the one that was saved.
        api: Its Keras.
        taken: The checkpoint.

    Raises:
        CheckpointError: If it is of another model.
    """
    state = taken.state
    restore_weights(model, api, taken)
    with _reading(taken):
        with taken.local_file(ARRAYS_FILE) as path, np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        for i, variable in enumerate(api.seed_states(model)):
            if f"seeds/{i}" in arrays:
                variable.assign(arrays[f"seeds/{i}"])
        extra = {name: from_plain(state[name], arrays) for name in state["extra"]}
        random.setstate(extra["rng"]["python"])
        np.random.set_state(extra["rng"]["numpy"])
        metrics = [arrays[f"metrics/{i}"] for i in range(sum(name.startswith("metrics/") for name in arrays))]
    return Restored(taken, state, extra, metrics)


@contextlib.contextmanager
def _reading(taken: Checkpoint) -> Iterator[None]:
    """Raise whatever a value of another form causes as an error that names the checkpoint."""
    try:
        yield
    except RaykerasError:
        raise
    except Exception as error:
        raise CheckpointError(f"{taken.path} is damaged: {type(error).__name__}: {error}.") from error


def restore_weights(model: Any, api: KerasAPI, taken: Checkpoint) -> None:
    """Puts weights and optimizer of a checkpoint into a built model.

    Raises:
        CheckpointError: If it is of another model.
    """
    api.build_optimizer(model)  # or its state would be skipped
    with taken.local_file(taken.weights_file) as path:
        try:
            with api.taken_as_built(model), api.loading():
                model.load_weights(path)
        except Exception as error:
            raise CheckpointError(f"The weights of {taken.path} are of another model: {error}") from error


def restore_metrics(model: Any, api: KerasAPI, restored: Restored, rank: int) -> None:
    """Puts a checkpoint's values of metrics back; what replicas add up is put into the first one.

    Raises:
        CheckpointError: If they are values of other metrics.
    """
    variables = list(api.metric_variables(model))
    if len(variables) != len(restored.metrics):
        raise CheckpointError(
            f"A run that is resumed within an epoch needs the metrics that it began with; {restored.taken.path} holds "
            f"{len(restored.metrics)} variables of metrics, and the model has {len(variables)}. Compile the model with "
            "the same metrics, or give the run another `name`."
        )
    with _reading(restored.taken):
        for variable, value in zip(variables, restored.metrics, strict=True):
            _assign(variable, value, rank)


def _assign(variable: Any, value: np.ndarray, rank: int) -> None:
    import tensorflow as tf

    inner = getattr(variable, "_value", variable)  # of Keras 3's
    if type(inner).__name__ != "SyncOnReadVariable":
        variable.assign(value)
        return
    for i, part in enumerate(inner.values):
        mine = inner.aggregation != tf.VariableAggregation.SUM or (rank == 0 and i == 0)
        part.assign(value if mine else np.zeros_like(value))
