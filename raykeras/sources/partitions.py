"""Hive partitions: columns that the names of folders make, as `year=2024/place=a`.

Enters: files, and for each the folder that was named for it. Leaves: names and values for each file, read as
`pyarrow.dataset` reads them: percent-encoding is decoded, `__HIVE_DEFAULT_PARTITION__` is a null, and a column is
of integers where all its values are. Integers are int64 here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import unquote

import numpy as np

from raykeras.errors import SourceError
from raykeras.sources import Field

Partition = tuple[tuple[str, Any], ...]
"""Names and values of one file's partition."""

_NULL = "__HIVE_DEFAULT_PARTITION__"
_INTEGER = re.compile(r"-?[0-9]+", re.ASCII)
_INTEGERS = (int, np.integer)
_INT64 = range(-(1 << 63), 1 << 63)


def read_partitions(
    files: Sequence[str], roots: Sequence[str], fill: Mapping[str, Any]
) -> tuple[tuple[Partition, ...], dict[str, Field], dict[str, SourceError]]:
    """Read the partitions of files from their paths.

    Args:
        files: Their paths.
        roots: For each the folder below which folders count.
        fill: Values that take the place of nulls, by name.

    Returns:
        The partition of each file, the columns, and the error of each column that cannot be used.

    Raises:
        SourceError: A folder's name is no text.
    """
    found: list[dict[str, Any]] = [_partition(path, root) for path, root in zip(files, roots, strict=True)]
    fields: dict[str, Field] = {}
    errors: dict[str, SourceError] = {}
    for name in dict.fromkeys(name for partition in found for name in partition):
        given = [partition[name] for partition in found if partition.get(name) is not None]
        is_integer = all(map(_is_integer, given)) if given else isinstance(fill.get(name), _INTEGERS)
        fields[name] = Field(name, "dense", "int64") if is_integer else Field(name, "string", "string")
        for path, partition in zip(files, found, strict=True):
            if (error := _error(path, partition, fields[name], fill)) is not None:
                errors.setdefault(name, error)
            else:
                value = fill[name] if partition[name] is None else partition[name]
                partition[name] = int(value) if is_integer else value
    return tuple(tuple(partition.items()) for partition in found), fields, errors


def _partition(path: str, root: str) -> dict[str, str | None]:
    folders = os.path.dirname(path[len(root) :] if path.startswith(root) else path).strip("/").split("/")
    pairs = [(name, value) for name, equals, value in (folder.partition("=") for folder in folders) if equals and name]
    try:
        pairs = [(unquote(name, errors="strict"), unquote(value, errors="strict")) for name, value in pairs]
    except UnicodeDecodeError:
        raise SourceError(
            f"The names of partitions must be UTF-8 once percent-encoding is decoded; those of {path!r} are not. "
            "Rename its folders."
        ) from None
    return {name: None if value == _NULL else value for name, value in pairs}


def _error(path: str, partition: Mapping[str, Any], field: Field, fill: Mapping[str, Any]) -> SourceError | None:
    name = field.name
    if name not in partition:
        return SourceError(
            f"A partition that is used must be there for all files; {name!r} is in the names of other folders, and not "
            f"in {path}. Move that file, or read it as another source."
        )
    if partition[name] is not None:
        return None
    if name not in fill:
        return SourceError(
            f"A partition that is used must have no nulls; {name!r} of {path} is {_NULL}. "
            f"Give `fill={{{name!r}: value}}`, or leave that file out."
        )
    kinds = _INTEGERS if field.kind == "dense" else (str,)
    if isinstance(fill[name], bool) or not isinstance(fill[name], kinds):
        what = "integers" if field.kind == "dense" else "text"
        return SourceError(
            f"`fill` must have a value of the column's type; partition {name!r} holds {what}; got {fill[name]!r}."
        )
    return None


def _is_integer(value: str) -> bool:
    return _INTEGER.fullmatch(value) is not None and int(value) in _INT64
