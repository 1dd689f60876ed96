"""Copy the state of a training run at a step, and restore it later.

A `Snapshot` is independent of the model, so that a thread can write it while training continues. It becomes
`model.keras` (weights and optimizer), `state.npz` (metrics, random states and arrays of callbacks) and
`train_state.json` (everything else; see `raykeras.checkpoint.store`).

Keras itself produces `model.keras`: `Model.save` runs with a store that copies each array, and later Keras' own store
writes the copies to a file, which is added to the archive. If Keras cannot serialise the model, `Model.save_weights`
produces `model.weights.h5` in the same way.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from raykeras.checkpoint import store as checkpoint_store
from raykeras.checkpoint.serialization import from_json, to_json
from raykeras.checkpoint.store import ARRAYS_FILE, MODEL_FILE, WEIGHTS_FILE, Checkpoint
from raykeras.compat.keras_api import KerasAPI
from raykeras.compat.keras_saving import Buffers, CopiedWeights, weights_copied
from raykeras.core.errors import CheckpointError, RaykerasError
from raykeras.core.temporary import TemporaryFolder

_COPY_NBYTES = 4 << 20


@dataclass(frozen=True)
class Snapshot:
    """The state of a training run at a step.

    Attributes:
        file: Name of the file that Keras saves: `MODEL_FILE`, or `WEIGHTS_FILE` if it cannot serialise the model.
        saved: The bytes of this file, without weights if `weights` holds them.
        weights: Copies of the weights; None if `saved` contains them.
        arrays: Arrays outside the model, by name.
        state: Everything else, as JSON-compatible values.
        unserializable: Why Keras cannot serialise the model; empty if it can.
    """

    file: str
    saved: bytes
    weights: CopiedWeights | None
    arrays: dict[str, Any]
    state: Mapping[str, Any]
    unserializable: str = ""

    def release(self) -> None:
        """Return the memory to the pool. The snapshot cannot be written afterwards."""
        if self.weights is not None:
            self.weights.release()

    def write(self, folder: str) -> None:
        """Write a checkpoint into an empty local folder."""
        path, weights_path = os.path.join(folder, self.file), os.path.join(folder, WEIGHTS_FILE)
        if self.weights is None:
            Path(path).write_bytes(self.saved)
        else:
            self.weights.write(weights_path)
            if self.file == MODEL_FILE:
                _write_archive(path, self.saved, weights_path)
                os.remove(weights_path)
        np.savez(os.path.join(folder, ARRAYS_FILE), allow_pickle=False, **self.arrays)
        checkpoint_store.write_state(folder, self.state)


def _write_archive(path: str, saved: bytes, weights_path: str) -> None:
    """Write a `.keras` file from its bytes without weights and the file with its weights."""
    with zipfile.ZipFile(io.BytesIO(saved)) as source, zipfile.ZipFile(path, "w") as archive:
        for info in source.infolist():
            if info.filename != WEIGHTS_FILE:  # With little free memory, Keras leaves an empty file in its place.
                archive.writestr(info, source.read(info))
        with archive.open(WEIGHTS_FILE, "w", force_zip64=True) as member, open(weights_path, "rb") as weights:
            shutil.copyfileobj(weights, member, _COPY_NBYTES)


def take_snapshot(
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
    build_config = model.get_build_config() if model.built else None
    with TemporaryFolder("snapshot") as folder, weights_copied(api, buffers) as weights, api.marked_as_built(model):
        path = Path(folder, MODEL_FILE)
        if not unserializable:
            unserializable = _try_save(model, str(path))
        if unserializable:
            if weights is not None:
                weights.release()
            path = Path(folder, WEIGHTS_FILE)
            model.save_weights(str(path))
            state = {**state, "build_config": build_config}
        saved = path.read_bytes() if path.exists() else b""  # Copied weights are not written.
    arrays: dict[str, np.ndarray] = {}
    variables_by_kind = {
        "metrics": api.metric_variables(model),
        "seeds": api.seed_states(model),
        "learning_rate": api.separate_learning_rate(model),
    }
    for kind, variables in variables_by_kind.items():
        arrays.update({f"{kind}/{i}": np.array(variable.numpy()) for i, variable in enumerate(variables)})
    rng = {"python": random.getstate(), "numpy": np.random.get_state()}
    values = {name: to_json(value, arrays, name) for name, value in {**extra, "rng": rng}.items()}
    state = {**state, **values, "extra": list(values)}
    return Snapshot(path.name, saved, weights, arrays, state, unserializable)


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
        state: The argument `state` of `take_snapshot`.
        extra: The argument `extra` of `take_snapshot`.
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
        for kind, variables in (
            ("seeds", api.seed_states(model)),
            ("learning_rate", api.separate_learning_rate(model)),
        ):
            for i, variable in enumerate(variables):
                if f"{kind}/{i}" in arrays:
                    variable.assign(arrays[f"{kind}/{i}"])
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
            with api.marked_as_built(model), api.loading():
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

    tf_variable = variable if isinstance(variable, tf.Variable) else variable.value  # Keras 3 wraps it.
    is_per_replica = isinstance(tf_variable, tf.distribute.DistributedValues)
    if not is_per_replica or tf_variable.synchronization != tf.VariableSynchronization.ON_READ:
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
        "options": json.loads(json.dumps(options, default=_plain_option, sort_keys=True)),
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
        values = [_rounded(signature["options"].get(name)) for signature in (saved, current)]
        _require_same(checkpoint, f"optimizer's {name}", *values)


def _plain_option(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else str(value)


def _rounded(value: Any) -> Any:
    """Round a float as the optimizers of tf_keras do once they have variables."""
    return float(np.float32(value)) if isinstance(value, float) else value


def _require_same(checkpoint: Checkpoint, what: str, saved: Any, current: Any) -> None:
    if saved != current:
        raise CheckpointError(
            f"A run must resume with the {what} that it started with; {checkpoint.path} has {saved}, this run has "
            f'{current}. Use the same one, resume only the weights with `Run(resume="weights")`, or give the run '
            "another `name`."
        )
