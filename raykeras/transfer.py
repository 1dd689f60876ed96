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
from collections.abc import Sequence
from typing import Any

import fsspec
import numpy as np

from raykeras.checkpoint import MODEL_FILE, STATE_FILE, Checkpoint
from raykeras.custom_objects import recorded, restored
from raykeras.errors import CheckpointError, ModelError, OptionError, loading
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


def unpack_model(build: bytes, rank: int | None = None) -> Any:
    """The model of `pack_model`, made in a process of Ray's. Raises UserCodeError if what it needs is not there."""
    from ray import cloudpickle

    with loading(rank):
        make = cloudpickle.loads(build)
    return make()


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
            if not made.built:
                with zipfile.ZipFile(path) as archive:
                    made.build_from_config(json.loads(archive.read("config.json"))["build_config"])
            api_of(made).build_optimizer(made)  # or its state would be skipped
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
    """A compiled model as the bytes of its `.keras` file, and the user's own objects in it.

    Raises:
        ModelError: If Keras cannot write it.
    """
    api.build_optimizer(model)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, MODEL_FILE)
        with recorded(api) as table:
            try:
                model.save(path)
            except Exception as error:
                raise _not_portable(model.name, error) from error
        with open(path, "rb") as file:
            return file.read(), table


def load_model(saved: tuple[bytes, dict[str, Any]], api: KerasAPI) -> Any:
    """The reverse of `save_model`.

    Raises:
        ModelError: If Keras cannot read what it wrote.
    """
    data, table = saved
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, MODEL_FILE)
        with open(path, "wb") as file:
            file.write(data)
        with restored(api, table):
            try:
                return api.module.models.load_model(path, custom_objects=table, safe_mode=False)
            except Exception as error:
                raise _not_portable("it", error) from error


def _not_portable(name: str, error: Exception) -> ModelError:
    summary = str(error).strip().split("\n")[0]
    return ModelError(
        f"A compiled model goes to the workers as the configs of its layers, and its weights; {name!r} cannot: "
        f"{type(error).__name__}: {summary} Give its classes `get_config`, or pass a function that builds and compiles "
        "the model."
    )


def put_back(model: Any, api: KerasAPI, values: Sequence[np.ndarray] | None) -> None:
    """Trained variables into the user's own model."""
    api.build_optimizer(model)
    for variable, value in zip(api.variables(model), values or (), strict=True):
        variable.assign(value)
