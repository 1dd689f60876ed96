"""Save and load models with custom classes and functions that are not registered with Keras.

Keras writes custom objects by their registered name. Here each of them gets a unique name in a table that is pickled
with the model, so that lambdas, closures and classes of the same name can be told apart.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from raykeras.compat.keras_api import KerasAPI
from raykeras.compat.patch import patched

Table = Mapping[str, Any]


@contextlib.contextmanager
def recorded(api: KerasAPI) -> Iterator[dict[str, Any]]:
    """Have Keras write custom objects by the names of a table while the block runs; yield the table."""
    original, original_activation = api.module.saving.serialize_keras_object, api.module.activations.serialize
    table: dict[str, Any] = {}
    names: dict[int, str] = {}

    def is_custom(value: Any) -> bool:
        root = str(getattr(value, "__module__", "")).split(".")[0]
        return root not in (api.name, "builtins", "tensorflow", "numpy")

    def add(value: Any, entry: Any) -> str:
        python_name = getattr(value, "__name__", type(value).__name__)
        name = names.setdefault(id(value), f"raykeras>{python_name}-{len(names)}")
        table[name] = entry
        return name

    def serialize(value: Any) -> Any:
        if isinstance(value, types.FunctionType) and is_custom(value):
            name = add(value, value)
            return {"module": "builtins", "class_name": "function", "config": name, "registered_name": name}
        config = original(value)
        if isinstance(config, dict) and "registered_name" in config and is_custom(type(value)):
            if isinstance(value, api.module.losses.Loss):
                config["registered_name"] = add(value, _CustomLoss(type(value), dict(vars(value))))
            else:
                config["registered_name"] = add(type(value), _CustomClass(type(value)))
        return config

    def serialize_activation(value: Any, *args: Any, **kwargs: Any) -> Any:
        # Keras would replace the name in the table by that of the function.
        is_custom_function = isinstance(value, types.FunctionType) and is_custom(value)
        return serialize(value) if is_custom_function else original_activation(value, *args, **kwargs)

    with contextlib.ExitStack() as stack:
        for attribute, function, replacement in (
            ("serialize_keras_object", original, serialize),
            ("serialize", original_activation, serialize_activation),
        ):
            for module in list(sys.modules.values()):
                name = getattr(module, "__name__", "")
                if name.startswith(f"{api.name}.") and vars(module).get(attribute) is function:
                    stack.enter_context(patched(module, attribute, replacement))
        stack.enter_context(api.names.FUNC_DUMP.replaced(lambda value: (add(value, value), None, None)))
        yield table


@dataclass(frozen=True)
class _CustomClass:
    """A table entry for a custom class."""

    cls: type

    def from_config(self, config: dict[str, Any]) -> Any:
        """Create the object, without the base class's arguments that its constructor does not accept."""
        parameters = inspect.signature(self.cls).parameters
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            dropped = {k: v for k, v in config.items() if k in ("name", "trainable", "dtype") and k not in parameters}
            value = self.cls.from_config({k: v for k, v in config.items() if k not in dropped})  # type: ignore[attr-defined]
            if dropped.get("trainable") is False:
                value.trainable = False
            return value
        return self.cls.from_config(config)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class _CustomLoss:
    """A table entry for an instance of a custom loss."""

    cls: type
    attributes: Mapping[str, Any]

    def from_config(self, config: dict[str, Any]) -> Any:
        """Create the loss with its saved attributes; `config` is not used."""
        loss: Any = object.__new__(self.cls)
        vars(loss).update(self.attributes)
        return loss


@contextlib.contextmanager
def restored(api: KerasAPI, table: Table) -> Iterator[None]:
    """Have Keras resolve lambdas by the names of a table while the block runs."""
    original = api.names.FUNC_LOAD.get()

    def load(code: Any, *args: Any, **kwargs: Any) -> Any:
        name = code[0] if isinstance(code, list | tuple) else code
        return table[name] if name in table else original(code, *args, **kwargs)

    with contextlib.ExitStack() as stack:
        stack.enter_context(api.names.FUNC_LOAD.replaced(load))
        stack.enter_context(api.loading())
        yield
