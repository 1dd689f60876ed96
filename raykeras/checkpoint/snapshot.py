"""Copy the state of a training run at a step, and restore it later.

A `Snapshot` is independent of the model, so that a thread can write it while training continues. It becomes
`model.keras` (weights and optimizer), `state.npz` (metrics, random states and arrays of callbacks) and
`train_state.json` (everything else; see `raykeras.checkpoint.store`).

Keras itself produces `model.keras`: `Model.save` runs with a store that copies each array, and later Keras' own store
writes the copies straight into the archive (see `raykeras.checkpoint.zip_member`). If Keras cannot serialise the
model, `Model.save_weights` produces `model.weights.h5` in the same way.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from raykeras.checkpoint import store as checkpoint_store
from raykeras.checkpoint.serialization import from_json, to_json
from raykeras.checkpoint.store import ARRAYS_FILE, MODEL_FILE, WEIGHTS_FILE, Checkpoint
from raykeras.checkpoint.zip_member import crc_of_archive, stored_member
from raykeras.compat.keras_api import KerasAPI
from raykeras.compat.keras_saving import Buffers, VariableGroup, collecting_store, viewed
from raykeras.compat.patch import patched
from raykeras.core.errors import CheckpointError, RaykerasError
from raykeras.core.temporary import TemporaryFolder


@dataclass(frozen=True)
class Snapshot:
    """The state of a training run at a step.

    Attributes:
        archive: The bytes of `model.keras` without weights; None if Keras cannot serialise the model.
        groups: Path, metadata and arrays of each group of the weights file.
        store: The class of Keras that writes the weights file.
        arrays: Arrays outside the model, by name.
        state: Everything else, as JSON-compatible values.
        buffers: The pool to which the arrays of the groups are returned.
        unserializable: Why Keras cannot serialise the model; empty if it can.
    """

    archive: bytes | None
    groups: list[VariableGroup]
    store: Any
    arrays: dict[str, Any]
    state: Mapping[str, Any]
    buffers: Buffers
    unserializable: str = ""

    def release(self) -> None:
        """Return the memory to the pool. The snapshot cannot be written afterwards."""
        for group in self.groups:
            self.buffers.give_back(group.values())
            group.clear()

    def write(self, folder: str) -> None:
        """Write a checkpoint into an empty local folder."""
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
        checkpoint_store.write_state(folder, self.state, known)

    def _write_weights(self, path_or_file: Any) -> None:
        store = self.store(path_or_file, mode="w")
        for group in self.groups:
            stored_group = store.make(group.path, **({"metadata": group.metadata} if group.metadata else {}))
            for name, value in group.items():
                stored_group[name] = value
        store.close()


def take(
    model: Any,
    api: KerasAPI,
    state: Mapping[str, Any],
    extra: Mapping[str, Any],
    buffers: Buffers,
    unserializable: str = "",
) -> Snapshot:
    """Take a snapshot of a training run. All workers must call it together.

    Args:
        model: The model in training.
        api: The Keras package of the model.
        state: Position, logs and versions, as JSON-compatible values.
        extra: Further values by name, which may contain arrays; see `raykeras.checkpoint.serialization`.
        buffers: Pool of memory for the copies; `Snapshot.release` returns them.
        unserializable: That of an earlier snapshot of this model.
    """
    groups: list[VariableGroup] = []
    saving = api.saving_lib
    h5_store = saving.H5IOStore
    with TemporaryFolder("snapshot") as folder:
        path = os.path.join(folder, MODEL_FILE)
        with contextlib.ExitStack() as stack:
            stack.enter_context(patched(saving, "H5IOStore", collecting_store(groups, buffers)))
            if hasattr(saving, "is_memory_sufficient"):  # Otherwise Keras 3 may write a temporary file.
                stack.enter_context(patched(saving, "is_memory_sufficient", lambda model: True))
            if not api.is_legacy:  # Otherwise an optimizer copies its variables first.
                stack.enter_context(patched(api.module.Variable, "numpy", viewed))
            build_config = model.get_build_config() if model.built else None
            stack.enter_context(api.taken_as_built(model))
            if not unserializable:
                unserializable = _try_save(model, path)
            if unserializable:
                buffers.give_back(array for group in groups for array in group.values())
                groups.clear()
                model.save_weights(os.path.join(folder, WEIGHTS_FILE))
                state = {**state, "build_config": build_config}
        archive = None if unserializable else Path(path).read_bytes()
    arrays: dict[str, np.ndarray] = {}
    variables_by_kind = {"metrics": api.metric_variables(model), "seeds": api.seed_states(model)}
    for kind, variables in variables_by_kind.items():
        arrays.update({f"{kind}/{i}": np.array(variable.numpy()) for i, variable in enumerate(variables)})
    rng = {"python": random.getstate(), "numpy": np.random.get_state()}
    values = {name: to_json(value, arrays, name) for name, value in {**extra, "rng": rng}.items()}
    state = {**state, **values, "extra": list(values)}
    return Snapshot(archive, groups, h5_store, arrays, state, buffers, unserializable)


def _try_save(model: Any, path: str) -> str:
    """Save a model; return why Keras cannot serialise it, or an empty string."""
    try:
        model.save(path)
    except OSError:
        raise
    except Exception as error:  # The user's `get_config` methods may raise anything.
        summary = str(error).strip().split("\n")[0]
        return f"{type(error).__name__}: {summary}"
    return ""


@dataclass(frozen=True)
class Restored:
    """The state in a checkpoint outside the model.

    Attributes:
        checkpoint: The checkpoint.
        state: The argument `state` of `take`.
        extra: The argument `extra` of `take`.
        metrics: Values of the metrics' variables, in the order of `KerasAPI.metric_variables`.
    """

    checkpoint: Checkpoint
    state: Mapping[str, Any]
    extra: Mapping[str, Any]
    metrics: list[np.ndarray]


def restore(model: Any, api: KerasAPI, checkpoint: Checkpoint) -> Restored:
    """Restore the model and the random states of a checkpoint.

    The metrics are not restored, since `fit` resets them; see `restore_metrics`.

    Args:
        model: Model that is built and compiled like the saved one.
        api: The Keras package of the model.
        checkpoint: The checkpoint.

    Returns:
        The rest of the checkpoint's state.

    Raises:
        CheckpointError: The checkpoint is damaged or belongs to another model.
    """
    state = checkpoint.state
    restore_weights(model, api, checkpoint)
    with _damage_reported(checkpoint):
        with checkpoint.local_file(ARRAYS_FILE) as path, np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        for i, variable in enumerate(api.seed_states(model)):
            if f"seeds/{i}" in arrays:
                variable.assign(arrays[f"seeds/{i}"])
        extra = {name: from_json(state[name], arrays) for name in state["extra"]}
        random.setstate(extra["rng"]["python"])
        np.random.set_state(extra["rng"]["numpy"])
        metrics = [arrays[f"metrics/{i}"] for i in range(sum(name.startswith("metrics/") for name in arrays))]
    return Restored(checkpoint, state, extra, metrics)


@contextlib.contextmanager
def _damage_reported(checkpoint: Checkpoint) -> Iterator[None]:
    """Raise exceptions as `CheckpointError` while the block reads values of a checkpoint."""
    try:
        yield
    except RaykerasError:
        raise
    except Exception as error:
        raise CheckpointError(f"{checkpoint.path} is damaged: {type(error).__name__}: {error}.") from error


def restore_weights(model: Any, api: KerasAPI, checkpoint: Checkpoint) -> None:
    """Restore the weights and the optimizer of a built model from a checkpoint.

    Raises:
        CheckpointError: The checkpoint belongs to another model.
    """
    api.build_optimizer(model)  # Keras skips the state of an optimizer that is not built.
    with checkpoint.local_file(checkpoint.weights_file) as path:
        try:
            with api.taken_as_built(model), api.loading():
                model.load_weights(path)
        except Exception as error:
            raise CheckpointError(
                f"The weights in {checkpoint.path} belong to another model: {error} Build the same model "
                "as in the checkpointed run."
            ) from error


def restore_metrics(model: Any, api: KerasAPI, restored: Restored, rank: int) -> None:
    """Restore the metrics of a model.

    Variables that are summed over replicas are restored on the first replica of rank 0 and set to zero elsewhere.

    Args:
        model: The restored model.
        api: The Keras package of the model.
        restored: The result of `restore`.
        rank: Rank of the worker.

    Raises:
        CheckpointError: The checkpoint holds values of other metrics.
    """
    variables = list(api.metric_variables(model))
    if len(variables) != len(restored.metrics):
        raise CheckpointError(
            "A run that resumes within an epoch needs the metrics that it started with; "
            f"{restored.checkpoint.path} holds {len(restored.metrics)} metric variables, the model has "
            f"{len(variables)}. Compile the model with the same metrics, or give the run another `name`."
        )
    with _damage_reported(restored.checkpoint):
        for variable, value in zip(variables, restored.metrics, strict=True):
            _assign(variable, value, rank)


def _assign(variable: Any, value: np.ndarray, rank: int) -> None:
    import tensorflow as tf

    tf_variable = getattr(variable, "_value", variable)  # Keras 3 wraps it.
    if type(tf_variable).__name__ != "SyncOnReadVariable":
        variable.assign(value)
        return
    for i, component in enumerate(tf_variable.values):
        keeps_value = tf_variable.aggregation != tf.VariableAggregation.SUM or (rank == 0 and i == 0)
        component.assign(value if keeps_value else np.zeros_like(value))


def variables_of(model: Any) -> list[str]:
    """Return the name and shape of each variable, which must match for a model to resume a run."""
    return [f"{v.name.split('/')[-1].split(':')[0]} {list(v.shape)}" for v in model.variables]


def signature_of(model: Any, api: KerasAPI) -> dict[str, Any]:
    """Return the optimizer and its options, which must match for a model to resume a run.

    Call it before the model is trained.
    """
    optimizer = getattr(model, "optimizer", None)
    options: dict[str, Any] = {}
    with contextlib.suppress(NotImplementedError):  # TensorFlow's own optimizers have no config.
        options = {} if optimizer is None else optimizer.get_config()
    options.pop("name", None)  # Keras numbers the names within a process.
    if optimizer is not None and int(optimizer.iterations.numpy()):
        options.pop("learning_rate", None)  # Callbacks may have changed it.
    return {
        "optimizer": type(optimizer).__name__,
        "options": json.loads(json.dumps(options, default=str, sort_keys=True)),
        "keras": api.name,
    }


def check_signature(checkpoint: Checkpoint, saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Check that a model can resume from a checkpoint.

    Args:
        checkpoint: The checkpoint.
        saved: Its signature: that of `signature_of`, with `variables_of` under "variables".
        current: The signature of the model.

    Raises:
        CheckpointError: The signatures differ.
    """
    for name in ("keras", "variables", "optimizer"):
        _require_same(checkpoint, "model" if name == "variables" else name, saved[name], current[name])
    for name in {**saved["options"], **current["options"]}:
        if name == "learning_rate" and not (name in saved["options"] and name in current["options"]):
            continue
        _require_same(checkpoint, f"optimizer's {name}", saved["options"].get(name), current["options"].get(name))


def _require_same(checkpoint: Checkpoint, what: str, saved: Any, current: Any) -> None:
    if saved != current:
        raise CheckpointError(
            f"A run must resume with the {what} that it started with; {checkpoint.path} has {saved}, this run has "
            f'{current}. Use the same one, resume only the weights with `Run(resume="weights")`, or give the run '
            "another `name`."
        )
