"""Pipelines, which the command line runs: Python files that define `def pipeline(**parameters) -> Pipeline`."""

from __future__ import annotations

import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

from raykeras.compat.quiet import quiet, quiet_user_import
from raykeras.core.errors import OptionError
from raykeras.data.sources.base import did_you_mean

_WORDS = {"true": True, "false": False, "yes": True, "no": False, "1": True, "0": False}


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """A model, its data, and how it is trained.

    Attributes:
        model: A function that builds and compiles the model, or a compiled model.
        train: The training data: a source, or anything else that `raykeras.fit` takes as `x`.
        validation: The `validation_data` of `raykeras.fit`.
        test: The data for the commands `evaluate` and `predict`; not used by `fit`.
        fit: Further arguments of `raykeras.fit`.
        name: Prefix of the names of the pipeline's runs; by default the name of the file.
    """

    model: Any
    train: Any
    validation: Any = None
    test: Any = None
    fit: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""


def load_pipeline(path: str | os.PathLike[str], parameters: Mapping[str, str] | None = None) -> Pipeline:
    """Load a pipeline file and call its `pipeline` function.

    Args:
        path: Path of the file.
        parameters: Arguments of the function as text; they are converted according to its annotations.

    Raises:
        OptionError: If the file, the function or a parameter does not exist, a required parameter is missing, or a
            text cannot be converted.
    """
    quiet()
    quiet_user_import()
    module = _load(Path(path))
    function = getattr(module, "pipeline", None)
    if not callable(function):
        raise OptionError(f"A pipeline file must define `def pipeline(...) -> raykeras.Pipeline`; {path} does not.")
    loaded = function(**_convert_parameters(function, parameters or {}, path))
    if not isinstance(loaded, Pipeline):
        raise OptionError(
            f"`pipeline` must return a raykeras.Pipeline; the one in {path} returned {type(loaded).__name__}."
        )
    return loaded if loaded.name else Pipeline(**{**vars(loaded), "name": module_name(Path(path))})


def module_name(path: Path) -> str:
    """Return the name of a file without the characters that the name of a run may not have."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("-._") or "pipeline"


def _load(path: Path) -> ModuleType:
    if not path.is_file():
        siblings = [str(p) for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise OptionError(f"A pipeline is a Python file; there is no {str(path)!r}.{did_you_mean(str(path), siblings)}")
    name = f"raykeras_pipeline_{re.sub(r'[^A-Za-z0-9]', '_', path.stem)}"
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    if spec is None or spec.loader is None:
        raise OptionError(f"A pipeline is a Python file; got {str(path)!r}.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(module)  # workers cannot import the module
    return module


def _convert_parameters(function: Callable[..., Any], parameters: Mapping[str, str], path: Any) -> dict[str, Any]:
    signature = inspect.signature(function)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    hints = get_type_hints(function)
    values: dict[str, Any] = {}
    for name, text in parameters.items():
        parameter = signature.parameters.get(name)
        if parameter is None and not takes_any:
            known = ", ".join(signature.parameters) or "none"
            raise OptionError(
                f"`-s` sets a parameter of the pipeline; {path} has no {name!r}."
                f"{did_you_mean(name, signature.parameters)} Parameters: {known}."
            )
        kind = hints.get(name)
        if kind is None and parameter is not None and parameter.default not in (None, parameter.empty):
            kind = type(parameter.default)
        values[name] = _convert(name, text, kind)
    for name, parameter in signature.parameters.items():
        required = parameter.default is parameter.empty and parameter.kind in (
            parameter.POSITIONAL_OR_KEYWORD,
            parameter.KEYWORD_ONLY,
        )
        if required and name not in values:
            raise OptionError(f"The pipeline {path} needs {name!r}; give it with `-s {name}=...`.")
    return values


def _convert(name: str, text: str, kind: Any) -> Any:
    kinds = set(getattr(kind, "__args__", ())) or {kind}
    if type(None) in kinds and text.lower() == "none":
        return None
    for candidate, convert in ((bool, lambda t: _WORDS[t.lower()]), (int, int), (float, float), (Path, Path)):
        if candidate in kinds:
            try:
                return convert(text)
            except (KeyError, ValueError):
                if str not in kinds and not (candidate is int and float in kinds):
                    raise OptionError(f"`{name}` of the pipeline must be {candidate.__name__}; got {text!r}.") from None
    return text
