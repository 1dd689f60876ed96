"""The user's own classes and functions in a model, so that they need no registration to travel with it.

Enters: a Keras that is about to write a model, or to read one. Leaves: a table of name to class or
function. Keras writes layers, losses, metrics and optimizers as configs, and what is not its own by
name; here each such name stands for one object of the table, be it a lambda, a closure, or one of two
classes that are called the same. The table is pickled beside the model.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import sys
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from raykeras.keras_api import KerasAPI
from raykeras.patching import replaced

Table = Mapping[str, Any]


@contextlib.contextmanager
def recorded(api: KerasAPI) -> Iterator[dict[str, Any]]:
    """Within it Keras writes the user's own objects by the names of the table that it gives."""
    library = importlib.import_module(f"{api.name}.src.saving.serialization_lib")
    registration = importlib.import_module(f"{api.name}.src.saving.object_registration")
    original, original_name = library.serialize_keras_object, registration.get_registered_name
    table: dict[str, Any] = {}
    names: dict[int, str] = {}

    def is_own(value: Any) -> bool:
        root = str(getattr(value, "__module__", "")).split(".")[0]
        return root not in (api.name, "builtins", "tensorflow", "numpy")

    def name_of(value: Any, entry: Any) -> str:
        called = getattr(value, "__name__", type(value).__name__)
        name = names.setdefault(id(value), f"raykeras>{called}-{len(names)}")
        table[name] = entry
        if api.is_legacy and isinstance(value, types.FunctionType):
            table[called] = value  # its Lambda layer writes functions by this name
        return name

    def serialize(value: Any) -> Any:
        if isinstance(value, types.FunctionType) and is_own(value):
            name = name_of(value, value)
            return {"module": "builtins", "class_name": "function", "config": name, "registered_name": name}
        config = original(value)
        if isinstance(config, dict) and "registered_name" in config and is_own(type(value)):
            if isinstance(value, api.module.losses.Loss):
                config["registered_name"] = name_of(value, _Loss(type(value), dict(vars(value))))
            else:
                config["registered_name"] = name_of(type(value), _Class(type(value)))
        return config

    with contextlib.ExitStack() as stack:
        for module in list(sys.modules.values()):
            name = getattr(module, "__name__", "")
            if name.startswith(f"{api.name}.") and vars(module).get("serialize_keras_object") is original:
                stack.enter_context(replaced(module, "serialize_keras_object", serialize))
        registered = lambda value: names.get(id(value)) or original_name(value)  # noqa: E731
        stack.enter_context(replaced(registration, "get_registered_name", registered))
        stack.enter_context(replaced(_functions(api), "func_dump", lambda value: (name_of(value, value), None, None)))
        yield table


@dataclass(frozen=True)
class _Class:
    """Stands for a class of the user's."""

    cls: type

    def from_config(self, config: dict[str, Any]) -> Any:
        """The class's own, without what it would not take of what its base class adds."""
        taken = inspect.signature(self.cls).parameters
        if not any(p.kind is p.VAR_KEYWORD for p in taken.values()):
            refused = {k: v for k, v in config.items() if k in ("name", "trainable", "dtype") and k not in taken}
            made = self.cls.from_config({k: v for k, v in config.items() if k not in refused})  # type: ignore[attr-defined]
            if refused.get("trainable") is False:
                made.trainable = False
            return made
        return self.cls.from_config(config)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class _Loss:
    """Stands for a loss of the user's."""

    cls: type
    attributes: Mapping[str, Any]

    def from_config(self, config: dict[str, Any]) -> Any:
        """The loss as it was."""
        loss: Any = object.__new__(self.cls)
        vars(loss).update(self.attributes)
        return loss


@contextlib.contextmanager
def restored(api: KerasAPI, table: Table) -> Iterator[None]:
    """Within it Keras finds lambdas that were written by the names of a table."""
    functions = _functions(api)
    original = functions.func_load

    def load(code: Any, *args: Any, **kwargs: Any) -> Any:
        name = code[0] if isinstance(code, list | tuple) else code
        return table[name] if name in table else original(code, *args, **kwargs)

    with contextlib.ExitStack() as stack:
        stack.enter_context(replaced(functions, "func_load", load))
        stack.enter_context(api.loading())
        yield


def _functions(api: KerasAPI) -> Any:
    """The module that writes and reads the code of lambdas."""
    return importlib.import_module(f"{api.name}.src.utils.{'generic_utils' if api.is_legacy else 'python_utils'}")
