"""What runs were configured with, as text, and the differences between runs."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Configuration = dict[str, dict[str, str]]
"""Values as text by name, by section."""


@dataclass(frozen=True)
class Difference:
    """A value that is not the same in all runs.

    Attributes:
        section: Section of the configuration.
        name: Name in the section.
        values: The value in each run; None where a run has none.
    """

    section: str
    name: str
    values: list[str | None]


def configuration(record: Mapping[str, Any]) -> Configuration:
    """Return the configuration of a run's last call of `fit`.

    Args:
        record: The contents of `run.json`; anything in it may be missing or of another type.
    """
    calls = record.get("calls") or [{}]
    call: Mapping[str, Any] = calls[-1]
    arguments, data, model = _mapping(call.get("arguments")), _mapping(call.get("data")), _mapping(record.get("model"))
    command = call.get("command")
    nodes = call.get("nodes")
    code = {
        "command": shlex.join(map(str, command)) if isinstance(command, list) else command,
        **{name: call.get(name) for name in ("folder", "pipeline", "git")},
        "nodes": dict(enumerate(nodes)) if isinstance(nodes, list) else nodes,
    }
    sections = {
        "Arguments": {
            **{name: value for name, value in arguments.items() if name not in ("scale", "run")},
            "callbacks": call.get("callbacks"),
        },
        "Scale": arguments.get("scale"),
        "Run": arguments.get("run"),
        "Training data": data.get("train"),
        "Validation data": data.get("validation"),
        "Model": {
            "model": call.get("model"),
            **{name: value for name, value in model.items() if name not in ("summary", "optimizer")},
        },
        "Optimizer": model.get("optimizer"),
        "Versions": call.get("versions"),
        "Code and nodes": {name: value for name, value in code.items() if value is not None},
    }
    flat = {section: flattened(value) for section, value in sections.items()}
    return {section: values for section, values in flat.items() if values}


def differences(configurations: Sequence[Configuration]) -> list[Difference]:
    """Return what differs between runs, by section."""
    found = []
    for section in dict.fromkeys(section for values in configurations for section in values):
        sections = [values.get(section, {}) for values in configurations]
        for name in dict.fromkeys(name for values in sections for name in values):
            texts = [values.get(name) for values in sections]
            if len(set(texts)) > 1:
                found.append(Difference(section, name, texts))
    return found


def flattened(value: Any, prefix: str = "") -> dict[str, str]:
    """Return a JSON value as text by name; the names of nested values are joined by dots."""
    if isinstance(value, Mapping):
        texts: dict[str, str] = {}
        for name, item in value.items():
            texts |= flattened(item, f"{prefix}.{name}" if prefix else str(name))
        return texts
    return {prefix: text_of(value)} if prefix else {}


def text_of(value: Any) -> str:
    """Return a JSON value as text, in Python's spelling."""
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        with np.errstate(over="ignore"):
            single = np.float32(value)  # as a learning rate is, whose further digits mean nothing
        return str(single if float(single) == value else value)
    if isinstance(value, list):
        items = (f"[{text_of(item)}]" if isinstance(item, list) and item else text_of(item) for item in value)
        return ", ".join(items) or "[]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name}: {text_of(item)}" for name, item in value.items()) + "}"
    return str(value)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
