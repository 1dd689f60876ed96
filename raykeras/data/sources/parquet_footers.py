"""Read the footers of Parquet files in parallel, and reduce each to what a source needs to know about the file.

Footers of sources with many files are cached by `raykeras.data.sources.parquet_footer_cache`, so that only files that
changed are read again. A cached footer is valid while the filesystem reports the same modification time, version and
size of the file.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO, Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raykeras.core.errors import SourceError
from raykeras.data.sources import parquet_footer_cache as footer_cache
from raykeras.data.sources.parquet_encryption import encrypted_leaves
from raykeras.data.sources.parquet_footer_cache import MAX_NBYTES, CachedFooter

_MIN_CACHED_FILES = 64  # the footers of sources with fewer files are not cached


_MAX_THREADS, _PROBED_FILES = 64, 8


_END_NBYTES = 64 << 10  # read from the end of each file; few footers are larger


_MAX_COUNT = 1 << 63


_MAX_CHECKED = 400_000  # column chunks of a source whose statistics are checked


@dataclass(frozen=True)
class Footer:
    """What a source needs to know about a file.

    Attributes:
        schema: The file's Arrow schema.
        rows: Rows of each row group: int64 (groups,).
        checked: The columns whose statistics were checked, possibly in the first row groups only.
        nulls: Column to the first row group that has nulls, and their number.
        lengths: List column to (row group, values, rows) of the first row group with rows, and of the first later one
            that shows that lengths differ.
        digest: Digest of the file's size and its last 64 KiB, or its footer if that is larger. The footer contains the
            size of each column chunk and, if they were written, minimum and maximum values; changes that affect
            neither these nor the end of the file are not detected.
        encrypted: The columns that cannot be read without a key.
    """

    schema: pa.Schema
    rows: np.ndarray
    checked: frozenset[str]
    nulls: dict[str, tuple[int, int]]
    lengths: dict[str, list[tuple[int, int, int]]]
    digest: str
    encrypted: frozenset[str] = frozenset()

    def covers(self, columns: Iterable[str] | None) -> bool:
        """Return whether the statistics of these columns were checked; None for all columns."""
        names = self.schema.names
        return self.checked.issuperset(names if columns is None else set(names).intersection(columns))

    def to_cached(self) -> CachedFooter:
        """Return the footer as it is cached."""
        fields = {name: getattr(self, name) for name in ("nulls", "lengths", "digest")}
        fields |= {"checked": sorted(self.checked), "encrypted": sorted(self.encrypted)}
        content = json.dumps(fields).encode() + b"\n" + self.rows.astype("<i8").tobytes()
        return CachedFooter(self.schema, zlib.compress(content, 1))

    @classmethod
    def from_cached(cls, cached: CachedFooter) -> Footer | None:
        """Return a cached footer; None if it is invalid, does not fit the schema, or is too large."""
        try:
            decompressor = zlib.decompressobj()
            content, _, rows = decompressor.decompress(cached.known, MAX_NBYTES).partition(b"\n")
            if not decompressor.eof:
                return None
            fields = json.loads(content)
            footer = cls(
                cached.schema,
                np.frombuffer(rows, "<i8").astype(np.int64),
                frozenset(map(str, fields["checked"])),
                {name: (group, count) for name, (group, count) in fields["nulls"].items()},
                {name: [(g, v, r) for g, v, r in seen] for name, seen in fields["lengths"].items()},
                str(fields["digest"]),
                frozenset(map(str, fields["encrypted"])),
            )
        except (zlib.error, ValueError, TypeError, LookupError, AttributeError, RecursionError):
            return None
        return footer if footer._is_valid() else None

    def _is_valid(self) -> bool:
        """Return whether the columns are in the schema and the numbers are possible."""
        entries = [*self.nulls.values(), *(entry for entries in self.lengths.values() for entry in entries)]
        if (self.rows < 0).any() or not all(type(n) is int and 0 <= n < _MAX_COUNT for ns in entries for n in ns):
            return False
        columns = self.checked | self.encrypted | self.nulls.keys() | self.lengths.keys()
        return columns <= set(self.schema.names) and all(ns[0] < len(self.rows) and ns[-1] > 0 for ns in entries)


def read_footers(
    fs: fsspec.AbstractFileSystem, files: Sequence[tuple[str, Mapping[str, Any]]], columns: Iterable[str] | None
) -> tuple[list[Footer], int]:
    """Return the footers of files, in their order.

    Args:
        fs: The filesystem.
        files: Paths and their fsspec info.
        columns: The columns whose statistics are checked; None for all.

    Returns:
        The footers, and how many of them were taken from the cache.

    Raises:
        SourceError: If a file is not a complete Parquet file, or has an encrypted footer.
    """
    requested = None if columns is None else frozenset(columns)
    is_cached = len(files) >= _MIN_CACHED_FILES
    keys = [(fs.unstrip_protocol(path), footer_cache.stamp(info)) for path, info in files] if is_cached else []
    unpacked = {i: Footer.from_cached(footer) for i, footer in footer_cache.load(keys).items()} if is_cached else {}
    cached = {i: footer for i, footer in unpacked.items() if footer is not None}
    missing = [i for i in range(len(files)) if i not in cached or not cached[i].covers(requested)]
    infos: dict[tuple[bytes, frozenset[str] | None], _SchemaInfo] = {}
    max_chunks = _MAX_CHECKED // max(len(missing), 1)

    def read(i: int) -> Footer:
        checked = requested | cached[i].checked if requested is not None and i in cached else requested
        return _read(fs, files[i][0], checked, max_chunks, infos)

    fresh = _read_all(read, missing, is_local(fs))
    if is_cached and fresh:
        footer_cache.save([(*keys[i], footer.to_cached()) for i, footer in fresh.items()])
    footers = cached | fresh
    return [footers[i] for i in range(len(files))], len(files) - len(missing)


def is_local(fs: fsspec.AbstractFileSystem) -> bool:
    """Return whether a filesystem is the local one."""
    return "file" in ((fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message as a sentence."""
    return str(error).strip().split("\n")[0].rstrip(".") + "."


