"""Values as Python code, in the style of ruff. Characters that control a terminal are escaped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_LINE_LENGTH = 120


def literal(value: Any, *, indent: int | None = None, offset: int = 0) -> str:
    """Return a value as Python code.

    Args:
        value: Text, a number, a boolean, None, or lists, tuples and dicts of them.
        indent: The indentation of the line; code that does not fit into the line is split. None for one line.
        offset: Characters of the line, after the indentation, before the code and after it.
    """
    if isinstance(value, str):
        code = repr(value)
        return f'"{code[1:-1]}"' if code[0] == "'" and '"' not in value else code
    if not isinstance(value, Mapping | list | tuple):
        return repr(value).replace("e+", "e") if isinstance(value, float) else repr(value)
    start, end = ("{", "}") if isinstance(value, Mapping) else ("(", ")") if isinstance(value, tuple) else ("[", "]")
    keys = [f"{literal(key)}: " for key in value] if isinstance(value, Mapping) else [""] * len(value)
    items = list(value.values()) if isinstance(value, Mapping) else list(value)
    comma = "," if isinstance(value, tuple) and len(value) == 1 else ""
    line = f"{start}{', '.join(key + literal(item) for key, item in zip(keys, items, strict=True))}{comma}{end}"
    if indent is None or indent + offset + len(line) <= _LINE_LENGTH:
        return line
    inner = indent + 4
    lines = [
        f"{' ' * inner}{key}{literal(item, indent=inner, offset=len(key) + 1)},"
        for key, item in zip(keys, items, strict=True)
    ]
    return "\n".join([start, *lines, " " * indent + end])
