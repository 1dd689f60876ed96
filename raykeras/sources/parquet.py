"""Parquet: files, folders, globs, lists and hive partitions, on any fsspec filesystem."""

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

from raykeras.errors import OptionError, SourceError
from raykeras.output import INCOMPLETE, SUCCESS, refuse_incomplete
from raykeras.sources import (
    Cache,
    Columns,
    OpenSource,
    Source,
    Spec,
    Transform,
    UnitRef,
    fingerprint,
    nearest,
)
from raykeras.sources.fields import is_narrow_list, stored_field
from raykeras.sources.footer_cache import stamp
from raykeras.sources.footers import Footer, first_line, is_local, read_footers
from raykeras.sources.parquet_checks import check_columns
from raykeras.sources.partitions import read_partitions

_ENDINGS = (".parquet", ".parq", ".pq")
_MAX_OPEN_FILES = 8
_MAX_TOLD_FILES = 1000  # a checkpoint has a digest of each
_VALUES_AT_ONCE = 1 << 17


@dataclass(frozen=True, kw_only=True)
class ParquetSource(Source):
    """Parquet files and what their columns mean; made by `raykeras.parquet`."""

    paths: tuple[str, ...]
    storage_options: Mapping[str, Any] | None = None

    def open(self) -> OpenSource:
        options = dict(self.storage_options or {})
        _require_one_filesystem(self.paths, options)
        fs, found, roots = _find(self.paths, options)
        files = [path for path, _ in found]
        needed = self.needed_columns()
        partitions, folders, wrong = read_partitions(files, roots, self.fill)
        footers, kept = read_footers(fs, found, needed)
        schema = footers[0].schema
        names = [name for name in (schema.names if needed is None else needed) if name not in folders]
        rows = np.concatenate([footer.rows for footer in footers])
        if not rows.sum():
            raise SourceError(f"A source must have at least one row; {_listed(files)} have none.")
        fields = {field.name: stored_field(field) for field in schema}
        fields, unusable = check_columns(self, list(zip(files, footers, strict=True)), fields, names)
        fields |= folders
        unusable = {name: error for name, error in unusable.items() if name not in folders} | wrong
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
            kept_footers=kept,
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
    """Parquet files as a source.

    Args:
        path: A file, a folder (read recursively; `key=value` folders become columns), a glob, an
            fsspec URL of any of these, or a list of them on one filesystem. Files are read in the order of their
            names.
        x: One column; a list of numeric columns, stacked into a (rows, k) matrix; or a dict of
            either by the model's input names.
        y: Likewise, by output names.
        sample_weight: Likewise, by output names.
        transform, columns, pad, ragged, fill, cache: See `Source`.
        storage_options: Passed to fsspec.

    Returns:
        A source that streams; nothing is read until it is used.
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
    """Reads parts of row groups. Keeps the files that it read last open, and only in its process."""

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
            gone = [name for name in stored if schema.get_field_index(name) < 0]
            if gone or unit.group >= file.num_row_groups:
                raise _changed(unit, f"has {f'no column {gone[0]!r}' if gone else 'no such row group'} now")
            table = _read(file, schema, unit.group, stored)
        except (pa.ArrowException, OSError) as error:
            raise SourceError(
                f"Every row group must be readable; {unit} is not: {first_line(error)} "
                "The file may be truncated or corrupt: write it again or leave it out."
            ) from None
        if table.num_rows != unit.group_rows:
            raise _changed(unit, f"had {unit.group_rows:,} rows and has {table.num_rows:,} now")
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
    """A local file as it is, for one thread; kept from one task to the next, each of which has a reader of its own.

    Mapping its pages anew costs a twelfth of a task's time.
    """
    return pq.ParquetFile(path, memory_map=True)


def _changed(unit: UnitRef, how: str) -> SourceError:
    return SourceError(f"A file must stay as it is while it is used; {unit} {how}. Start again.")


def _read(file: pq.ParquetFile, schema: pa.Schema, group: int, columns: Sequence[str]) -> pa.Table:
    """Columns of a row group; some rows at a time where that is faster.

    Parquet holds numbers of 8 and 16 bits as 32, and for each value of a list two levels of 16 bits. So many at a time
    that all stay in a core's cache take a seventh less time. Wider numbers gain nothing:
    putting the parts together takes as long as they save.
    """
    if not any(is_narrow_list(schema.field(name).type) for name in columns):
        return file.read_row_group(group, columns=columns, use_threads=False)
    stored, paths = file.metadata.row_group(group), tuple(f"{name}." for name in columns)
    leaves = [j for j, leaf in enumerate(file.schema) if f"{leaf.path}.".startswith(paths)]
    most = max(stored.column(j).num_values for j in leaves)  # that of an encrypted column would end the process
    rows = max(1, _VALUES_AT_ONCE * stored.num_rows // max(1, most))
    batches = file.iter_batches(rows, row_groups=[group], columns=columns, use_threads=False)
    return pa.Table.from_batches(batches, pa.schema([schema.field(name) for name in columns]))


def _opened(fs: fsspec.AbstractFileSystem, path: str) -> pq.ParquetFile:
    """A file of another machine; its footer is kept from one task to the next while the file is the same."""
    stored = fs.open(path, "rb")
    version = stamp(getattr(stored, "details", None) or fs.info(path))
    footer = None if version is None else _footer(fs, path, version)
    return pq.ParquetFile(stored, metadata=footer, pre_buffer=True)


@functools.lru_cache(maxsize=_MAX_OPEN_FILES)
def _footer(fs: fsspec.AbstractFileSystem, path: str, _: str) -> pq.FileMetaData:
    with fs.open(path, "rb") as stored:
        return pq.read_metadata(stored)


def _require_one_filesystem(paths: Sequence[str], options: dict[str, Any]) -> None:
    first, *others = ((path, fsspec.core.url_to_fs(path, **options)[0]) for path in paths)
    for path, fs in others:
        if fs != first[1]:
            raise SourceError(
                f"All paths of a source must be on one filesystem; {first[0]!r} and {path!r} are not. "
                "Copy the files to one place."
            )


_File = tuple[str, Mapping[str, Any]]
"""A path, and what the filesystem says of it."""


def _find(paths: Sequence[str], options: dict[str, Any]) -> tuple[fsspec.AbstractFileSystem, list[_File], list[str]]:
    """The filesystem, every Parquet file, and for each the folder that was named for it."""
    files: list[_File] = []
    roots: list[str] = []
    fs: Any = None
    for path in paths:
        fs, local = fsspec.core.url_to_fs(path, **options)
        fs.invalidate_cache()  # of listings, which others may have changed since
        if any(c in local for c in "*?["):
            matches, root = fs.glob(local, detail=True), local[: min(local.index(c) for c in "*?[" if c in local)]
            found = {p: info for p, info in matches.items() if info["type"] != "directory"}
            for folder in matches.keys() - found.keys():
                found.update(_inside(fs, folder))
            refuse_incomplete(p for name in (INCOMPLETE, SUCCESS) for p in fs.glob(f"{os.path.dirname(local)}/{name}"))
        elif fs.isdir(local):
            found, root = _inside(fs, local), local
        elif fs.exists(local):
            found, root = {local: fs.info(local)}, os.path.dirname(local)
        else:
            raise SourceError(f"A source's path must exist; there is no {path!r}.{_nearest_path(fs, local)}")
        if not found:
            what = "matches no file" if "*" in path else f"holds no {'/'.join(_ENDINGS)} file"
            raise SourceError(f"A source must have at least one Parquet file; {path!r} {what}.")
        files += sorted(found.items())
        roots += [root] * len(found)
    return fs, files, roots


def _inside(fs: fsspec.AbstractFileSystem, folder: str) -> dict[str, Mapping[str, Any]]:
    def hidden(path: str) -> bool:
        relative = path[len(folder) :].strip("/").split("/")
        return any(part.startswith(("_", ".")) for part in relative)

    listed = fs.find(folder, detail=True)
    refuse_incomplete(listed)
    found = listed.items()
    return {path: info for path, info in found if path.endswith(_ENDINGS) and not hidden(path)}


def _nearest_path(fs: fsspec.AbstractFileSystem, path: str) -> str:
    try:
        beside = [os.path.basename(str(p).rstrip("/")) for p in fs.ls(os.path.dirname(path), detail=False)]
    except (OSError, ValueError):
        return ""
    return nearest(os.path.basename(path.rstrip("/")), beside)


def _fingerprint_parts(
    files: Sequence[str], footers: Sequence[Footer], partitions: Sequence[tuple[tuple[str, Any], ...]]
) -> dict[str, Any]:
    """Nothing of them depends on where the files are, or on when they were written."""
    names = [[*partition, os.path.basename(path)] for path, partition in zip(files, partitions, strict=True)]
    digests = [footer.digest for footer in footers]
    parts = {
        "number of files": len(files),
        "names of the files": fingerprint(names),
        "columns": fingerprint(str(footers[0].schema)),
        "contents of the files": fingerprint(digests),
    }
    if len(files) > _MAX_TOLD_FILES:
        return parts
    return {**parts, "files": [fingerprint([n, d])[:8] for n, d in zip(names, digests, strict=True)]}


def _listed(files: Sequence[str]) -> str:
    return files[0] if len(files) == 1 else f"{files[0]} and {len(files) - 1} more files"
