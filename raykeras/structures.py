"""How the tensors of x, y or sample_weight are nested.

A structure is the name of a tensor, None where the model gets None, or a dict or tuple of structures.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

Structure = Any
Path = tuple[str | int, ...]
"""Keys of dicts and indexes of lists that lead to a value."""


def is_sequence(value: Any) -> bool:
    """Return whether it is several arrays in the order of the inputs or outputs, and not one as nested lists."""
    if not isinstance(value, list | tuple) or not value:
        return False
    return all(part is None or hasattr(part, "shape") or is_nested(part) for part in value)


def is_nested(value: Any) -> bool:
    return isinstance(value, Mapping) or is_sequence(value)


def leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yield what is nested in dicts, lists and tuples, without None."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from leaves(part, (*path, str(key)))
    elif is_sequence(value):
        for index, part in enumerate(value):
            yield from leaves(part, (*path, index))
    elif value is not None:
        yield path, value


def name_of(path: Path) -> str | None:
    """Return the name of the tensor at a path; None for one that is not nested."""
    return "/".join(map(str, path)) if path else None


def structure_of(value: Any, path: Path = ()) -> Structure:
    if isinstance(value, Mapping):
        return {str(key): structure_of(part, (*path, str(key))) for key, part in value.items()}
    if is_sequence(value):
        return tuple(structure_of(part, (*path, index)) for index, part in enumerate(value))
    return None if value is None else name_of(path)


def is_deep(structure: Structure) -> bool:
    """Return whether dicts, lists or tuples lie in others."""
    return any(isinstance(part, dict | list | tuple) for part in _parts(structure))


def has_none(structure: Structure) -> bool:
    return any(part is None or has_none(part) for part in _parts(structure))


def filled(structure: Structure, values: Mapping[str | None, Any]) -> Any:
    """Return the values by name, nested as a structure."""
    if isinstance(structure, dict):
        return {key: filled(part, values) for key, part in structure.items()}
    if isinstance(structure, tuple):
        return tuple(filled(part, values) for part in structure)
    return None if structure is None else values[structure]


def _parts(structure: Structure) -> Iterable[Structure]:
    if isinstance(structure, dict):
        return structure.values()
    return structure if isinstance(structure, list | tuple) else ()
