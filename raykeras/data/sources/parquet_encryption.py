"""Find the encrypted columns of a Parquet file whose footer is not encrypted.

pyarrow aborts the process when it is asked for the metadata of an encrypted column, so the footer's Thrift is parsed
here. That is slow, so it is done only for signed footers, which all files with encrypted columns have.
"""

from __future__ import annotations

from typing import Any

_BOOLS, _INTEGERS, _DOUBLE, _BINARY, _LISTS, _MAP, _STRUCT = (1, 2), (3, 4, 5, 6), 7, 8, (9, 10), 11, 12


# Field ids of FileMetaData, RowGroup and ColumnChunk in parquet.thrift.
_ROW_GROUPS, _COLUMNS, _CRYPTO_METADATA = 4, 1, 8


def encrypted_leaves(footer: bytes) -> frozenset[int]:
    """Return the indices of the encrypted leaf columns.

    Args:
        footer: The serialized FileMetaData.
    """
    groups = _Thrift(footer).struct().get(_ROW_GROUPS, [])
    chunks = [chunk for group in groups for chunk in enumerate(group.get(_COLUMNS, []))]
    return frozenset(leaf for leaf, chunk in chunks if _CRYPTO_METADATA in chunk)


class _Thrift:
    """Reads Thrift's compact protocol, the format of Parquet footers."""

    def __init__(self, data: bytes) -> None:
        self._data, self._offset = data, 0

    def struct(self) -> dict[int, Any]:
        """Read a struct as values by field id."""
        values: dict[int, Any] = {}
        field_id = 0
        while head := self._byte():
            field_id = field_id + (head >> 4) if head >> 4 else self._signed()
            kind = head & 15
            values[field_id] = kind == 1 if kind in _BOOLS else self._value(kind)
        return values

    def _value(self, kind: int) -> Any:
        if kind in _BOOLS:
            return self._byte() == 1
        if kind in _INTEGERS:
            return self._byte() if kind == 3 else self._signed()
        if kind == _DOUBLE:
            return self._bytes(8)
        if kind == _BINARY:
            return self._bytes(self._unsigned())
        if kind in _LISTS:
            head = self._byte()
            size = head >> 4 if head >> 4 < 15 else self._unsigned()
            return [self._value(head & 15) for _ in range(size)]
        if kind == _MAP:
            size = self._unsigned()
            kinds = self._byte() if size else 0
            return [(self._value(kinds >> 4), self._value(kinds & 15)) for _ in range(size)]
        if kind == _STRUCT:
            return self.struct()
        raise ValueError(f"Thrift's compact protocol has no type {kind}.")

    def _bytes(self, size: int) -> bytes:
        self._offset += size
        return self._data[self._offset - size : self._offset]

    def _byte(self) -> int:
        self._offset += 1
        return self._data[self._offset - 1]

    def _unsigned(self) -> int:
        value, shift = 0, 0
        while (byte := self._byte()) & 0x80:
            value, shift = value | (byte & 0x7F) << shift, shift + 7
        return value | byte << shift

    def _signed(self) -> int:
        value = self._unsigned()
        return (value >> 1) ^ -(value & 1)
