"""Pack a model for the workers: a compiled model, a build function, a checkpoint or a `.keras` file.

The result is a pickled function that creates the model in any process, under that process's strategy. A compiled model
is packed as the bytes of its `.keras` file, together with its custom objects.
"""

from __future__ import annotations

import functools
import io
import json
import os
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import fsspec

from raykeras.checkpoint.store import MODEL_FILE, STATE_FILE, WEIGHTS_FILE, Checkpoint
from raykeras.compat.keras_api import KerasAPI, api_of, guess_api
from raykeras.compat.keras_custom_objects import recorded, restored
from raykeras.core.error_context import loading
from raykeras.core.errors import CheckpointError, ModelError, OptionError
from raykeras.core.temporary import TemporaryFolder


@dataclass(frozen=True)
class ModelFile:
    """A `.keras` file on any fsspec storage, which loads the model when called. Picklable.

    Attributes:
        path: Absolute path or URL.
        api: The Keras package that wrote the file.
        safe_mode: Whether to refuse code in the file, as in `keras.saving.load_model`.
    """

    path: str
    api: KerasAPI
    safe_mode: bool

    def __call__(self) -> Any:
        """Load the model.

        Raises:
            ModelError: The file contains code, or Keras cannot read it.
        """
        with fsspec.open(self.path, "rb") as file:
            data = file.read()
        try:
            return _load_bytes(data, self.api, {}, self.safe_mode)
        except Exception as error:
            if self.safe_mode and "safe_mode" in str(error):
                raise ModelError(
                    f"A model file must not contain code, such as that of a Lambda layer; {self.path!r} does. Pass "
                    "`safe_mode=False` to run the code, if you trust everyone who can write the file."
                ) from None
            raise ModelError(
                f"A model file must be readable by {self.api.name}; {self.path!r} is not: {_summary(error)} Register "
                "custom classes with `keras.saving.register_keras_serializable`."
            ) from error


def is_model(model: Any) -> bool:
    """Return whether a value is a Keras model, rather than a class or function that creates one."""
    return hasattr(model, "fit") and hasattr(model, "train_step") and not isinstance(model, type)


def as_model(model: Any, *, safe_mode: bool = True) -> Any:
    """Return a model or function unchanged, and a checkpoint or path as a `ModelFile`.

    Args:
        model: A model, a function that builds one, a `Checkpoint`, or the path of a checkpoint or `.keras` file.
        safe_mode: Whether to refuse code in a file, unless Keras' `enable_unsafe_deserialization` was called.

    Raises:
        OptionError: `model` is none of these.
        CheckpointError: The checkpoint or file does not exist.
    """
    if is_model(model) or callable(model):
        return model
    if not isinstance(model, Checkpoint | str | os.PathLike):
        raise OptionError(f"`model` must be a compiled model or a function that builds one; got {model!r}.")
    path = model.path if isinstance(model, Checkpoint) else os.fspath(model)
    api, file = _model_file(_absolute(path))
    return ModelFile(file, api, safe_mode and not api.allows_unsafe_deserialization)


def pack_model(model: Any, *, lazily: bool = False) -> tuple[KerasAPI, bytes]:
    """Return the Keras package of a model, and a pickled function that creates the model.

    Args:
        model: A result of `as_model`.
        lazily: Whether to return an empty pickle for a compiled model, which this process uses directly.
    """
    if is_model(model):
        api = api_of(model)
        return api, b"" if lazily else _pickled(functools.partial(load_model, save_model(model, api), api))
    pickled = _pickled(model)
    return model.api if isinstance(model, ModelFile) else guess_api(pickled), pickled


def _pickled(create: Callable[[], Any]) -> bytes:
    from ray import cloudpickle

    try:
        return cloudpickle.dumps(create)
    except Exception as error:  # whatever the user's `__reduce__` methods raise
        raise ModelError(
            "A model is pickled for other processes, with the functions and classes of the script that it uses; all "
            f"that these refer to must be picklable; got {_summary(error)}. Create such an object inside of the "
            "function that builds the model, or in a module."
        ) from error


def unpack_model(build: bytes, rank: int | None = None) -> Any:
    """Create the model of `pack_model` in a Ray process.

    Args:
        build: The pickled function.
        rank: Rank of the worker, or None for a data task.

    Raises:
        UserCodeError: A module that the function needs cannot be imported.
    """
    from ray import cloudpickle

    with loading(rank):
        create = cloudpickle.loads(build)
    return create()


def load_weights_into(model: Any, checkpoint: str) -> Any:
    """Return a function that creates the model and loads a checkpoint's weights into it.

    Args:
        model: A compiled model, or a function that builds one.
        checkpoint: Path of a checkpoint or a `.keras` file.

    Raises:
        CheckpointError: The checkpoint does not exist.
    """
    path = _absolute(checkpoint)
    folder_checkpoint = _checkpoint_at(path)
    name = MODEL_FILE if folder_checkpoint is None else folder_checkpoint.weights_file
    file = _model_file(path)[1] if name == MODEL_FILE else f"{path}/{name}"

    def build() -> Any:
        target = model if is_model(model) else model()
        with TemporaryFolder("model") as folder:
            local = os.path.join(folder, name)
            fs, source = fsspec.core.url_to_fs(file)
            fs.get(source, local)
            if not target.built and (config := _build_config(local, folder_checkpoint)):
                target.build_from_config(config)
            api = api_of(target)
            api.build_optimizer(target)  # Keras skips the state of an optimizer that is not built.
            with api.marked_as_built(target), api.loading():
                target.load_weights(local)
        return target

    return build


