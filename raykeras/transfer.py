"""A model on its way to the workers, and its trained variables on their way back.

Enters: whatever the user calls a model: a compiled one, a function that builds it, a checkpoint, a
`.keras` file. Leaves: a pickle from which any process makes the model, under a strategy of its own.
A compiled model travels as the bytes of its `.keras` file with the user's own objects in it.
"""

from __future__ import annotations

import functools
import io
import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import fsspec
import numpy as np

from raykeras.checkpoint import MODEL_FILE, STATE_FILE, WEIGHTS_FILE, Checkpoint
from raykeras.checks import check_model
from raykeras.columns import Layout
from raykeras.custom_objects import recorded, restored
from raykeras.errors import CheckpointError, ModelError, OptionError, loading
from raykeras.keras_api import KerasAPI, api_of, likely_api
from raykeras.temporary import TemporaryFolder


@dataclass(frozen=True)
class ModelFile:
    """A `.keras` file on any fsspec storage; called, it loads the model. Picklable.

    Attributes:
        path: Absolute path or URL.
        api: The Keras that wrote it.
        safe_mode: Whether code in the file is refused, as by `keras.saving.load_model`.
    """

    path: str
    api: KerasAPI
    safe_mode: bool

    def __call__(self) -> Any:
        """Load the model.

        Raises:
            ModelError: The file holds code, or Keras cannot read it.
        """
        with fsspec.open(self.path, "rb") as file:
            data = file.read()
        try:
            return _loaded(data, self.api, {}, self.safe_mode)
        except Exception as error:
            if self.safe_mode and "safe_mode" in str(error):
                raise ModelError(
                    f"A model's file must hold no code, such as that of a Lambda layer; {self.path!r} does. Pass "
                    "`safe_mode=False` to run it, if you trust whoever can write the file."
                ) from None
            raise ModelError(
                f"A model's file must be readable by {self.api.name}; {self.path!r} is not: {_summary(error)} Classes "
                "of your own must be registered with `keras.saving.register_keras_serializable`."
            ) from error


def is_model(model: Any) -> bool:
    """Return whether it is a Keras model, and not what makes one."""
    return hasattr(model, "fit") and hasattr(model, "train_step") and not isinstance(model, type)


def as_model(model: Any, *, safe_mode: bool = True) -> Any:
    """Return a model or a function as it is, and a checkpoint or a path as a `ModelFile`.

    Args:
        model: A model, a function that builds one, a `Checkpoint`, or the path of a checkpoint or of a `.keras` file.
        safe_mode: Whether code in a file is refused, unless Keras' `enable_unsafe_deserialization` was called.

    Raises:
        OptionError: It is none of these.
        CheckpointError: There is no such checkpoint or file.
    """
    if is_model(model) or callable(model):
        return model
    if not isinstance(model, Checkpoint | str | os.PathLike):
        raise OptionError(f"`model` must be a compiled model or a function that builds one; got {model!r}.")
    path = model.path if isinstance(model, Checkpoint) else os.fspath(model)
    api, file = _model_file(_absolute(path))
    return ModelFile(file, api, safe_mode and not api.allows_unsafe_deserialization)


def pack_model(model: Any, *, lazily: bool = False) -> tuple[KerasAPI, bytes]:
    """Return the Keras of a model, and a pickled function that makes it.

    Args:
        model: What `as_model` returned.
        lazily: Whether to leave out the pickle of a compiled model, for use in this process.
    """
    from ray import cloudpickle

    if is_model(model):
        api = api_of(model)
        return api, b"" if lazily else cloudpickle.dumps(functools.partial(load_model, save_model(model, api), api))
    pickled = cloudpickle.dumps(model)
    return model.api if isinstance(model, ModelFile) else likely_api(pickled), pickled


def unpack_model(build: bytes, rank: int | None = None) -> Any:
    """The model of `pack_model`, made in a process of Ray's. Raises UserCodeError if what it needs is not there."""
    from ray import cloudpickle

    with loading(rank):
        make = cloudpickle.loads(build)
    return make()