def _read_all(read: Callable[[int], Footer], indices: Sequence[int], are_local: bool) -> dict[int, Footer]:
    """Read footers, in as many threads as it takes to keep a CPU busy.

    For local files, the ratio of wall time to CPU time of the first files is that number. Files in the page cache are
    read faster by one thread than by several. It is the calling one, since each thread retains memory that it freed.
    """
    probed = indices[:_PROBED_FILES] if are_local else []
    start_s, start_cpu_s = time.perf_counter(), time.thread_time()
    footers = {i: read(i) for i in probed}
    waiting = (time.perf_counter() - start_s) / max(time.thread_time() - start_cpu_s, 1e-6)
    num_threads = min(round(waiting), _MAX_THREADS) if probed else _MAX_THREADS
    rest = indices[len(probed) :]
    if num_threads <= 1:
        return footers | {i: read(i) for i in rest}
    with ThreadPoolExecutor(num_threads) as pool:
        return footers | dict(zip(rest, pool.map(read, rest), strict=True))


@dataclass(frozen=True)
class _SchemaInfo:
    """The columns of a schema, shared by all files that have it.

    Attributes:
        schema: The schema.
        checked: Columns whose statistics are checked.
        leaves: The column of each Parquet leaf column.
        lists: List columns.
    """

    schema: pa.Schema
    checked: frozenset[str]
    leaves: tuple[str, ...]
    lists: frozenset[str]

    @classmethod
    def of(cls, schema: pa.Schema, columns: frozenset[str] | None) -> _SchemaInfo:
        checked = frozenset(schema.names) if columns is None else columns.intersection(schema.names)
        leaves = leaf_columns(schema)
        lists = frozenset(f.name for f in schema if pa.types.is_list(f.type) or pa.types.is_large_list(f.type))
        return cls(schema, checked, leaves, lists)


def leaf_columns(schema: pa.Schema) -> tuple[str, ...]:
    """Return the column of each Parquet leaf column."""
    return tuple(field.name for field in schema for _ in range(_num_leaves(field.type)))


def _num_leaves(kind: pa.DataType) -> int:
    """Return the number of leaf columns that Parquet stores a column as."""
    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    return sum(_num_leaves(kind.field(i).type) for i in range(kind.num_fields)) if pa.types.is_nested(kind) else 1