def _build_config(file: str, checkpoint: Checkpoint | None) -> Any:
    """Return the result of `Model.get_build_config` when a file was written."""
    if checkpoint is not None and os.path.basename(file) == WEIGHTS_FILE:
        return checkpoint.state.get("build_config")
    with zipfile.ZipFile(file) as archive:
        return json.loads(archive.read("config.json"))["build_config"]


def _absolute(path: str) -> str:
    return path.rstrip("/") if "://" in path else os.path.abspath(path)


def _checkpoint_at(path: str) -> Checkpoint | None:
    """Return the checkpoint in a folder; None if the path is not a folder."""
    fs, local = fsspec.core.url_to_fs(path)
    if not fs.isdir(local):
        return None
    if not fs.exists(f"{local}/{STATE_FILE}"):
        raise CheckpointError(
            f"A checkpoint must be a folder with {STATE_FILE}; {path!r} has none. Pass one of the folders in the run's "
            "folder `checkpoints`, which `result.checkpoints` lists."
        )
    return Checkpoint(path)


def _model_file(path: str) -> tuple[KerasAPI, str]:
    """Return the Keras package and the path of a `.keras` file, given its path or that of a checkpoint."""
    checkpoint = _checkpoint_at(path)
    path = path if checkpoint is None else checkpoint.model_file
    try:
        with fsspec.open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            version = str(json.loads(archive.read("metadata.json"))["keras_version"])
    except FileNotFoundError:
        raise CheckpointError(f"A model file must exist; there is no {path!r}.") from None
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"A model file must be a `.keras` file; {path!r} is not: {error}") from None
    return KerasAPI("tf_keras" if version.startswith("2.") else "keras"), path


@dataclass(frozen=True)
class SavedModel:
    """A compiled model on its way to another process.

    Attributes:
        data: The bytes of its `.keras` file.
        custom_objects: Its custom objects, by the names that the file uses.
        trainable: `trainable` of the model and all layers in it, which the configs of custom layers may lack.
        has_trained: Whether its optimizer has made a step.
    """

    data: bytes
    custom_objects: dict[str, Any]
    trainable: list[bool]
    has_trained: bool


def save_model(model: Any, api: KerasAPI) -> SavedModel:
    """Save a compiled model.

    Returns:
        The bytes of its `.keras` file, and its custom objects by the names that the file uses.

    Raises:
        ModelError: Keras cannot serialise the model.
    """
    api.build_optimizer(model)
    with TemporaryFolder("model") as folder:
        path = os.path.join(folder, MODEL_FILE)
        with recorded(api) as table:
            try:
                model.save(path)
            except Exception as error:
                raise _not_portable(repr(model.name), error) from error
        with open(path, "rb") as file:
            data = file.read()
    iterations = getattr(getattr(model, "optimizer", None), "iterations", None)
    has_trained = iterations is not None and int(iterations.numpy()) > 0
    return SavedModel(data, table, [layer.trainable for layer in api.layers(model)], has_trained)


def load_model(saved: SavedModel, api: KerasAPI) -> Any:
    """Load a model.

    Args:
        saved: The result of `save_model`. Code in it runs, so it must not come from a file.
        api: The Keras package of the model.

    Raises:
        ModelError: Keras cannot load what it saved, or the optimizer's state of layers that are trainable there.
    """
    with restored(api, saved.custom_objects):
        try:
            model = _load_bytes(saved.data, api, saved.custom_objects, safe_mode=False)
        except Exception as error:
            raise _not_portable("the model", error) from error
        _restore_trainable(model, saved, api)
    return model


def _restore_trainable(model: Any, saved: SavedModel, api: KerasAPI) -> None:
    """Set `trainable` of layers whose config lacks it, and create the optimizer's variables again."""
    layers = api.layers(model)
    if len(layers) != len(saved.trainable):  # they cannot be told apart
        return
    changed = [layer for layer, flag in zip(layers, saved.trainable, strict=True) if layer.trainable != flag]
    if not changed:
        return
    if saved.has_trained:
        raise ModelError(
            "A model that continues training on several workers needs a config that says which layers are trainable; "
            f"that of {changed[0].name!r}, or of the layer that contains it, does not say that `trainable` is "
            f"{not changed[0].trainable}. Add it to `get_config` and `__init__` of the class, or pass a function that "
            "builds the model."
        )
    for layer, flag in zip(layers, saved.trainable, strict=True):
        if layer.trainable != flag:  # setting it changes all layers in this one, which come later
            layer.trainable = flag
    if config := model.get_compile_config():
        model.compile_from_config(config)


def _load_bytes(data: bytes, api: KerasAPI, custom_objects: Mapping[str, Any], safe_mode: bool) -> Any:
    """Load the bytes of a `.keras` file."""
    if not zipfile.is_zipfile(io.BytesIO(data)):  # tf_keras would read an older format, and run its code.
        raise ValueError("It is not a zip archive.")
    with TemporaryFolder("model") as folder:
        path = os.path.join(folder, MODEL_FILE)
        with open(path, "wb") as file:
            file.write(data)
        return api.module.models.load_model(path, custom_objects=dict(custom_objects), safe_mode=safe_mode)


def _summary(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().split(chr(10))[0]}"


def _not_portable(model: str, error: Exception) -> ModelError:
    return ModelError(
        f"Keras must be able to serialise a compiled model, so that it can be sent to the workers; {model} cannot be "
        f"serialised: {_summary(error)} Implement `get_config` in its classes, or pass a function that builds and "
        "compiles the model."
    )
