"""An on-disk cache of Parquet footers: an SQLite file in `$RAYKERAS_CACHE`, by default `~/.cache/raykeras`.

The file can be deleted at any time, and its content is not trusted. It is used only if it and its folder belong to the
user and nobody else can write to them. URLs may contain credentials, so only their digests are stored. Each row has a
checksum; damaged rows are ignored, and a damaged file or one with other tables is replaced.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sqlite3
import stat
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

MAX_NBYTES = 4 << 20
"""Maximum bytes of a cached footer, and of a schema; larger ones are not cached."""


_NAME = "footers-2.sqlite"


_MAX_AGE_S = 90 * 24 * 3600


_BUSY_S = 2.0


_DATABASE_ERRORS = (sqlite3.Error, UnicodeDecodeError)  # the latter if an error message quotes invalid text


# Names that filesystems use for the modification time and the version of a file.
_VERSIONS = (
    "mtime",
    "created",
    "LastModified",
    "last_modified",
    "updated",
    "ETag",
    "etag",
    "generation",
    "md5Hash",
)


_TABLES = {
    "footers": "CREATE TABLE footers"
    " (key TEXT PRIMARY KEY, stamp TEXT, schema TEXT, known BLOB, checksum TEXT, written REAL)",
    "schemas": "CREATE TABLE schemas (digest TEXT PRIMARY KEY, schema BLOB)",
}


class CachedFooter(NamedTuple):
    """The cached footer of a file: its Arrow schema, and the rest as bytes."""

    schema: pa.Schema
    known: bytes


def stamp(info: Mapping[str, Any]) -> str | None:
    """Return a string that changes when a file does, from its fsspec info; None if the filesystem has no version of it.

    Files without a stamp are not cached.
    """
    versions = [str(info[key]) for key in _VERSIONS if info.get(key) is not None]
    return json.dumps([info.get("size"), info.get("ino"), *versions]) if versions else None


def load(files: Sequence[tuple[str, str | None]]) -> dict[int, CachedFooter]:
    """Return the cached footers of files; never raises.

    Args:
        files: URL and stamp of each file.

    Returns:
        The footers that are cached for the same stamp, by index in `files`.
    """
    cached: dict[int, CachedFooter] = {}
    path = _path()
    if path is None or not (_only_user_writes(path.parent, stat.S_ISDIR) and _only_user_writes(path, stat.S_ISREG)):
        return cached
    schemas: dict[str, pa.Schema | None] = {}
    with contextlib.suppress(*_DATABASE_ERRORS), _connected(path, "ro") as database:
        if _tables(database) != _TABLES:
            return cached
        for i, (url, stamped) in enumerate(files):
            row = database.execute(
                "SELECT schema, known, checksum FROM footers WHERE key = ? AND stamp = ? AND length(known) <= ?",
                (_key(url), stamped, MAX_NBYTES),
            ).fetchone()
            if row is None or not isinstance(row[0], str) or not isinstance(row[1], bytes):
                continue
            digest, known, checksum = row
            if checksum != _checksum(_key(url), str(stamped), digest, known):
                continue
            if digest not in schemas:
                schemas[digest] = _schema(database, digest)
            if (schema := schemas[digest]) is not None:
                cached[i] = CachedFooter(schema, known)
    return cached


def save(files: Sequence[tuple[str, str | None, CachedFooter]]) -> None:
    """Cache footers, by URL and stamp of their files, if the cache can be written; never raises."""
    path = _path()
    if path is None:
        return
    serialized = {id(kept.schema): kept.schema.serialize().to_pybytes() for _, _, kept in files}
    digests = {key: _digest(schema) for key, schema in serialized.items()}
    schemas = {digests[key]: schema for key, schema in serialized.items() if len(schema) <= MAX_NBYTES}
    now, rows = time.time(), []
    for url, stamped, (schema, known) in files:
        digest = digests[id(schema)]
        if stamped is not None and digest in schemas and len(known) <= MAX_NBYTES:
            rows.append((_key(url), stamped, digest, known, _checksum(_key(url), stamped, digest, known), now))
    with contextlib.suppress(OSError, *_DATABASE_ERRORS):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _only_user_writes(path.parent, stat.S_ISDIR):
            return
        try:
            _write(path, schemas, rows, now)
        except _DATABASE_ERRORS as error:
            if "locked" in str(error):  # by another process, beyond the timeout
                return
            path.unlink()  # the file is damaged
            _write(path, schemas, rows, now)


def _write(path: Path, schemas: Mapping[str, bytes], rows: Sequence[tuple[Any, ...]], now: float) -> None:
    with contextlib.suppress(FileExistsError):  # SQLite's journal gets the same permissions
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    if not _only_user_writes(path, stat.S_ISREG):
        return
    with _connected(path, "rw") as database, database:
        database.execute("PRAGMA synchronous = OFF")  # if the machine crashes, a damaged cache is replaced
        database.execute("BEGIN IMMEDIATE")
        if not (tables := _tables(database)):
            for statement in _TABLES.values():
                database.execute(statement)
        elif tables != _TABLES:
            raise sqlite3.DatabaseError("other tables")
        database.executemany("INSERT OR REPLACE INTO schemas VALUES (?, ?)", schemas.items())
        database.executemany("INSERT OR REPLACE INTO footers VALUES (?, ?, ?, ?, ?, ?)", rows)
        database.execute("DELETE FROM footers WHERE written < ?", (now - _MAX_AGE_S,))
        database.execute("DELETE FROM schemas WHERE digest NOT IN (SELECT schema FROM footers)")


def _path() -> Path | None:
    """Return the path of the SQLite file; None if there is no home folder."""
    folder = os.environ.get("RAYKERAS_CACHE") or os.path.expanduser("~/.cache/raykeras")
    return None if folder.startswith("~") else Path(folder).absolute() / _NAME


def _only_user_writes(path: Path, is_kind: Any) -> bool:
    """Return whether a path is of the given kind, belongs to the user, and is not writable by anybody else."""
    try:
        state = os.stat(path, follow_symlinks=is_kind is stat.S_ISDIR)
    except OSError:
        return False
    others_write = state.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return bool(is_kind(state.st_mode)) and state.st_uid == os.geteuid() and not others_write


def _connected(path: Path, mode: str) -> contextlib.closing[sqlite3.Connection]:
    return contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode={mode}", timeout=_BUSY_S, uri=True))


def _tables(database: sqlite3.Connection) -> dict[str, str]:
    """Return the names of all tables, views and triggers with the statements that created them."""
    return dict(database.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL"))


def _schema(database: sqlite3.Connection, digest: str) -> pa.Schema | None:
    query = "SELECT schema FROM schemas WHERE digest = ? AND length(schema) <= ?"
    row = database.execute(query, (digest, MAX_NBYTES)).fetchone()
    if row is None or not isinstance(row[0], bytes) or _digest(row[0]) != digest:
        return None
    try:
        schema = pa.ipc.read_schema(pa.py_buffer(row[0]))
        return schema if schema.names and str(schema) else None  # raises if a name is not valid UTF-8
    except (pa.ArrowException, OSError, ValueError):
        return None


def _key(url: str) -> str:
    return _digest(url.encode())


def _checksum(key: str, stamped: str, schema: str, known: bytes) -> str:
    return _digest(json.dumps([key, stamped, schema]).encode() + known)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
