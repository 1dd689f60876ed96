"""Parquet footers of sources with many files are cached on disk and invalidated when a file changes."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

import raykeras as rk
from raykeras.cli.main import main
from raykeras.data.sources import parquet_footers
from raykeras.data.sources.base import OpenSource

NUM_FILES = 70


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RAYKERAS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "footers-2.sqlite"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    for i in range(NUM_FILES):
        write(tmp_path / "data" / f"{i:02}.parquet")
    return tmp_path / "data"


def write(path: Path, num_rows: int = 5, **columns: pa.Array) -> None:
    lists = pa.array([[1, 2, 3]] * num_rows)
    table = pa.table({"x": np.ones(num_rows), "y": np.zeros(num_rows), "series": lists, **columns})
    pq.write_table(table, path, row_group_size=2)


def described(opened: OpenSource) -> list[object]:
    units = (opened.unit_file, opened.unit_group, opened.unit_start, opened.unit_rows)
    return [opened.fields, opened.files, opened.fingerprint, *(a.tolist() for a in units)]


def test_cached_footers_equal_fresh_ones(folder: Path, cache: Path) -> None:
    source = rk.parquet(folder, x={"x": "x", "series": "series"})
    read = source.open()
    assert read.num_cached_footers == 0
    assert cache.exists()
    kept = source.open()
    assert kept.num_cached_footers == NUM_FILES
    assert described(kept) == described(read)
    assert kept.fields["series"].shape == (3,)


@pytest.mark.parametrize("waits", [False, True])
def test_slow_storage_is_read_by_several_threads(waits: bool, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each thread retains the memory that it used for parsing, so one thread reads local files."""
    readers, read = set(), parquet_footers._read

    def watched(*arguments: Any) -> parquet_footers.Footer:
        readers.add(threading.get_ident())
        time.sleep(0.01 * waits)
        return read(*arguments)

    monkeypatch.setattr(parquet_footers, "_read", watched)
    if not waits:  # not even for a CPU on a busy machine
        monkeypatch.setattr(time, "thread_time", time.perf_counter)
    rk.parquet(folder, x="x").open()
    assert (readers == {threading.get_ident()}) == (not waits)


def test_only_changed_files_are_read_again(folder: Path) -> None:
    source = rk.parquet(folder, x="x")
    source.open()
    write(folder / "07.parquet", 9)
    write(folder / "new.parquet", 1)
    (folder / "11.parquet").unlink()
    opened = source.open()
    assert opened.num_cached_footers == NUM_FILES - 2
    assert opened.num_rows == 5 * NUM_FILES - 5 + 4 + 1


def test_changed_modification_time_invalidates_footer(folder: Path) -> None:
    source = rk.parquet(folder, x="x")
    source.open()
    os.utime(folder / "07.parquet", ns=(1, 1))
    assert source.open().num_cached_footers == NUM_FILES - 1


def test_statistics_of_new_columns_are_checked(folder: Path) -> None:
    write(folder / "33.parquet", y=pa.array([0.0, 0.0, 0.0, None, 0.0]), series=pa.array([[1, 2, 3]] * 4 + [[1]]))
    rk.parquet(folder, x="x").open()
    for _ in range(2):
        with pytest.raises(rk.ColumnError, match=r"column 'y' has 1 in file .*33\.parquet, row group 1"):
            rk.parquet(folder, x="x", y="y").open()
        with pytest.raises(rk.ColumnError, match=r"'series' have 1 values .*33\.parquet, row group 2 and 3 in .*00\."):
            rk.parquet(folder, x="series").open()
    assert rk.parquet(folder, x="x").open().num_cached_footers == NUM_FILES
    assert rk.parquet(folder, x=["x", "y"], fill={"y": 0.0}).open().num_cached_footers == NUM_FILES


def test_damaged_cache_is_rebuilt(folder: Path, cache: Path) -> None:
    source = rk.parquet(folder, x="x")
    read = source.open()
    for damage in (b"not a database" * 100, b""):
        cache.write_bytes(damage)
        assert described(source.open()) == described(read)
        source.open()
        assert source.open().num_cached_footers == NUM_FILES
    with sqlite3.connect(cache) as database:
        database.execute("UPDATE footers SET known = substr(known, 1, 10) || x'00' || substr(known, 12)")
    assert described(source.open()) == described(read)


def test_unwritable_cache_is_bypassed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYKERAS_CACHE", str(folder / "00.parquet" / "cache"))
    source = rk.parquet(folder, x="x")
    assert described(source.open()) == described(source.open())
    assert source.open().num_cached_footers == 0


def test_relative_cache_path_is_supported(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv("RAYKERAS_CACHE", "here")
    rk.parquet(folder, x="x").open()
    assert (folder.parent / "here" / "footers-2.sqlite").exists()
    assert rk.parquet(folder, x="x").open().num_cached_footers == NUM_FILES


def test_missing_home_bypasses_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAYKERAS_CACHE")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    rk.parquet(folder, x="x").open()
    assert rk.parquet(folder, x="x").open().num_cached_footers == 0


def test_footers_on_other_filesystem_are_cached(folder: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(folder), "/kept", recursive=True)
    source = rk.parquet("memory://kept", x="x")
    try:
        assert source.open().num_cached_footers == 0
        assert source.open().num_cached_footers == NUM_FILES
        memory.put(str(folder / "00.parquet"), "/kept/00.parquet")
        assert source.open().num_cached_footers == NUM_FILES - 1
    finally:
        memory.rm("/kept", recursive=True)


def test_few_files_are_not_cached(tmp_path: Path, cache: Path) -> None:
    write(tmp_path / "a.parquet")
    rk.parquet(tmp_path / "a.parquet", x="x").open()
    assert not cache.exists()


def test_inspect_and_fit_share_cache(folder: Path) -> None:
    shown = [CliRunner().invoke(main, ["inspect", str(folder)]).output for _ in range(2)]
    assert f"350 rows in {NUM_FILES} files" in shown[0] and "cache" not in shown[0]
    assert f"{NUM_FILES} footers from the cache" in " ".join(shown[1].split())
    assert rk.parquet(folder, x="x", y="y").open().num_cached_footers == NUM_FILES


def test_shrunk_file_is_named(folder: Path) -> None:
    opened = rk.parquet(folder, x="x").open()
    write(folder / "00.parquet", 1)
    with pytest.raises(rk.SourceError, match=r"00\.parquet, row group 0 had 2 rows and has 1 now"):
        opened.reader.read(opened.unit(0), 0, 2, ["x"])
