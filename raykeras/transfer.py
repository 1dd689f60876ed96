"""A model on its way to the workers, and its trained variables on their way back.

Enters: whatever the user calls a model: a compiled one, a function that builds it, a checkpoint, a
`.keras` file. Leaves: a pickle from which any process makes the model, under a strategy of its own.
A compiled model travels as the bytes of its `.keras` file with the user's own objects in it.
"""

from __future__ import annotations

import functools
import json
import os
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import fsspec
import numpy as np

from raykeras.checkpoint import MODEL_FILE, STATE_FILE, Checkpoint
from raykeras.errors import CheckpointError, OptionError
from raykeras.keras_api import KerasAPI, api_of, likely_api


def is_model(model: Any) -> bool:
    """Whether it is a Keras model, and not what makes one. Raises OptionError if it is neither."""
    if hasattr(model, "fit") and hasattr(model, "train_step"):
        return True
    if not callable(model) and not isinstance(model, Checkpoint | str | os.PathLike):
        raise OptionError(f"`model` must be a compiled model or a function that builds one; got {model!r}.")
    return False


def pack_model(model: Any, *, lazily: bool = False) -> tuple[KerasAPI, bytes]:
    """The Keras of a model, and a pickled function that makes it.

    Args:
        model: A compiled model, a function that builds one, a `Checkpoint`, or the path of a
            checkpoint or of a `.keras` file.
        lazily: Whether to leave out the pickle of a compiled model, for use in this process.

    Raises:
        OptionError: If it is none of these.
        CheckpointError: If there is no such checkpoint or file.
    """
    from ray import cloudpickle

    if is_model(model):
        api = api_of(model)
        return api, b"" if lazily else cloudpickle.dumps(functools.partial(load_model, save_model(model, api), api))
    if callable(model):
        pickled = cloudpickle.dumps(model)
        return likely_api(pickled), pickled
    path = model.path if isinstance(model, Checkpoint) else os.fspath(model)
    api, file = _model_file(path if "://" in path else os.path.abspath(path))
    return api, cloudpickle.dumps(functools.partial(load_file, file, api))


def weights_into(model: Any, checkpoint: str) -> Any:
    """A function that makes the model and gives it a checkpoint's weights.

    Args:
        model: A compiled model, or a function that builds one.
        checkpoint: As `pack_model` takes it.

    Raises:
        CheckpointError: If there is no such checkpoint.
    """
    _, file = _model_file(checkpoint if "://" in checkpoint else os.path.abspath(checkpoint))

    def build() -> Any:
        made = model if is_model(model) else model()
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, MODEL_FILE)
            fs, source = fsspec.core.url_to_fs(file)
            fs.get(source, path)
            made.load_weights(path)
        return made

    return build


def load_file(path: str, api: KerasAPI) -> Any:
    """The model of a `.keras` file on any fsspec storage."""
    with fsspec.open(path, "rb") as file:
        return load_model((file.read(), {}), api)


def _model_file(path: str) -> tuple[KerasAPI, str]:
    """The `.keras` file of a checkpoint's folder, or the file itself, and its Keras."""
    fs, local = fsspec.core.url_to_fs(path)
    if fs.isdir(local):
        if not fs.exists(f"{local}/{STATE_FILE}"):
            raise CheckpointError(
                f"A checkpoint is a folder with {STATE_FILE}; {path!r} has none. A run's checkpoints lie in its "
                "folder `checkpoints`; `result.checkpoints` lists them."
            )
        path = f"{path.rstrip('/')}/{MODEL_FILE}"
    try:
        with fsspec.open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            version = str(json.loads(archive.read("metadata.json"))["keras_version"])
    except FileNotFoundError:
        raise CheckpointError(f"A model's file must exist; there is no {path!r}.") from None
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"A model's file must be a `.keras` file; {path!r} is not: {error}") from None
    return KerasAPI("tf_keras" if version.startswith("2.") else "keras"), path


def save_model(model: Any, api: KerasAPI) -> tuple[bytes, dict[str, Any]]:
    """A compiled model as the bytes of its `.keras` file, and the user's own objects in it."""
    api.build_optimizer(model)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.keras")
        model.save(path)
        with open(path, "rb") as file:
            return file.read(), _custom_objects(model, api)


def load_model(saved: tuple[bytes, dict[str, Any]], api: KerasAPI) -> Any:
    """The reverse of `save_model`."""
    data, custom_objects = saved
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.keras")
        with open(path, "wb") as file:
            file.write(data)
        return api.module.models.load_model(path, custom_objects=custom_objects)


def _custom_objects(model: Any, api: KerasAPI) -> dict[str, Any]:
    """The user's own classes and functions that a model is made of, by name."""
    found: dict[str, Any] = {}

    def add(value: Any) -> None:
        if isinstance(value, Mapping):
            for part in value.values():
                add(part)
        elif isinstance(value, list | tuple):
            for part in value:
                add(part)
        elif value is not None and not isinstance(value, str | int | float | bool):
            kind = value if isinstance(value, type) or hasattr(value, "__code__") else type(value)
            if kind.__module__.split(".")[0] not in ("keras", "tf_keras", "builtins", "tensorflow", "numpy"):
                found[kind.__name__] = kind

    add(model)
    add(list(model._flatten_layers()))
    for name in ("loss", "optimizer", "metrics"):
        add(getattr(model, name, None))
    config = getattr(model, "_compile_config", None)
    add(getattr(config, "config", None))
    return found


def put_back(model: Any, api: KerasAPI, values: Sequence[np.ndarray] | None) -> None:
    """Trained variables into the user's own model."""
    api.build_optimizer(model)
    for variable, value in zip(api.variables(model), values or (), strict=True):
        variable.assign(value)
