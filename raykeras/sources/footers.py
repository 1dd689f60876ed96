"""Parquet footers: what a source must know of each file, read in parallel and kept on this machine.

Enters: files of one filesystem, and the columns that are to be used. Leaves: a `Footer` for each, a few numbers
instead of all of its statistics. Those of sources of many files are kept by `raykeras.sources.footer_cache`, so that
of 10,000 files only those that changed are read again: a footer is found by its file's address, and holds while the
filesystem says the same of the file's last change, version and size.
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

from raykeras.errors import SourceError
from raykeras.sources import footer_cache
from raykeras.sources.encryption import encrypted_leaves
from raykeras.sources.footer_cache import MAX_NBYTES, Kept

_LEAST_KEPT = 64  # files of a source, from which on their footers are kept
_MAX_THREADS, _PROBED = 64, 8
_END_NBYTES = 64 << 10  # read of a file at once; few footers are larger
_MAX_COUNT = 1 << 63
_MAX_CHECKED = 400_000  # column chunks of a source whose statistics are looked at, at 2 µs each


@dataclass(frozen=True)
class Footer:
    """What is known of a file.

    Attributes:
        schema: Its Arrow schema.
        rows: Of each row group: int64 (groups,).
        checked: The columns whose statistics were looked at, in as many row groups as there was time for.
        nulls: Column to the first row group that has nulls, and how many.
        lengths: Column of lists to (row group, values, rows) of the first row group with rows, and of the first
            after it which tells that the lengths differ.
        digest: Of the file's size and its last 64 KiB, or of its whole footer where that is larger. The footer has
            the size of each column in each row group and, where they were written, least and greatest values. Other
            contents that agree in all of these, and in the rows that lie at the end, are not noticed.
        encrypted: The columns that cannot be read without a key.
    """

    schema: pa.Schema
    rows: np.ndarray
    checked: frozenset[str]
    nulls: dict[str, tuple[int, int]]
    lengths: dict[str, list[tuple[int, int, int]]]
    digest: str
    encrypted: frozenset[str] = frozenset()

    def serves(self, columns: Iterable[str] | None) -> bool:
        """Whether the statistics of these columns, or of all, were looked at."""
        names = self.schema.names
        return self.checked.issuperset(names if columns is None else set(names).intersection(columns))

    def packed(self) -> Kept:
        """Return the footer as it is kept."""
        known = {name: getattr(self, name) for name in ("nulls", "lengths", "digest")}
        known |= {"checked": sorted(self.checked), "encrypted": sorted(self.encrypted)}
        content = json.dumps(known).encode() + b"\n" + self.rows.astype("<i8").tobytes()
        return Kept(self.schema, zlib.compress(content, 1))

    @classmethod
    def unpacked(cls, kept: Kept) -> Footer | None:
        """Return the footer that was packed; None if it cannot be one of this schema, or is too large."""
        try:
            unzip = zlib.decompressobj()
            known, _, rows = unzip.decompress(kept.known, MAX_NBYTES).partition(b"\n")
            if not unzip.eof:
                return None
            fields = json.loads(known)
            footer = cls(
                kept.schema,
                np.frombuffer(rows, "<i8").astype(np.int64),
                frozenset(map(str, fields["checked"])),
                {name: (group, count) for name, (group, count) in fields["nulls"].items()},
                {name: [(g, v, r) for g, v, r in seen] for name, seen in fields["lengths"].items()},
                str(fields["digest"]),
                frozenset(map(str, fields["encrypted"])),
            )
        except (zlib.error, ValueError, TypeError, LookupError, AttributeError, RecursionError):
            return None
        return footer if footer._is_possible() else None

    def _is_possible(self) -> bool:
        """Return whether its numbers can be those of a file of its schema."""
        seen = [*self.nulls.values(), *(numbers for each in self.lengths.values() for numbers in each)]
        if (self.rows < 0).any() or not all(type(n) is int and 0 <= n < _MAX_COUNT for ns in seen for n in ns):
            return False
        named = self.checked | self.encrypted | self.nulls.keys() | self.lengths.keys()
        return named <= set(self.schema.names) and all(ns[0] < len(self.rows) and ns[-1] > 0 for ns in seen)


def read_footers(
    fs: fsspec.AbstractFileSystem, files: Sequence[tuple[str, Mapping[str, Any]]], columns: Iterable[str] | None
) -> tuple[list[Footer], int]:
    """The footers of files, in their order.

    Args:
        fs: The filesystem.
        files: Paths, and what the filesystem says of each.
        columns: Those whose statistics are wanted; None for all.

    Returns:
        The footers, and the number of them that had been kept.

    Raises:
        SourceError: A file is not whole.
    """
    wanted = None if columns is None else frozenset(columns)
    is_kept = len(files) >= _LEAST_KEPT
    keys = [(fs.unstrip_protocol(path), footer_cache.stamp(info)) for path, info in files] if is_kept else []
    unpacked = {i: Footer.unpacked(each) for i, each in footer_cache.load(keys).items()} if is_kept else {}
    kept = {i: footer for i, footer in unpacked.items() if footer is not None}
    missing = [i for i in range(len(files)) if i not in kept or not kept[i].serves(wanted)]
    kinds: dict[tuple[bytes, frozenset[str] | None], _Kind] = {}
    most = _MAX_CHECKED // max(len(missing), 1)

    def read(i: int) -> Footer:
        checked = wanted | kept[i].checked if wanted is not None and i in kept else wanted
        return _read(fs, files[i][0], checked, most, kinds)

    made = _read_all(read, missing, is_local(fs))
    if is_kept and made:
        footer_cache.save([(*keys[i], footer.packed()) for i, footer in made.items()])
    known = kept | made
    return [known[i] for i in range(len(files))], len(files) - len(missing)


def is_local(fs: fsspec.AbstractFileSystem) -> bool:
    return "file" in ((fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol)


def first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0].rstrip(".") + "."


def _read_all(read: Callable[[int], Footer], places: Sequence[int], may_be_at_hand: bool) -> dict[int, Footer]:
    """In as many threads as keep a CPU busy: files at hand are read twice as fast by one as by several.

    Where one is enough it is this one: each other would keep what it has freed, as much as a parsed footer takes.
    """
    probed = places[:_PROBED] if may_be_at_hand else []
    begun, worked = time.perf_counter(), time.thread_time()
    made = {i: read(i) for i in probed}
    waiting = (time.perf_counter() - begun) / max(time.thread_time() - worked, 1e-6)
    num_threads = min(round(waiting), _MAX_THREADS) if probed else _MAX_THREADS
    rest = places[len(probed) :]
    if num_threads <= 1:
        return made | {i: read(i) for i in rest}
    with ThreadPoolExecutor(num_threads) as pool:
        return made | dict(zip(rest, pool.map(read, rest), strict=True))


@dataclass(frozen=True)
class _Kind:
    """What files of one schema share.

    Attributes:
        schema: Theirs.
        checked: Columns whose statistics are looked at.
        leaves: The column of each leaf.
        lists: Columns of lists.
    """

    schema: pa.Schema
    checked: frozenset[str]
    leaves: tuple[str, ...]
    lists: frozenset[str]

    @classmethod
    def of(cls, schema: pa.Schema, columns: frozenset[str] | None) -> _Kind:
        checked = frozenset(schema.names) if columns is None else columns.intersection(schema.names)
        leaves = tuple(field.name for field in schema for _ in range(_num_leaves(field.type)))
        lists = frozenset(f.name for f in schema if pa.types.is_list(f.type) or pa.types.is_large_list(f.type))
        return cls(schema, checked, leaves, lists)


def _num_leaves(kind: pa.DataType) -> int:
    """Count the columns that Parquet makes of a column: one for each value in a nested type."""
    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    return sum(_num_leaves(kind.field(i).type) for i in range(kind.num_fields)) if pa.types.is_nested(kind) else 1


def _read(
    fs: fsspec.AbstractFileSystem,
    path: str,
    columns: frozenset[str] | None,
    most: int,
    kinds: dict[tuple[bytes, frozenset[str] | None], _Kind],
) -> Footer:
    """One file's footer. Looks at the statistics of at most so many chunks."""
    try:
        with open(path, "rb") if is_local(fs) else fs.open(path, "rb") as stored:
            end, digest = _end(stored)
        if end[-4:] == b"PARE":
            raise SourceError(
                f"Every file of a source must be readable without a key; {path!r} has an encrypted footer. "
                "Write it without encryption, or leave it out."
            )
        with pq.ParquetFile(pa.BufferReader(end)) as file:
            schema = file.schema_arrow
            key = (schema.serialize().to_pybytes(), columns)
            if key not in kinds:
                kinds[key] = _Kind.of(schema, columns)
            kind, metadata = kinds[key], file.metadata
            footer = end[-8 - int.from_bytes(end[-8:-4], "little") : -8]
            is_signed = metadata.serialized_size != len(footer)
            hidden = encrypted_leaves(footer) if is_signed else frozenset()
            return _summary(metadata, kind, most, digest, frozenset(kind.leaves[leaf] for leaf in hidden))
    except (pa.ArrowException, OSError) as error:
        raise SourceError(
            f"Every file of a source must be whole Parquet; {path!r} is not: {first_line(error)} "
            "Write it again, or leave it out."
        ) from None


