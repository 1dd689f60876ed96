"""A compiled model on its way to the workers, and its trained variables on their way back.

Enters: a model of this process. Leaves: the bytes of its `.keras` file with the user's own objects in
it, from which any process makes the model anew, under a strategy of its own.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from raykeras.keras_api import KerasAPI


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
