"""What was read of Parquet footers, kept on this machine from one opening of a source to the next.

Enters: for each file its URL, its stamp and what is known of it, as bytes. Leaves: the same bytes, for the files that
have the same stamp. They are kept in an SQLite file, in `$RAYKERAS_CACHE` or else `~/.cache/raykeras`, which can be
deleted at any time.

Nothing in that file is trusted. It is used only if it and its folder belong to this user and nobody else can write to
them. URLs may hold credentials, so only their digests are stored. Each row has a checksum; damaged rows are
ignored, and a file with other tables, or none, is replaced.
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
"""Most bytes of what is known of one file, and of a schema; larger ones are not kept."""

_NAME = "footers-2.sqlite"
_KEPT_S = 90 * 24 * 3600
_BUSY_S = 2.0
_DAMAGES = (sqlite3.Error, UnicodeDecodeError)  # the latter where an error quotes what is no text
# What filesystems call the change and the version of a file; without one of them it is never kept.
_CHANGES = ("mtime", "created", "LastModified", "last_modified", "updated", "ETag", "etag", "generation", "md5Hash")
_TABLES = {
    "footers": "CREATE TABLE footers"
    " (key TEXT PRIMARY KEY, stamp TEXT, schema TEXT, known BLOB, checksum TEXT, written REAL)",
    "schemas": "CREATE TABLE schemas (digest TEXT PRIMARY KEY, schema BLOB)",
}


class Kept(NamedTuple):
    """What is kept of a file: its Arrow schema, and the rest as bytes."""

    schema: pa.Schema
    known: bytes


def stamp(info: Mapping[str, Any]) -> str | None:
    """Return what changes when a file does, of what its filesystem says; None where it does not tell."""
    changes = [str(info[key]) for key in _CHANGES if info.get(key) is not None]
    return json.dumps([info.get("size"), info.get("ino"), *changes]) if changes else None


def load(files: Sequence[tuple[str, str | None]]) -> dict[int, Kept]:
    """Return what is kept of files.

    Args:
        files: URL and stamp of each.

    Returns:
        By index in `files`; never raises.
    """
    found: dict[int, Kept] = {}
    path = _path()
    if path is None or not (_is_private(path.parent, stat.S_ISDIR) and _is_private(path, stat.S_ISREG)):
        return found
    schemas: dict[str, pa.Schema | None] = {}
    with contextlib.suppress(*_DAMAGES), _connected(path, "ro") as database:
        if _tables(database) != _TABLES:
            return found
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
                found[i] = Kept(schema, known)
    return found


def save(files: Sequence[tuple[str, str | None, Kept]]) -> None:
    """Keep what is known of files, by URL and stamp, if there is a place for it; never raises."""
    path = _path()
    if path is None:
        return
    stored = {id(kept.schema): kept.schema.serialize().to_pybytes() for _, _, kept in files}
    digests = {key: _digest(schema) for key, schema in stored.items()}
    schemas = {digests[key]: schema for key, schema in stored.items() if len(schema) <= MAX_NBYTES}
    now, rows = time.time(), []
    for url, stamped, (schema, known) in files:
        digest = digests[id(schema)]
        if stamped is not None and digest in schemas and len(known) <= MAX_NBYTES:
            rows.append((_key(url), stamped, digest, known, _checksum(_key(url), stamped, digest, known), now))
    with contextlib.suppress(OSError, *_DAMAGES):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _is_private(path.parent, stat.S_ISDIR):
            return
        try:
            _write(path, schemas, rows, now)
        except _DAMAGES as error:
            if "locked" in str(error):  # by another process, for too long
                return
            path.unlink()  # damaged
            _write(path, schemas, rows, now)


def _write(path: Path, schemas: Mapping[str, bytes], rows: Sequence[tuple[Any, ...]], now: float) -> None:
    with contextlib.suppress(FileExistsError):  # SQLite gives its journal the same permissions
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    if not _is_private(path, stat.S_ISREG):
        return
    with _connected(path, "rw") as database, database:
        database.execute("PRAGMA synchronous = OFF")  # what a lost machine damages is read again
        database.execute("BEGIN IMMEDIATE")
        if not (tables := _tables(database)):
            for statement in _TABLES.values():
                database.execute(statement)
        elif tables != _TABLES:
            raise sqlite3.DatabaseError("other tables")
        database.executemany("INSERT OR REPLACE INTO schemas VALUES (?, ?)", schemas.items())
        database.executemany("INSERT OR REPLACE INTO footers VALUES (?, ?, ?, ?, ?, ?)", rows)
        database.execute("DELETE FROM footers WHERE written < ?", (now - _KEPT_S,))
        database.execute("DELETE FROM schemas WHERE digest NOT IN (SELECT schema FROM footers)")


def _path() -> Path | None:
    """Return the SQLite file; None where there is no place for it."""
    folder = os.environ.get("RAYKERAS_CACHE") or os.path.expanduser("~/.cache/raykeras")
    return None if folder.startswith("~") else Path(folder).absolute() / _NAME


def _is_private(path: Path, is_kind: Any) -> bool:
    """Return whether a file or folder belongs to this user, and nobody else can write to it."""
    try:
        state = os.stat(path, follow_symlinks=is_kind is stat.S_ISDIR)
    except OSError:
        return False
    others_write = state.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return bool(is_kind(state.st_mode)) and state.st_uid == os.geteuid() and not others_write


def _connected(path: Path, mode: str) -> contextlib.closing[sqlite3.Connection]:
    return contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode={mode}", timeout=_BUSY_S, uri=True))


def _tables(database: sqlite3.Connection) -> dict[str, str]:
    """Return every table, view and trigger with the statement that made it."""
    return dict(database.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL"))


def _schema(database: sqlite3.Connection, digest: str) -> pa.Schema | None:
    query = "SELECT schema FROM schemas WHERE digest = ? AND length(schema) <= ?"
    row = database.execute(query, (digest, MAX_NBYTES)).fetchone()
    if row is None or not isinstance(row[0], bytes) or _digest(row[0]) != digest:
        return None
    try:
        schema = pa.ipc.read_schema(pa.py_buffer(row[0]))
        return schema if schema.names and str(schema) else None  # names may be no text
    except (pa.ArrowException, OSError, ValueError):
        return None


def _key(url: str) -> str:
    return _digest(url.encode())


def _checksum(key: str, stamped: str, schema: str, known: bytes) -> str:
    return _digest(json.dumps([key, stamped, schema]).encode() + known)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
