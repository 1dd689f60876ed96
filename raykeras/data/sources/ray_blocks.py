"""Turn blocks of a Ray dataset into units, in Ray tasks: Arrow tables without Ray's extension types, and a summary."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raykeras.core.errors import ColumnError

_DIGEST_ROWS = 64  # rows of each unit that its digest covers


_CONFLICT = b"raykeras:types"


@dataclass(frozen=True)
class Unit:
    """The summary of a unit.

    Attributes:
        schema: Schema of the unit's table.
        nulls: Column to its number of nulls.
        lengths: List column to its minimum and maximum length.
        digest: Digest of some of the rows.
    """

    schema: pa.Schema
    nulls: dict[str, int]
    lengths: dict[str, tuple[int, int]]
    digest: str


def make_unit(start: int, stop: int, *blocks: Any) -> tuple[Unit | ColumnError, pa.Table | None]:
    """Make a unit of rows `start` to `stop` of consecutive blocks; runs as a Ray task.

    Returns:
        The unit's summary and its table. A ColumnError is returned in place of the summary: if raised, Ray would report
        every one that is not retrieved.
    """
    try:
        return _make_unit(start, stop, *blocks)
    except ColumnError as error:
        return error, None


def _make_unit(start: int, stop: int, *blocks: Any) -> tuple[Unit, pa.Table]:
    from ray.data.block import BlockAccessor

    tables = []
    for block in blocks:
        table = BlockAccessor.for_block(block).to_arrow()
        tables.append(_as_arrow_types(table.slice(max(start, 0), max(stop, 0) - max(start, 0))))
        start, stop = start - len(table), stop - len(table)
    schema = common_schema([table.schema for table in tables])
    unit_table = pa.concat_tables([as_schema(table, schema) for table in tables]).combine_chunks()
    list_names = [f.name for f in schema if pa.types.is_list(f.type) or pa.types.is_large_list(f.type)]
    lengths = {}
    for name in list_names:
        limits = pc.min_max(pc.list_value_length(unit_table.column(name))).as_py()
        lengths[name] = (limits["min"] or 0, limits["max"] or 0)
    nulls = {name: unit_table.column(name).null_count for name in schema.names}
    return Unit(schema, nulls, lengths, _digest(unit_table)), unit_table


def as_schema(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Cast a table to a schema that `common_schema` made of the table's schema and others."""
    columns = []
    for field in schema:
        if conflict_of(field):
            columns.append(pa.nulls(len(table)))
            continue
        column = table.column(field.name)
        if isinstance(column.type, pa.BaseExtensionType) and not column.type.equals(field.type):
            column = pa.chunked_array([chunk.storage for chunk in column.chunks], column.type.storage_type)
        columns.append(column if column.type.equals(field.type) else column.cast(field.type))
    return pa.table(columns, schema=schema)


def read_part(table: pa.Table, start: int, stop: int, schema: pa.Schema) -> pa.Table:
    """Return rows `start` to `stop` of a unit, with the columns and types of a schema."""
    return as_schema(table.slice(start, stop - start), schema)


def _digest(table: pa.Table) -> str:
    """Return a digest of up to 64 evenly spaced rows."""
    rows = np.unique(np.linspace(0, len(table) - 1, _DIGEST_ROWS).astype(np.int64))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table.take(pa.array(rows)).combine_chunks())
    return hashlib.sha256(sink.getvalue()).hexdigest()[:16]


def _as_arrow_types(table: pa.Table) -> pa.Table:
    """Convert Ray's tensor columns to Arrow's, and those with one axis of variable length to lists."""
    columns = [_as_arrow_type(column) for column in table.columns]
    return pa.table(columns, names=table.column_names)


def _as_arrow_type(column: pa.ChunkedArray) -> pa.ChunkedArray:
    kind = column.type
    name = getattr(kind, "extension_name", "")
    if name.startswith("ray.data.arrow_variable_shaped_tensor") and kind.ndim == 1:
        return pa.chunked_array(
            [chunk.storage.field("data") for chunk in column.chunks], kind.storage_type.field("data").type
        )
    if not name.startswith("ray.data.arrow_tensor"):
        return column
    shape = tuple(kind.shape)
    storage = pa.list_(kind.storage_type.value_type, int(np.prod(shape)))
    tensor = pa.fixed_shape_tensor(storage.value_type, shape)
    chunks = [pa.ExtensionArray.from_storage(tensor, chunk.storage.cast(storage)) for chunk in column.chunks]
    return pa.chunked_array(chunks, tensor)


def common_schema(schemas: Sequence[pa.Schema]) -> pa.Schema:
    """Return the common schema of all rows.

    A column without a common type gets the null type, and the reason in its metadata; see `conflict_of`.
    """
    first = schemas[0]
    if all(schema.equals(first, check_metadata=True) for schema in schemas[1:]):
        return first.remove_metadata()
    return pa.schema([_common_field(name, schemas) for name in dict.fromkeys(n for s in schemas for n in s.names)])


def _common_field(name: str, schemas: Sequence[pa.Schema]) -> pa.Field:
    fields = [schema.field(name) if name in schema.names else None for schema in schemas]
    for field in fields:
        if field is not None and conflict_of(field):
            return field
    kinds = list(dict.fromkeys(None if field is None else field.type for field in fields))
    common = kinds[0]
    for kind in kinds[1:]:
        merged = _common_type(common, kind)
        if merged is None:
            a, b = ("missing" if kind is None else str(kind) for kind in (common, kind))
            return pa.field(name, pa.null(), metadata={_CONFLICT: f"{a} in some and {b} in others"})
        common = merged
    return pa.field(name, common)


def conflict_of(field: pa.Field) -> str | None:
    """Return the different types of a column without a common type; None for other columns."""
    conflict = (field.metadata or {}).get(_CONFLICT)
    return None if conflict is None else conflict.decode()


def _common_type(a: pa.DataType | None, b: pa.DataType | None) -> pa.DataType | None:
    """Return the common type of two types; None if there is none or one is missing.

    Types may differ because a block has no values, or has lists of the same length, which Ray stores as tensors.
    """
    if a is None or b is None:
        return None
    a, b = (t.storage_type if isinstance(t, pa.FixedShapeTensorType) and len(t.shape) == 1 else t for t in (a, b))
    if _is_list(a) and _is_list(b):
        value = _common_type(a.value_type, b.value_type)
        return None if value is None else a if a.equals(b) else pa.large_list(value)
    try:
        return pa.unify_schemas([pa.schema([("", a)]), pa.schema([("", b)])]).field(0).type
    except pa.ArrowException:
        return None


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
