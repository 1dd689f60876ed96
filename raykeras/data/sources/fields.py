"""Describe Arrow columns as `Field`s."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from raykeras.data.sources.base import Field


def stored_field(field: pa.Field) -> Field:
    """Return the field of an Arrow column; its dtype begins with "arrow:" if it cannot be used."""
    kind = field.type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if isinstance(kind, pa.FixedShapeTensorType):
        dtype = _dtype(kind.value_type)
        is_permuted = kind.permutation is not None and list(kind.permutation) != sorted(kind.permutation)
        if dtype is None or is_permuted:
            return Field(field.name, "dense", f"arrow:{field.type}")
        return Field(field.name, "dense", dtype, tuple(kind.shape))
    shape: list[int] = []
    while pa.types.is_fixed_size_list(kind):
        shape.append(kind.list_size)
        kind = kind.value_type
    if (name := _dtype(kind)) is not None:
        return Field(field.name, "dense", name, tuple(shape))
    if not shape and _is_text(kind):
        binary = pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)
        return Field(field.name, "string", "bytes" if binary else "string")
    if not shape and is_list(kind) and (name := _dtype(kind.value_type)) is not None:
        return Field(field.name, "list", name)
    return Field(field.name, "dense", f"arrow:{field.type}")  # an error only if the column is used


def _dtype(kind: pa.DataType) -> str | None:
    if pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return np.dtype(kind.to_pandas_dtype()).name
    return None


def _is_text(kind: pa.DataType) -> bool:
    return any(
        test(kind)
        for test in (
            pa.types.is_string,
            pa.types.is_large_string,
            pa.types.is_string_view,
            pa.types.is_binary,
            pa.types.is_large_binary,
            pa.types.is_fixed_size_binary,
        )
    )


def is_list(kind: pa.DataType) -> bool:
    """Return whether a type is a list whose length may differ between rows."""
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def is_narrow_list(kind: pa.DataType) -> bool:
    """Return whether a type is a list of integers of fewer than 32 bits."""
    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    is_nested = False
    while pa.types.is_fixed_size_list(kind) or is_list(kind):
        kind, is_nested = kind.value_type, True
    return is_nested and pa.types.is_integer(kind) and kind.bit_width < 32
