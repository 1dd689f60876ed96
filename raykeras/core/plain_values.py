"""Options and other values of any type as JSON values, without credentials and secrets."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import numpy as np

from raykeras.core.errors import redacted

_MAX_TEXT = 200  # characters of a value that JSON has no type for

_SECRET = "(?:token|password|passwd|pwd|key|secret|credential)"

_SECRET_NAME = re.compile(_SECRET, re.IGNORECASE)

_SECRET_ARGUMENT = re.compile(rf"(.*?{_SECRET}[^=]*=).*", re.IGNORECASE | re.DOTALL)

MASK = "***"


def plain_value(value: Any) -> Any:
    """Return a value as JSON values: `None`, booleans, numbers, text, lists and dicts.

    Texts are redacted, texts in a dict under the name of a secret are masked, and other types become short texts.
    """
    if isinstance(value, str):
        return redacted(value)
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, np.generic):
        return plain_value(value.item())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain_value(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return masked({str(name): plain_value(item) for name, item in value.items()})
    if isinstance(value, list | tuple | set | frozenset):
        return [plain_value(item) for item in value]
    if isinstance(value, timedelta):
        return f"{value.total_seconds():g}s"
    return redacted(str(value)[:_MAX_TEXT])


def masked(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a dict with `***` in place of texts whose names look like those of secrets, such as "api_key"."""
    return {
        name: MASK if isinstance(value, str) and _SECRET_NAME.search(name) else value for name, value in values.items()
    }


def masked_command(arguments: Sequence[str]) -> list[str]:
    """Return the arguments of a command with `***` in place of secrets: `-s api_key=…`, `--token=…`, `--token …`."""
    result: list[str] = []
    is_secret = False  # the next argument
    for argument in arguments:
        if is_secret and not argument.startswith("-"):
            result.append(MASK)
            is_secret = False
            continue
        is_secret = argument.startswith("-") and "=" not in argument and bool(_SECRET_NAME.search(argument))
        result.append(redacted(_SECRET_ARGUMENT.sub(rf"\1{MASK}", argument)))
    return result
