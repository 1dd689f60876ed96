"""Parquet sources: files, folders, globs and hive partitions, on any fsspec filesystem."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raykeras.core.errors import OptionError, SourceError
from raykeras.data.sources.base import (
    Cache,
    Columns,
    OpenSource,
    Source,
    Spec,
    Transform,
    UnitRef,
    did_you_mean,
    fingerprint,
)
from raykeras.data.sources.fields import is_narrow_list, stored_field
from raykeras.data.sources.parquet_checks import check_columns
from raykeras.data.sources.parquet_footer_cache import stamp
from raykeras.data.sources.parquet_footers import Footer, first_line, is_local, read_footers
from raykeras.data.sources.parquet_markers import INCOMPLETE, SUCCESS, refuse_incomplete
from raykeras.data.sources.parquet_partitions import read_partitions

_SUFFIXES = (".parquet", ".parq", ".pq")


_MAX_OPEN_FILES = 8


_MAX_FILE_DIGESTS = 1000  # they are stored in each checkpoint


_BATCH_VALUES = 1 << 17


_MIN_PART = 8  # of a row group, less than an eighth is read without decoding the rest


@dataclass(frozen=True, kw_only=True, repr=False)
class ParquetSource(Source):
    """Parquet files; made by `raykeras.parquet`.

    Attributes:
        paths: Files, folders and globs.
        storage_options: Options of the fsspec filesystem.
    """

    paths: tuple[str, ...]
    storage_options: Mapping[str, Any] | None = None

    def open(self) -> OpenSource:
        options = dict(self.storage_options or {})
        _require_one_filesystem(self.paths, options)
        fs, file_infos, roots = _find(self.paths, options)
        files = [path for path, _ in file_infos]
        needed = self.needed_columns()
        partitions, partition_fields, partition_errors = read_partitions(files, roots, self.fill)
        footers, num_cached = read_footers(fs, file_infos, needed)
        schema = footers[0].schema
        names = [name for name in (schema.names if needed is None else needed) if name not in partition_fields]
        rows = np.concatenate([footer.rows for footer in footers])
        if not rows.sum():
            raise SourceError(f"A source must have at least one row; got none in {_listed(files)}.")
        fields = {field.name: stored_field(field) for field in schema}
        fields, unusable = check_columns(self, list(zip(files, footers, strict=True)), fields, names)
        fields |= partition_fields
        unusable = {name: error for name, error in unusable.items() if name not in partition_fields} | partition_errors
        for name in needed or ():
            if name in unusable:
                raise unusable[name]
        parts = _fingerprint_parts(files, footers, partitions)
        return OpenSource(
            reader=ParquetReader(fs),
            fields=fields,
            files=tuple(files),
            unit_file=np.repeat(np.arange(len(files)), [len(footer.rows) for footer in footers]),
            unit_group=np.concatenate([np.arange(len(footer.rows)) for footer in footers]),
            unit_start=np.zeros(len(rows), np.int64),
            unit_rows=rows,
            fingerprint=fingerprint(parts),
            fingerprint_parts=parts,
            partitions=partitions,
            num_cached_footers=num_cached,
            unit_group_rows=rows,
            unusable=unusable,
        )


def parquet(
    path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    x: Spec = None,
    y: Spec = None,
    sample_weight: Spec = None,
    transform: Transform | None = None,
    columns: Sequence[str] | None = None,
    pad: Mapping[str, int | tuple[int, Any]] | None = None,
    ragged: Sequence[str] = (),
    fill: Mapping[str, Any] | None = None,
    cache: Cache = "auto",
    storage_options: Mapping[str, Any] | None = None,
) -> ParquetSource:
    """Return a source that reads Parquet files.

    Args:
        path: A file, a folder (read recursively; `key=value` folders become columns), a glob, an fsspec URL of any of
            these, or a list of them on one filesystem. The files of each path are read in the order of their names.
        x: One column; a list of numeric columns, stacked to a (rows, k) matrix; or a dict of either by the model's
            input names.
        y: Likewise, by output names.
        sample_weight: Likewise, by output names.
        transform: `f(columns)` or `f(columns, rng)`, called on windows of rows inside the read tasks; see `Source`.
        columns: The columns passed to `transform`; None for all usable ones.
        pad: For columns of lists of different lengths: the length, or `(length, value)`.
        ragged: List columns that become a `tf.RaggedTensor`.
        fill: For columns with nulls: the value that replaces them.
        cache: "memory", None or "auto"; see `Source`.
        storage_options: Options of the fsspec filesystem, such as credentials.

    Returns:
        A source; nothing is read until it is used.

    Raises:
        OptionError: If there is no path, or the options do not fit together.
    """
    paths = [path] if isinstance(path, str | os.PathLike) else list(path)
    if not paths:
        raise OptionError("A source must have at least one path; got none.")
    return ParquetSource(
        paths=tuple(os.fspath(p) for p in paths),
        x=x,
        y=y,
        sample_weight=sample_weight,
        transform=transform,
        columns=columns,
        pad=dict(pad or {}),
        ragged=tuple(ragged),
        fill=dict(fill or {}),
        cache=cache,
        storage_options=storage_options,
    )


class ParquetReader:
    """Reads parts of row groups. Recently read files stay open, in the process that reads them."""

    in_memory = False

    def __init__(self, fs: fsspec.AbstractFileSystem) -> None:
        self._fs = fs
        self._open: dict[str, pq.ParquetFile] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_fs": self._fs, "_open": {}}

    def read(self, unit: UnitRef, start: int, stop: int, columns: Sequence[str]) -> Columns:
        partition = dict(unit.partition)
        stored = [name for name in columns if name not in partition]
        try:
            file = self._file(unit.path)
            schema = file.schema_arrow
            missing = [name for name in stored if schema.get_field_index(name) < 0]
            if missing or unit.group >= file.num_row_groups:
                raise _changed(unit, f"has {f'no column {missing[0]!r}' if missing else 'no such row group'} now")
            num_rows = file.metadata.row_group(unit.group).num_rows
            if num_rows != unit.group_rows:
                raise _changed(unit, f"had {unit.group_rows:,} rows and has {num_rows:,} now")
            last = unit.start + stop
            if not stored or not last or last * _MIN_PART > num_rows:
                table = _read(file, schema, unit.group, stored)
            else:
                table = _read_first(file, schema, unit.group, stored, last)
        except (pa.ArrowException, OSError) as error:
            raise SourceError(
                f"All row groups must be readable; {unit} is not: {first_line(error)} "
                "The file may be truncated or corrupt: write it again or leave it out."
            ) from None
        table = table.slice(unit.start + start, stop - start)
        result: Columns = {name: table.column(name) for name in stored}
        for name in columns:
            if name in partition:
                result[name] = np.full(stop - start, partition[name])
        return result

    def _file(self, path: str) -> pq.ParquetFile:
        if is_local(self._fs):
            state = os.stat(path)
            return _mapped(path, state.st_ino, state.st_size, state.st_mtime_ns, threading.get_ident())
        if path not in self._open:
            while len(self._open) >= _MAX_OPEN_FILES:
                self._open.pop(next(iter(self._open))).close()
            self._open[path] = _opened(self._fs, path)
        return self._open[path]


@functools.lru_cache(maxsize=_MAX_OPEN_FILES)
def _mapped(path: str, *_: int) -> pq.ParquetFile:
    """Memory-map a local file for one thread; the other arguments identify the file's version and the thread.

    Each task has its own reader, so the files are cached for the process: mapping them again for each task is slow.
    """
    return pq.ParquetFile(path, memory_map=True)


def _changed(unit: UnitRef, how: str) -> SourceError:
    return SourceError(f"Files must not change while they are used; {unit} {how}. Start again.")


def _read(file: pq.ParquetFile, schema: pa.Schema, group: int, columns: Sequence[str]) -> pa.Table:
    """Read columns of a row group.

    Lists of narrow integers are read in batches that fit a core's cache, since Parquet expands their values to 32 bits
    and adds two 16-bit levels to each. For wider values, concatenating the batches takes as long as it saves.
    """
    if not any(is_narrow_list(schema.field(name).type) for name in columns):
        return file.read_row_group(group, columns=columns, use_threads=False)
    metadata, paths = file.metadata.row_group(group), tuple(f"{name}." for name in columns)
    # Only of the columns that are read: pyarrow aborts the process on the metadata of an encrypted column.
    leaves = [j for j, leaf in enumerate(file.schema) if f"{leaf.path}.".startswith(paths)]
    max_values = max(metadata.column(j).num_values for j in leaves)
    rows = max(1, _BATCH_VALUES * metadata.num_rows // max(1, max_values))
    batches = file.iter_batches(rows, row_groups=[group], columns=columns, use_threads=False)
    return pa.Table.from_batches(batches, pa.schema([schema.field(name) for name in columns]))


def _read_first(file: pq.ParquetFile, schema: pa.Schema, group: int, columns: Sequence[str], num_rows: int) -> pa.Table:
    """Read the first rows of a row group, at least `num_rows` of them, without decoding the others."""
    read: list[pa.RecordBatch] = []
    for batch in file.iter_batches(num_rows, row_groups=[group], columns=columns, use_threads=False):
        read.append(batch)
        if sum(len(batch) for batch in read) >= num_rows:
            break
    return pa.Table.from_batches(read, pa.schema([schema.field(name) for name in columns]))


def _opened(fs: fsspec.AbstractFileSystem, path: str) -> pq.ParquetFile:
    """Open a remote file; its footer is cached for the process while the file does not change."""
    file = fs.open(path, "rb")
    version = stamp(getattr(file, "details", None) or fs.info(path))
    footer = None if version is None else _footer(fs, path, version)
    return pq.ParquetFile(file, metadata=footer, pre_buffer=True)


@functools.lru_cache(maxsize=_MAX_OPEN_FILES)
def _footer(fs: fsspec.AbstractFileSystem, path: str, _: str) -> pq.FileMetaData:
    with fs.open(path, "rb") as file:
        return pq.read_metadata(file)


def _require_one_filesystem(paths: Sequence[str], options: dict[str, Any]) -> None:
    try:
        first, *others = ((path, fsspec.core.url_to_fs(path, **options)[0]) for path in paths)
    except (ValueError, ImportError) as error:
        raise SourceError(f"fsspec must be able to open the paths of a source; got {paths[0]!r}: {error}") from None
    for path, fs in others:
        if fs != first[1]:
            raise SourceError(
                f"All paths of a source must be on one filesystem; {first[0]!r} and {path!r} are not. "
                "Copy the files to one place."
            )


_File = tuple[str, Mapping[str, Any]]
"""A path and its fsspec info."""


def _find(paths: Sequence[str], options: dict[str, Any]) -> tuple[fsspec.AbstractFileSystem, list[_File], list[str]]:
    """Return the filesystem, all Parquet files, and for each the folder below which folder names are partitions."""
    files: list[_File] = []
    roots: list[str] = []
    fs: Any = None
    for path in paths:
        fs, local = fsspec.core.url_to_fs(path, **options)
        fs.invalidate_cache()  # others may have changed the files since they were listed
        if any(c in local for c in "*?["):
            matches, root = fs.glob(local, detail=True), local[: min(local.index(c) for c in "*?[" if c in local)]
            infos = {p: info for p, info in matches.items() if info["type"] != "directory"}
            for folder in matches.keys() - infos.keys():
                infos.update(_inside(fs, folder))
            refuse_incomplete(p for name in (INCOMPLETE, SUCCESS) for p in fs.glob(f"{os.path.dirname(local)}/{name}"))
        elif fs.isdir(local):
            infos, root = _inside(fs, local), local
        elif fs.exists(local):
            infos, root = {local: fs.info(local)}, os.path.dirname(local)
        else:
            raise SourceError(f"The paths of a source must exist; there is no {path!r}.{_nearest_path(fs, local)}")
        if not infos:
            what = "matches no file" if "*" in path else f"contains no {'/'.join(_SUFFIXES)} file"
            raise SourceError(f"A source must have at least one Parquet file; {path!r} {what}.")
        files += sorted(infos.items())
        roots += [root] * len(infos)
    return fs, files, roots


def _inside(fs: fsspec.AbstractFileSystem, folder: str) -> dict[str, Mapping[str, Any]]:
    """Return the Parquet files in a folder and its subfolders, without hidden ones, with their fsspec info."""

    def is_hidden(path: str) -> bool:
        names = path[len(folder) :].strip("/").split("/")
        return any(name.startswith(("_", ".")) for name in names)

    infos = fs.find(folder, detail=True)
    refuse_incomplete(infos)
    return {path: info for path, info in infos.items() if path.endswith(_SUFFIXES) and not is_hidden(path)}


def _nearest_path(fs: fsspec.AbstractFileSystem, path: str) -> str:
    try:
        siblings = [os.path.basename(str(p).rstrip("/")) for p in fs.ls(os.path.dirname(path), detail=False)]
    except (OSError, ValueError):
        return ""
    return did_you_mean(os.path.basename(path.rstrip("/")), siblings)


def _fingerprint_parts(
    files: Sequence[str], footers: Sequence[Footer], partitions: Sequence[tuple[tuple[str, Any], ...]]
) -> dict[str, Any]:
    """Return what the fingerprint is made of; it does not depend on where the files are or when they were written."""
    names = [[*partition, os.path.basename(path)] for path, partition in zip(files, partitions, strict=True)]
    digests = [footer.digest for footer in footers]
    parts = {
        "number of files": len(files),
        "names of the files": fingerprint(names),
        "columns": fingerprint(str(footers[0].schema)),
        "contents of the files": fingerprint(digests),
    }
    if len(files) > _MAX_FILE_DIGESTS:
        return parts
    return {**parts, "files": [fingerprint([n, d])[:8] for n, d in zip(names, digests, strict=True)]}


def _listed(files: Sequence[str]) -> str:
    return files[0] if len(files) == 1 else f"{files[0]} and {len(files) - 1} more files"
