"""The nesting of the tensors in `x`, `y` or `sample_weight`.

A structure is the name of a tensor, None where the model receives None, or a dict or tuple of structures.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

Structure = Any

Path = tuple[str | int, ...]
"""Keys of dicts and indexes of lists that lead to a value."""


def is_sequence(value: Any) -> bool:
    """Return whether a value is a list of arrays, one per input or output, rather than one array as nested lists."""
    if not isinstance(value, list | tuple) or not value:
        return False
    return all(child is None or hasattr(child, "shape") or is_nested(child) for child in value)


def is_nested(value: Any) -> bool:
    return isinstance(value, Mapping) or is_sequence(value)


def leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yield the path and value of each leaf in nested dicts, lists and tuples, without None."""
    if isinstance(value, Mapping):
        for key, child in value.items():
            yield from leaves(child, (*path, str(key)))
    elif is_sequence(value):
        for index, child in enumerate(value):
            yield from leaves(child, (*path, index))
    elif value is not None:
        yield path, value


def name_of(path: Path) -> str | None:
    """Return the name of the tensor at a path; None if it is not nested."""
    return "/".join(map(str, path)) if path else None


def structure_of(value: Any, path: Path = ()) -> Structure:
    if isinstance(value, Mapping):
        return {str(key): structure_of(child, (*path, str(key))) for key, child in value.items()}
    if is_sequence(value):
        return tuple(structure_of(child, (*path, index)) for index, child in enumerate(value))
    return None if value is None else name_of(path)


def is_deep(structure: Structure) -> bool:
    """Return whether a structure is nested more than one level deep."""
    return any(isinstance(child, dict | list | tuple) for child in _children(structure))


def has_none(structure: Structure) -> bool:
    return any(child is None or has_none(child) for child in _children(structure))


def filled(structure: Structure, values: Mapping[str | None, Any]) -> Any:
    """Return a structure with each name replaced by its value."""
    if isinstance(structure, dict):
        return {key: filled(child, values) for key, child in structure.items()}
    if isinstance(structure, tuple):
        return tuple(filled(child, values) for child in structure)
    return None if structure is None else values[structure]


def _children(structure: Structure) -> Iterable[Structure]:
    if isinstance(structure, dict):
        return structure.values()
    return structure if isinstance(structure, list | tuple) else ()