def _read(
    fs: fsspec.AbstractFileSystem,
    path: str,
    columns: frozenset[str] | None,
    max_chunks: int,
    infos: dict[tuple[bytes, frozenset[str] | None], _SchemaInfo],
) -> Footer:
    """Read the footer of a file.

    Args:
        fs: The filesystem.
        path: The file.
        columns: The columns whose statistics are checked; None for all.
        max_chunks: Maximum number of column chunks whose statistics are checked.
        infos: Cache of what files of the same schema share, by schema and `columns`.
    """
    try:
        with open(path, "rb") if is_local(fs) else fs.open(path, "rb") as file:
            end, digest = _end(file)
        if end[-4:] == b"PARE":
            raise SourceError(
                f"The files of a source must be readable without a key; {path!r} has an encrypted footer. "
                "Write it without encryption, or leave it out."
            )
        with pq.ParquetFile(pa.BufferReader(end)) as parquet_file:
            schema = parquet_file.schema_arrow
            key = (schema.serialize().to_pybytes(), columns)
            if key not in infos:
                infos[key] = _SchemaInfo.of(schema, columns)
            info, metadata = infos[key], parquet_file.metadata
            footer = end[-8 - int.from_bytes(end[-8:-4], "little") : -8]
            is_signed = metadata.serialized_size != len(footer)
            leaves = encrypted_leaves(footer) if is_signed else frozenset()
            return _summary(metadata, info, max_chunks, digest, frozenset(info.leaves[leaf] for leaf in leaves))
    except (pa.ArrowException, OSError) as error:
        raise SourceError(
            f"The files of a source must be complete Parquet files; {path!r} is not: {first_line(error)} "
            "Write it again, or leave it out."
        ) from None


def _end(file: IO[bytes]) -> tuple[bytes, str]:
    """Return the last bytes of a file, with at least the footer, and `Footer.digest`."""
    file.seek(0, os.SEEK_END)
    size = file.tell()
    file.seek(max(0, size - _END_NBYTES))
    end = file.read()
    footer_nbytes = int.from_bytes(end[-8:-4], "little") + 8  # with its length and "PAR1"
    if len(end) < footer_nbytes <= size:
        file.seek(size - footer_nbytes)
        end = file.read()
    return end, hashlib.sha256(b"%d\n" % size + end).hexdigest()[:32]


def _summary(
    metadata: pq.FileMetaData, info: _SchemaInfo, max_chunks: int, digest: str, encrypted: frozenset[str]
) -> Footer:
    groups = [metadata.row_group(g) for g in range(metadata.num_row_groups)]
    rows = [group.num_rows for group in groups]
    nulls: dict[str, tuple[int, int]] = {}
    lengths: dict[str, list[tuple[int, int, int]]] = {}
    leaves = [(j, name) for j, name in enumerate(info.leaves) if name in info.checked - encrypted]
    for g in range(min(len(groups), max_chunks // max(len(leaves), 1))):
        for j, name in leaves:
            chunk = groups[g].column(j)
            if name in info.lists:  # null counts of lists are useless: the leaf of an empty list is null
                entries = lengths.setdefault(name, [])
                if rows[g] and (not entries or _lengths_differ(entries[0], chunk.num_values, rows[g])):
                    entries.append((g, chunk.num_values, rows[g]))
            elif name not in nulls and (count := _null_count(chunk)):
                nulls[name] = (g, count)
    lengths = {name: entries[:2] for name, entries in lengths.items()}
    return Footer(info.schema, np.array(rows, np.int64), info.checked, nulls, lengths, digest, encrypted)


def _null_count(chunk: pq.ColumnChunkMetaData) -> int:
    """Return the number of nulls; 0 if the file has no statistics."""
    statistics = chunk.statistics if chunk.is_stats_set else None
    return statistics.null_count if statistics is not None and statistics.has_null_count else 0


def _lengths_differ(first: tuple[int, int, int], num_values: int, num_rows: int) -> bool:
    """Return whether the lists of two row groups cannot all have the same length."""
    return num_values * first[2] != first[1] * num_rows or num_values % num_rows != 0
