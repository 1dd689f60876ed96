"""The footer cache never returns a wrong footer, even if its file was altered, damaged or written by other users."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import stat
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raykeras.data.sources import parquet_footer_cache, parquet_footers
from raykeras.data.sources.parquet_footers import Footer, read_footers

COLUMNS = ["x", "y", "series", "elsewhere"]
FUZZ = settings(max_examples=350, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


@pytest.fixture(autouse=True)
def keep_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_footers, "_MIN_CACHED_FILES", 1)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RAYKERAS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "footers-2.sqlite"


@pytest.fixture
def files(tmp_path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Return path and filesystem info of three files with two schemas, with nulls and lists."""
    (tmp_path / "data").mkdir()
    for i, y in enumerate(([0.0, None, 0.0], [0.0, 1.0, 2.0], [1, 2, 3])):
        table = pa.table({"x": np.ones(3), "y": y, "series": [[1, 2], [3, 4], [5]]})
        pq.write_table(table, tmp_path / "data" / f"{i}.parquet", row_group_size=2)
    fs = fsspec.filesystem("file")
    return [(path, fs.info(path)) for path in sorted(fs.ls(tmp_path / "data", detail=False))]


def read(files: list[tuple[str, dict[str, Any]]]) -> tuple[list[Footer], int]:
    return read_footers(fsspec.filesystem("file"), files, COLUMNS)


def described(each: list[Footer]) -> list[tuple[Any, ...]]:
    return [(f.schema, f.rows.tolist(), f.checked, f.nulls, f.lengths, f.digest) for f in each]


