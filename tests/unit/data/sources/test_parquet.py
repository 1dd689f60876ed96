"""Parquet sources: paths, schemas, row groups, and the error for each invalid input."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFile

import raykeras as rk
from raykeras.data.resolve import resolve
from raykeras.data.sources.base import OpenSource, what_changed


def write(path: Path, num_rows: int = 10, start: int = 0, group: int = 4, **columns: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    made = {"id": pa.array(np.arange(start, start + num_rows)), "x": pa.array(np.ones(num_rows, np.float32)), **columns}
    pq.write_table(pa.table(made), path, row_group_size=group)
    return path


def ids(opened: OpenSource) -> list[int]:
    read = []
    for i, rows in enumerate(opened.unit_rows):
        read += np.asarray(opened.reader.read(opened.unit(i), 0, int(rows), ["id"])["id"]).tolist()
    return read


def test_paths_are_read_in_name_order(tmp_path: Path) -> None:
    for i in range(3):
        write(tmp_path / "deep" / f"part-{i}.parquet", start=10 * i)
    write(tmp_path / "deep" / "_hidden.parquet", start=900)
    paths = [tmp_path / "deep", f"{tmp_path}/deep/part-*.parquet", f"file://{tmp_path}/deep", tmp_path]
    paths.append([tmp_path / "deep" / f"part-{i}.parquet" for i in range(3)])  # type: ignore[arg-type]
    for path in paths:
        opened = rk.parquet(path, x="x").open()
        assert ids(opened) == list(range(30))
        assert opened.unit_rows.tolist() == [4, 4, 2] * 3


def test_hive_partitions_become_columns(tmp_path: Path) -> None:
    for year in (2023, 2024):
        for place in ("a", "b"):
            write(tmp_path / f"year={year}" / f"place={place}" / "p.parquet", 2)
    opened = rk.parquet(tmp_path, x="year").open()
    read = [opened.reader.read(opened.unit(i), 0, 2, ["year", "place"]) for i in range(4)]
    assert [r["year"].tolist() for r in read] == [[2023, 2023], [2023, 2023], [2024, 2024], [2024, 2024]]
    assert [r["place"][0] for r in read] == ["a", "b", "a", "b"]


def test_slice_keeps_source_order(tmp_path: Path) -> None:
    for i in range(3):
        write(tmp_path / f"{i}.parquet", start=10 * i)
    opened = rk.parquet(tmp_path, x="x").open()
    assert ids(opened.slice(3, 17)) == list(range(3, 17))
    assert ids(opened.slice(3, 17).slice(2, 9)) == list(range(5, 12))
    assert opened.slice(3, 17).fingerprint != opened.fingerprint


def test_empty_files_are_skipped(tmp_path: Path) -> None:
    write(tmp_path / "0.parquet", 0)
    write(tmp_path / "1.parquet", 5)
    opened = rk.parquet(tmp_path, x="x").open()
    assert opened.num_rows == 5
    assert ids(opened) == list(range(5))


def test_fingerprint_changes_with_data(tmp_path: Path) -> None:
    before = rk.parquet(write(tmp_path / "a.parquet", 10), x="x").open().fingerprint
    assert rk.parquet(write(tmp_path / "a.parquet", 10), x="x").open().fingerprint == before
    assert rk.parquet(write(tmp_path / "a.parquet", 11), x="x").open().fingerprint != before


def test_changed_contents_of_same_size_are_detected(tmp_path: Path) -> None:
    values = np.arange(100_000.0)
    options = {"use_dictionary": False, "compression": "none"}

    def written(values: np.ndarray) -> OpenSource:
        pq.write_table(pa.table({"x": values}), tmp_path / "a.parquet", **options)
        return rk.parquet(tmp_path / "a.parquet", x="x").open()

    before = written(values)
    size = (tmp_path / "a.parquet").stat().st_size
    least = written(np.concatenate([[-1.0], values[1:]]))  # in the statistics
    last = written(np.concatenate([values[:-3], [0.0], values[-2:]]))  # not in the statistics, but near the end
    assert (tmp_path / "a.parquet").stat().st_size == size
    assert len({before.fingerprint, least.fingerprint, last.fingerprint}) == 3
    assert written(values).fingerprint == before.fingerprint


def test_moved_source_keeps_fingerprint(tmp_path: Path) -> None:
    for i in range(3):
        write(tmp_path / "old" / "year=2024" / f"{i}.parquet", start=10 * i)
    before = rk.parquet(tmp_path / "old", x="x").open()
    shutil.copytree(tmp_path / "old", tmp_path / "elsewhere" / "new")
    for path in (tmp_path / "elsewhere").rglob("*.parquet"):
        os.utime(path, (1, 1))
    after = rk.parquet(tmp_path / "elsewhere" / "new", x="x").open()
    assert after.fingerprint == before.fingerprint
    (tmp_path / "elsewhere" / "new" / "year=2024").rename(tmp_path / "elsewhere" / "new" / "year=2025")
    assert rk.parquet(tmp_path / "elsewhere" / "new", x="x").open().fingerprint != before.fingerprint


@pytest.mark.parametrize("num_files", [5, 1200])
def test_first_changed_file_is_named(num_files: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = write(tmp_path / "a.parquet", 10).read_bytes()
    (tmp_path / "data").mkdir()
    for i in range(num_files):
        (tmp_path / "data" / f"{i:04}.parquet").write_bytes(content)
    source = rk.parquet(tmp_path / "data", x="x")
    before = json.loads(json.dumps(source.open().fingerprint_parts))
    assert len(json.dumps(before)) < 1 << 14

    def changed() -> str:
        return what_changed(before, source.open()).replace(str(tmp_path / "data"), "")

    is_named = num_files == 5
    write(tmp_path / "data" / "0002.parquet", 10, start=1)
    write(tmp_path / "data" / "0003.parquet", 10, start=1)
    assert changed() == "the contents of the files changed" + ", first '/0002.parquet'" * is_named
    (tmp_path / "data" / "0001.parquet").rename(tmp_path / "data" / "0001b.parquet")
    assert changed() == "the names of the files changed" + ", first '/0001b.parquet'" * is_named
    write(tmp_path / "data" / "00000.parquet", 1)
    assert changed().startswith(f"the number of files changed from {num_files:,} to {num_files + 1:,}")
    assert changed().endswith(", first '/00000.parquet'") == is_named
    for path in sorted((tmp_path / "data").iterdir())[3:]:
        path.unlink()
    write(tmp_path / "data" / "0000.parquet", 3, more=pa.array([1, 2, 3]))
    assert "the number of files changed" in changed()


def test_change_of_columns_or_rows_is_named(tmp_path: Path) -> None:
    source = rk.parquet(write(tmp_path / "a.parquet", 10), x="x")
    before = source.open()
    assert what_changed(before.fingerprint_parts, before.slice(0, 3)) == "the selection of rows changed"
    write(tmp_path / "a.parquet", 10, more=pa.array(np.ones(10)))
    expected = f"the columns changed, first {str(tmp_path / 'a.parquet')!r}"
    assert what_changed(before.fingerprint_parts, source.open()) == expected


def test_missing_path_suggests_nearest(tmp_path: Path) -> None:
    write(tmp_path / "train" / "a.parquet")
    with pytest.raises(rk.SourceError, match=r"there is no '.*/trian'. Did you mean 'train'\?"):
        rk.parquet(tmp_path / "trian", x="x").open()


def test_empty_folder_and_glob_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path, f"{tmp_path}/*.parquet"):
        with pytest.raises(rk.SourceError, match="at least one Parquet file"):
            rk.parquet(path, x="x").open()


def test_paths_of_two_filesystems_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(write(tmp_path / "a.parquet"))
    memory = fsspec.filesystem("memory")
    memory.put(path, "/two/a.parquet")

    def read(*_: object, **__: object) -> None:
        raise AssertionError("nothing must be read")

    for paths in (["memory://two/a.parquet", path], [path, f"file://{path}", "memory://two"]):
        with monkeypatch.context() as patched:
            patched.setattr(type(memory), "info", read)
            patched.setattr(fsspec.get_filesystem_class("file"), "info", read)
            with pytest.raises(rk.SourceError, match=r"must be on one filesystem; '.*' and '.*' are not"):
                rk.parquet(paths, x="x").open()
    assert rk.parquet([path, f"file://{path}"], x="x").open().num_rows == 20
    memory.rm("/two", recursive=True)


def test_empty_list_of_paths_is_refused() -> None:
    with pytest.raises(rk.OptionError, match="at least one path; got none"):
        rk.parquet([], x="x")


def test_missing_column_suggests_nearest(tmp_path: Path) -> None:
    source = rk.parquet(write(tmp_path / "a.parquet", image=pa.array([0.0] * 10)), x="imgae")
    with pytest.raises(rk.ColumnError, match=r"got 'imgae'. Did you mean 'image'\?"):
        resolve(source, source.open())


def test_schema_mismatch_names_both_files(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet")
    write(tmp_path / "b.parquet", x=pa.array(np.ones(10, np.float64)))
    with pytest.raises(rk.ColumnError, match=r"'x' is float in .*a\.parquet and double in .*b\.parquet"):
        rk.parquet(tmp_path, x="x").open()
    assert rk.parquet(tmp_path, x="id").open().num_rows == 20  # unused columns may differ


def test_truncated_file_is_named(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet")
    broken = write(tmp_path / "b.parquet")
    broken.write_bytes(broken.read_bytes()[:-20])
    with pytest.raises(rk.SourceError, match=r"complete Parquet files; '.*b\.parquet' is not"):
        rk.parquet(tmp_path, x="x").open()


def test_damaged_page_names_row_group(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", 1000, group=500, x=pa.array(np.random.default_rng(0).random(1000)))
    metadata = pq.read_metadata(path)
    column = metadata.row_group(1).column(1)
    data = bytearray(path.read_bytes())
    at = column.dictionary_page_offset or column.data_page_offset
    data[at : at + 12] = b"\xff" * 12
    path.write_bytes(bytes(data))
    opened = rk.parquet(path, x="x").open()
    with pytest.raises(rk.SourceError, match=r"a\.parquet, row group 1 is not"):
        opened.reader.read(opened.unit(1), 0, 500, ["x"])


def test_rewritten_file_is_read_again(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet")
    opened = rk.parquet(path, x="x").open()
    assert ids(opened) == list(range(10))
    write(path, start=100)
    assert ids(opened) == list(range(100, 110))
    write(path, num_rows=9)
    with pytest.raises(rk.SourceError, match=r"a\.parquet, row group 2 had 2 rows and has 1 now"):
        ids(opened)
    write(path, num_rows=4)
    with pytest.raises(rk.SourceError, match=r"a\.parquet, row group 1"):
        ids(opened)
    path.unlink()
    with pytest.raises(rk.SourceError, match=r"a\.parquet, row group 0"):
        ids(opened)


def test_grown_row_group_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", group=4)
    opened = rk.parquet(path, x="x").open()
    write(path, num_rows=30, group=5)
    for part in (opened, opened.slice(1, 3)):
        with pytest.raises(rk.SourceError, match=r"a\.parquet, row group 0 had 4 rows and has 5 now. Start again"):
            part.reader.read(part.unit(0), 0, 2, ["id"])


def test_remote_footer_is_cached_until_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fs = fsspec.filesystem("memory")
    reads: list[int] = []  # end offsets

    class Watched(MemoryFile):  # type: ignore[misc]
        def read(self, *size: int) -> bytes:
            data = bytes(super().read(*size))
            reads.append(self.tell())
            return data

    def put(start: int) -> int:
        content = write(tmp_path / "0.parquet", start=start).read_bytes()
        fs.pipe("memory://watched/0.parquet", content)
        return len(content) - int.from_bytes(content[-8:-4], "little") - 8  # where the footer begins

    def read() -> list[int]:
        """Read with a new reader, as a task does."""
        reader = pickle.loads(pickle.dumps(opened.reader))
        return [int(v) for group in (0, 1) for v in reader.read(opened.unit(group), 0, 4, ["id"])["id"].to_numpy()]

    footer = put(0)
    opened = rk.parquet("memory://watched", x="x").open()
    original = type(fs)._open

    def watched(self: object, *args: object, **kwargs: object) -> object:
        file = original(self, *args, **kwargs)
        file.__class__ = Watched
        return file

    monkeypatch.setattr(type(fs), "_open", watched)
    assert read() == list(range(8))
    assert max(reads) > footer
    reads.clear()
    assert read() == list(range(8))
    assert reads and max(reads) <= footer
    put(100)
    assert read() == list(range(100, 108))


def test_null_names_row_group(tmp_path: Path) -> None:
    values = pa.array([1.0] * 6 + [None] + [1.0] * 3)
    path = write(tmp_path / "a.parquet", x=values)
    with pytest.raises(rk.ColumnError, match=r"column 'x' has 1 in file .*a\.parquet, row group 1"):
        rk.parquet(path, x="x").open()
    rk.parquet(path, x="x", fill={"x": 0.0}).open()
    rk.parquet(path, x="id").open()


def test_varying_list_lengths_need_pad_or_ragged(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", 3, series=pa.array([[1, 2], [3], [4, 5, 6]]))
    for source in (rk.parquet(path, x="series"),):
        with pytest.raises(rk.ColumnError, match=r"pad=\{'series': length\}"):
            opened = source.open()
            batch_spec = resolve(source, opened)
            batch_spec.decode(opened.head(3, ["series"]), "here")
    rk.parquet(path, x="series", pad={"series": 4}).open()


def test_lists_are_read_in_parts(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (900, 28, 28), np.uint8)
    numbers = [rng.integers(-9, 9, rng.integers(0, 5)).tolist() for _ in range(900)]
    columns = {
        "text": pa.array(rng.choice(["a", "b"], 900)).dictionary_encode(),
        "image": pa.FixedShapeTensorArray.from_numpy_ndarray(images),
        "my.numbers": pa.array(numbers, pa.list_(pa.int16())),
    }
    opened = rk.parquet(write(tmp_path / "0.parquet", 900, group=450, **columns), x="image").open()
    names = ["my.numbers", "id", "text", "image"]
    read = opened.reader.read(opened.unit(1), 10, 440, names)
    assert read["image"].num_chunks > 1
    assert [read[name].to_pylist() for name in names[:3]] == [
        numbers[460:890],
        list(range(460, 890)),
        columns["text"].to_pylist()[460:890],
    ]
    source = rk.parquet(tmp_path, x={"image": "image", "text": "text"})
    batch_spec = resolve(source, opened)
    image, _ = batch_spec.assemble(
        batch_spec.decode(opened.reader.read(opened.unit(1), 10, 440, batch_spec.columns), ""), ""
    )
    np.testing.assert_array_equal(image, images[460:890])


def test_unsupported_type_is_refused_if_used(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", 2, when=pa.array([1, 2], pa.timestamp("s")))
    source = rk.parquet(path, x="when")
    with pytest.raises(rk.ColumnError, match=r"'when' is timestamp\[.*\]"):
        resolve(source, source.open())
    source = rk.parquet(path, x="x")
    resolve(source, source.open())


def test_notebook_shows_options_without_credentials() -> None:
    options = {"key": "abc", "secret": "def", "anon": False}
    shown = rk.parquet("s3://me:pw@bucket/<x>", x=["a", "b"], y="c", storage_options=options)._repr_html_()
    assert "ParquetSource" in shown and "s3://***@bucket/&lt;x&gt;" in shown and "a" in shown
    assert not {"pw", "abc", "def"} & set(re.findall(r"\w+", shown))