def weights_into(model: Any, checkpoint: str) -> Any:
    """Return a function that makes the model and gives it a checkpoint's weights.

    Args:
        model: A compiled model, or a function that builds one.
        checkpoint: Path of a checkpoint or of a `.keras` file.

    Raises:
        CheckpointError: There is no such checkpoint.
    """
    path = _absolute(checkpoint)
    taken = _checkpoint_at(path)
    name = MODEL_FILE if taken is None else taken.weights_file
    file = _model_file(path)[1] if name == MODEL_FILE else f"{path}/{name}"

    def build() -> Any:
        made = model if is_model(model) else model()
        with TemporaryFolder("model") as folder:
            local = os.path.join(folder, name)
            fs, source = fsspec.core.url_to_fs(file)
            fs.get(source, local)
            if not made.built and (config := _build_config(local, taken)):
                made.build_from_config(config)
            api = api_of(made)
            api.build_optimizer(made)  # or its state would be skipped
            with api.taken_as_built(made), api.loading():
                made.load_weights(local)
        return made

    return build


def _build_config(file: str, taken: Checkpoint | None) -> Any:
    """Return what `Model.get_build_config` returned when a file was written."""
    if taken is not None and os.path.basename(file) == WEIGHTS_FILE:
        return taken.state.get("build_config")
    with zipfile.ZipFile(file) as archive:
        return json.loads(archive.read("config.json"))["build_config"]


def _absolute(path: str) -> str:
    return path.rstrip("/") if "://" in path else os.path.abspath(path)


def _checkpoint_at(path: str) -> Checkpoint | None:
    """Return the checkpoint of a folder; None where the path is none of a folder."""
    fs, local = fsspec.core.url_to_fs(path)
    if not fs.isdir(local):
        return None
    if not fs.exists(f"{local}/{STATE_FILE}"):
        raise CheckpointError(
            f"A checkpoint is a folder with {STATE_FILE}; {path!r} has none. A run's checkpoints lie in its folder "
            "`checkpoints`; `result.checkpoints` lists them."
        )
    return Checkpoint(path)


def _model_file(path: str) -> tuple[KerasAPI, str]:
    """Return the Keras and the path of a checkpoint's `.keras` file, or of the file itself."""
    taken = _checkpoint_at(path)
    path = path if taken is None else taken.model_file
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
    with TemporaryFolder("model") as folder:
        path = os.path.join(folder, MODEL_FILE)
        with recorded(api) as table:
            try:
                model.save(path)
            except Exception as error:
                raise _not_portable(model.name, error) from error
        with open(path, "rb") as file:
            return file.read(), table


def load_model(saved: tuple[bytes, dict[str, Any]], api: KerasAPI) -> Any:
    """Load what `save_model` returned, which must not have been in a file since.

    Raises:
        ModelError: If Keras cannot read what it wrote.
    """
    data, table = saved
    with restored(api, table):
        try:
            return _loaded(data, api, table, safe_mode=False)
        except Exception as error:
            raise _not_portable("it", error) from error


def _loaded(data: bytes, api: KerasAPI, custom_objects: Mapping[str, Any], safe_mode: bool) -> Any:
    """Load the bytes of a `.keras` file."""
    if not zipfile.is_zipfile(io.BytesIO(data)):  # as which tf_keras would read an older format, code and all
        raise ValueError("It is no zip archive.")
    with TemporaryFolder("model") as folder:
        path = os.path.join(folder, MODEL_FILE)
        with open(path, "wb") as file:
            file.write(data)
        return api.module.models.load_model(path, custom_objects=dict(custom_objects), safe_mode=safe_mode)


def _summary(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().split(chr(10))[0]}"


def _not_portable(name: str, error: Exception) -> ModelError:
    return ModelError(
        f"A compiled model goes to the workers as the configs of its layers, and its weights; {name!r} cannot: "
        f"{_summary(error)} Give its classes `get_config`, or pass a function that builds and compiles the model."
    )


def put_back(model: Any, api: KerasAPI, values: Sequence[np.ndarray] | None, layout: Layout) -> None:
    """Assign trained variables to the user's own model.

    Args:
        model: The model; its variables are made first, if they are not.
        api: Its Keras.
        values: Of its variables and its optimizer's, in the order of `KerasAPI.variables`.
        layout: Of the data that it was trained on.
    """
    if not model.built:
        from raykeras.built import make_variables

        make_variables(model, api, check_model(model, api, layout), None)
    api.build_optimizer(model)
    for variable, value in zip(api.variables(model), values or (), strict=True):
        variable.assign(value)