@pytest.fixture
def uncached(files: list[tuple[str, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    with monkeypatch.context() as patched:
        patched.setenv("RAYKERAS_CACHE", "~")
        footers, num_kept = read(files)
    assert num_kept == 0
    return described(footers)


@pytest.fixture
def whole(files: list[tuple[str, dict[str, Any]]], cache: Path, uncached: list[tuple[Any, ...]]) -> bytes:
    """Return the contents of a valid cache file."""
    read(files)
    kept, num_kept = read(files)
    assert num_kept == 3
    assert described(kept) == uncached
    return cache.read_bytes()


def test_only_owner_can_read_cache(whole: bytes, cache: Path) -> None:
    assert stat.S_IMODE(cache.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(cache.stat().st_mode) == 0o600
    with closing(sqlite3.connect(cache)) as database:
        database.execute("DELETE FROM footers")
        assert stat.S_IMODE(Path(f"{cache}-journal").stat().st_mode) == 0o600


def test_cache_is_never_readable_by_others(files: Any, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes = []
    connect = sqlite3.connect

    def watched(*args: Any, **options: Any) -> Any:
        modes.append(stat.S_IMODE(cache.stat().st_mode) if cache.exists() else None)
        return connect(*args, **options)

    monkeypatch.setattr(sqlite3, "connect", watched)
    read(files)
    assert modes == [0o600]


def test_cache_contains_no_urls(cache: Path) -> None:
    memory = fsspec.filesystem("memory")
    with memory.open("/user:password@bucket/signature=secret.parquet", "wb") as file:
        pq.write_table(pa.table({"x": [1.0]}), file)
    path = "/user:password@bucket/signature=secret.parquet"
    try:
        for num_kept in (0, 1):
            assert read_footers(memory, [(path, memory.info(path))], ["x"])[1] == num_kept
    finally:
        memory.rm("/user:password@bucket", recursive=True)
    content = cache.read_bytes()
    assert not any(word in content for word in (b"password", b"bucket", b"secret", b"memory"))


@pytest.mark.parametrize("mode", [0o770, 0o707])
@pytest.mark.parametrize("of", ["folder", "file"])
def test_cache_writable_by_others_is_ignored(
    of: str, mode: int, whole: bytes, files: Any, cache: Path, uncached: list[Any]
) -> None:
    changed = cache.parent if of == "folder" else cache
    changed.chmod(mode)
    for _ in range(2):
        found, num_kept = read(files)
        assert num_kept == 0
        assert described(found) == uncached
    assert cache.read_bytes() == whole
    cache.unlink()
    if of == "folder":
        read(files)
        assert not cache.exists()


@pytest.mark.parametrize("of", ["folder", "file"])
def test_cache_owned_by_others_is_ignored(
    of: str, whole: bytes, files: Any, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = os.stat

    def others(path: Any, **options: Any) -> os.stat_result:
        state = original(path, **options)
        if Path(path) != (cache.parent if of == "folder" else cache):
            return state
        return os.stat_result((*state[:4], state.st_uid + 1, *state[5:]))

    monkeypatch.setattr(os, "stat", others)
    for _ in range(2):
        assert read(files)[1] == 0
    assert cache.read_bytes() == whole


def test_symbolic_link_is_not_followed(whole: bytes, files: Any, cache: Path) -> None:
    moved = cache.rename(cache.with_name("moved"))
    cache.symlink_to(moved)
    for _ in range(2):
        assert read(files)[1] == 0
    assert cache.is_symlink()
    assert moved.read_bytes() == whole


@pytest.mark.parametrize(
    "statement",
    [
        "DROP TABLE schemas",
        "ALTER TABLE footers ADD COLUMN more TEXT",
        "CREATE TRIGGER t AFTER INSERT ON footers BEGIN DELETE FROM footers; END",
        "CREATE VIEW v AS SELECT * FROM footers",
    ],
)
def test_cache_with_unexpected_schema_is_rebuilt(statement: str, whole: bytes, files: Any, cache: Path) -> None:
    with opened(cache) as database:
        database.execute(statement)
    assert [read(files)[1] for _ in range(2)] == [0, 3]


def test_compression_bomb_is_not_expanded(whole: bytes, files: Any, cache: Path, uncached: list[Any]) -> None:
    bomb = zlib.compress(b"[" * (256 << 20))
    assert len(bomb) < parquet_footer_cache.MAX_NBYTES
    with opened(cache) as database:
        for row in rows(database):
            store(database, {**row, "known": bomb})
    tracemalloc.start()
    found, num_kept = read(files)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert num_kept == 0
    assert described(found) == uncached
    assert peak < 32 << 20


def test_oversized_footer_is_not_cached(files: Any, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_footer_cache, "MAX_NBYTES", 10)
    assert [read(files)[1] for _ in range(2)] == [0, 0]


# Mutations


@contextmanager
def opened(cache: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(cache)) as database, database:
        database.execute("PRAGMA synchronous = OFF")
        database.execute("PRAGMA journal_mode = MEMORY")
        yield database


def rows(database: sqlite3.Connection) -> list[dict[str, Any]]:
    found = database.execute("SELECT * FROM footers ORDER BY key")
    return [dict(zip(("key", "stamp", "schema", "known", "checksum", "written"), row, strict=True)) for row in found]


def store(database: sqlite3.Connection, row: dict[str, Any]) -> None:
    """Replace a row by one with a valid checksum."""
    head = json.dumps([row["key"], row["stamp"], row["schema"]]).encode()
    row = {**row, "checksum": hashlib.sha256(head + row["known"]).hexdigest()}
    database.execute("INSERT OR REPLACE INTO footers VALUES (?, ?, ?, ?, ?, ?)", tuple(row.values()))


def altered(data: bytes) -> st.SearchStrategy[bytes]:
    """Generate copies of the data with changed bytes, truncated, or with a part moved."""
    place = st.integers(0, len(data) - 1)
    flips = st.lists(st.tuples(place, st.integers(1, 255)), min_size=1, max_size=8)

    def flipped(places: list[tuple[int, int]]) -> bytes:
        made = bytearray(data)
        for at, mask in places:
            made[at] ^= mask
        return bytes(made)

    def moved(places: tuple[int, int, int]) -> bytes:
        source, target, size = places
        return data[:target] + data[source : source + size] + data[target + size :]

    return st.one_of(
        flips.map(flipped), place.map(lambda at: data[:at]), st.tuples(place, place, st.integers(1, 4096)).map(moved)
    )


@FUZZ
@given(data=st.data())
def test_altered_file_gives_correct_footers(
    data: st.DataObject, whole: bytes, files: Any, cache: Path, uncached: list[Any]
) -> None:
    cache.write_bytes(data.draw(altered(whole)))
    Path(f"{cache}-journal").unlink(missing_ok=True)
    assert described(read(files)[0]) == uncached


@FUZZ
@given(data=st.data())
def test_altered_rows_give_correct_footers(
    data: st.DataObject, whole: bytes, files: Any, cache: Path, uncached: list[Any]
) -> None:
    cache.write_bytes(whole)
    with opened(cache) as database:
        kept = rows(database)
        at = data.draw(st.integers(0, len(kept) - 1))
        column = data.draw(st.sampled_from(["key", "stamp", "schema", "known", "checksum"]))
        old = kept[at][column]
        scalars = st.one_of(st.none(), st.integers(-(2**63), 2**63 - 1), st.floats(), st.text(), st.binary())
        others = st.sampled_from([row[column] for row in kept])
        new = data.draw(st.one_of(altered(old) if isinstance(old, bytes) else st.text(), others, scalars))
        database.execute(f"UPDATE OR REPLACE footers SET {column} = ? WHERE key = ?", (new, kept[at]["key"]))
    assert described(read(files)[0]) == uncached


@FUZZ
@given(data=st.data())
def test_altered_rows_with_valid_checksums_never_raise(
    data: st.DataObject, whole: bytes, files: Any, cache: Path
) -> None:
    cache.write_bytes(whole)
    with opened(cache) as database:
        row = data.draw(st.sampled_from(rows(database)))
        alter = data.draw(st.sampled_from([altered_known, altered_counts, altered_fields, altered_schema]))
        store(database, alter(data.draw, database, row))
    found, _ = read(files)
    assert all((f.rows >= 0).all() and set(f.nulls) <= set(f.schema.names) for f in found)


Draw = Callable[[Any], Any]


def altered_known(draw: Draw, _: sqlite3.Connection, row: dict[str, Any]) -> dict[str, Any]:
    whole = draw(st.one_of(altered(zlib.decompress(row["known"])), st.binary(max_size=64)))
    return {**row, "known": draw(st.sampled_from([zlib.compress(whole), whole]))}


def altered_counts(draw: Draw, _: sqlite3.Connection, row: dict[str, Any]) -> dict[str, Any]:
    known = zlib.decompress(row["known"]).partition(b"\n")[0]
    counts = draw(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=4))
    return {**row, "known": zlib.compress(known + b"\n" + np.array(counts, "<i8").tobytes())}


def altered_fields(draw: Draw, _: sqlite3.Connection, row: dict[str, Any]) -> dict[str, Any]:
    known, _, counts = zlib.decompress(row["known"]).partition(b"\n")
    fields = json.loads(known)
    values = st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.sampled_from(["x", "y", "series", "z"])),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["x", "z"]), inner, max_size=2),
        max_leaves=6,
    )
    *outer, last = draw(st.sampled_from(list(places(fields))))
    inner = fields
    for part in outer:
        inner = inner[part]
    inner[last] = draw(values)
    return {**row, "known": zlib.compress(json.dumps(fields).encode() + b"\n" + counts)}


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path to each value inside lists and dicts."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inner:
        yield (*at, key)
        yield from places(each, (*at, key))


def altered_schema(draw: Draw, database: sqlite3.Connection, row: dict[str, Any]) -> dict[str, Any]:
    (old,) = database.execute("SELECT schema FROM schemas WHERE digest = ?", (row["schema"],)).fetchone()
    new = draw(st.one_of(altered(old), st.binary(max_size=64)))
    digest = hashlib.sha256(new).hexdigest()
    database.execute("INSERT OR REPLACE INTO schemas VALUES (?, ?)", (digest, new))
    return {**row, "schema": digest}
