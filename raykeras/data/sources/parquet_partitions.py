"""Hive partitions: columns given by the names of folders, such as `year=2024/place=a`.

They are read as `pyarrow.dataset` does: percent-encoding is decoded, `__HIVE_DEFAULT_PARTITION__` is a null, and a
column has integers if all its values are integers. Unlike in pyarrow, integers are int64.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import unquote

import numpy as np

from raykeras.core.errors import SourceError
from raykeras.data.sources.base import Field

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
        files: Paths of the files.
        roots: For each file the folder below which folder names are partitions.
        fill: Replacements for nulls, by name.

    Returns:
        The partition of each file, the columns, and the error for each column that cannot be used.

    Raises:
        SourceError: If a folder's name is not valid UTF-8.
    """
    partitions: list[dict[str, Any]] = [_partition(path, root) for path, root in zip(files, roots, strict=True)]
    fields: dict[str, Field] = {}
    errors: dict[str, SourceError] = {}
    for name in dict.fromkeys(name for partition in partitions for name in partition):
        values = [partition[name] for partition in partitions if partition.get(name) is not None]
        is_integer = all(map(_is_integer, values)) if values else isinstance(fill.get(name), _INTEGERS)
        fields[name] = Field(name, "dense", "int64") if is_integer else Field(name, "string", "string")
        for path, partition in zip(files, partitions, strict=True):
            if (error := _error(path, partition, fields[name], fill)) is not None:
                errors.setdefault(name, error)
            else:
                value = fill[name] if partition[name] is None else partition[name]
                partition[name] = int(value) if is_integer else value
    return tuple(tuple(partition.items()) for partition in partitions), fields, errors


def _partition(path: str, root: str) -> dict[str, str | None]:
    folders = os.path.dirname(path[len(root) :] if path.startswith(root) else path).strip("/").split("/")
    pairs = [(name, value) for name, equals, value in (folder.partition("=") for folder in folders) if equals and name]
    try:
        pairs = [(unquote(name, errors="strict"), unquote(value, errors="strict")) for name, value in pairs]
    except UnicodeDecodeError:
        raise SourceError(
            f"The names of partitions must be UTF-8 after percent-decoding; those of {path!r} are not. "
            "Rename its folders."
        ) from None
    return {name: None if value == _NULL else value for name, value in pairs}


def _error(path: str, partition: Mapping[str, Any], field: Field, fill: Mapping[str, Any]) -> SourceError | None:
    name = field.name
    if name not in partition:
        return SourceError(
            f"A partition column must exist for all files; {name!r} is in the names of other folders, but not in "
            f"{path}. Move that file, or read it as a separate source."
        )
    if partition[name] is not None:
        return None
    if name not in fill:
        return SourceError(
            f"A partition column must not contain nulls; {name!r} of {path} is {_NULL}. "
            f"Pass `fill={{{name!r}: value}}`, or leave that file out."
        )
    kinds = _INTEGERS if field.kind == "dense" else (str,)
    if isinstance(fill[name], bool) or not isinstance(fill[name], kinds):
        what = "integers" if field.kind == "dense" else "text"
        return SourceError(
            f"`fill` must have a value of the column's type; partition {name!r} contains {what}; got {fill[name]!r}."
        )
    return None


def _is_integer(value: str) -> bool:
    return _INTEGER.fullmatch(value) is not None and int(value) in _INT64