def _end(stored: IO[bytes]) -> tuple[bytes, str]:
    """Read the last bytes of a file, with the whole footer; with them, return `Footer.digest`."""
    stored.seek(0, os.SEEK_END)
    size = stored.tell()
    stored.seek(max(0, size - _END_NBYTES))
    end = stored.read()
    footer_nbytes = int.from_bytes(end[-8:-4], "little") + 8  # its length, and "PAR1"
    if len(end) < footer_nbytes <= size:
        stored.seek(size - footer_nbytes)
        end = stored.read()
    return end, hashlib.sha256(b"%d\n" % size + end).hexdigest()[:32]


def _summary(metadata: pq.FileMetaData, kind: _Kind, most: int, digest: str, encrypted: frozenset[str]) -> Footer:
    groups = [metadata.row_group(g) for g in range(metadata.num_row_groups)]
    rows = [group.num_rows for group in groups]
    nulls: dict[str, tuple[int, int]] = {}
    lengths: dict[str, list[tuple[int, int, int]]] = {}
    leaves = [(j, name) for j, name in enumerate(kind.leaves) if name in kind.checked - encrypted]
    for g in range(min(len(groups), most // max(len(leaves), 1))):
        for j, name in leaves:
            chunk = groups[g].column(j)
            if name in kind.lists:  # a leaf of an empty list is null
                seen = lengths.setdefault(name, [])
                if rows[g] and (not seen or _tells(seen[0], chunk.num_values, rows[g])):
                    seen.append((g, chunk.num_values, rows[g]))
            elif name not in nulls and (count := _null_count(chunk)):
                nulls[name] = (g, count)
    lengths = {name: seen[:2] for name, seen in lengths.items()}
    return Footer(kind.schema, np.array(rows, np.int64), kind.checked, nulls, lengths, digest, encrypted)


def _null_count(chunk: pq.ColumnChunkMetaData) -> int:
    """0 where the file does not tell."""
    statistics = chunk.statistics if chunk.is_stats_set else None
    return statistics.null_count if statistics is not None and statistics.has_null_count else 0


def _tells(first: tuple[int, int, int], num_values: int, num_rows: int) -> bool:
    """Whether the lists of two row groups cannot all have one length."""
    return num_values * first[2] != first[1] * num_rows or num_values % num_rows != 0
