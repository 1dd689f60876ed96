"""Output of `predict` is complete or marked as incomplete."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import raykeras as rk
from raykeras.core import storage_errors
from raykeras.data.sources.parquet_markers import INCOMPLETE, SUCCESS
from raykeras.driver.output import open_output
from tests.support.s3 import S3

NUM_PARTS, ROWS = 5, 10


@pytest.fixture(autouse=True)
def fail_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not pause between attempts; limit s3fs to one attempt."""
    monkeypatch.setattr("s3fs.core.S3FileSystem.retries", 1)
    monkeypatch.setattr(storage_errors, "READ_PAUSES_S", (0.0, 0.0))


def tables(num_parts: int = NUM_PARTS) -> Iterator[pa.Table]:
    for part in range(num_parts):
        yield pa.table({"prediction": [float(part)] * ROWS})


def names(url: str) -> list[str]:
    fs, path = fsspec.core.url_to_fs(url, use_listings_cache=False)
    return sorted(found[len(path) :].strip("/") for found in fs.find(path))


def parts(num_parts: int = NUM_PARTS) -> list[str]:
    return [f"part-{part:06d}.parquet" for part in range(num_parts)]


def num_rows(url: str) -> int:
    return int(rk.parquet(url, x="prediction").open().unit_rows.sum())


def test_complete_output_has_success_marker(bucket: str, tmp_path: Path) -> None:
    for path in (f"{bucket}/out", str(tmp_path / "out")):
        output = open_output(path)
        output.write(tables())
        assert output.path == path
        assert names(path) == sorted([SUCCESS, *parts()])
        assert num_rows(path) == NUM_PARTS * ROWS
        with pytest.raises(rk.OptionError, match="must be a new or empty folder"):
            open_output(path)
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("fault", ["unavailable", "dropped", "applied"])
@pytest.mark.parametrize("name", ["part-000002", SUCCESS, INCOMPLETE])
def test_temporary_failure_is_retried(bucket: str, s3_server: S3, fault: str, name: str) -> None:
    with s3_server.failing(fault, path=f"out/{name}", last=2) as failing:
        open_output(f"{bucket}/out").write(tables())
    assert failing.num_requests > 2
    assert names(f"{bucket}/out") == sorted([SUCCESS, *parts()])


@pytest.mark.parametrize("fault", ["denied", "unavailable"])
@pytest.mark.parametrize(("name", "num_written"), [("part-000003", 3), (SUCCESS, NUM_PARTS)])
def test_incomplete_output_is_marked_refused_and_replaced(
    bucket: str, s3_server: S3, fault: str, name: str, num_written: int
) -> None:
    url = f"{bucket}/out"
    with s3_server.failing(fault, method="PUT", path=f"out/{name}"), pytest.raises(rk.RaykerasError) as raised:
        open_output(url).write(tables())
    assert type(raised.value) is not rk.OptionError
    assert f"{num_written} parts with the first {num_written * ROWS} rows" in str(raised.value)
    assert "again with the same `output`" in str(raised.value)
    assert names(url) == sorted([INCOMPLETE, *parts(num_written)])
    for path in (url, bucket, f"{url}/*.parquet", f"{bucket}/o*"):
        with pytest.raises(rk.SourceError, match=r"must be complete.*out' contains '_INCOMPLETE' but no"):
            rk.parquet(path, x="prediction").open()
    open_output(url).write(tables(2))
    assert names(url) == sorted([SUCCESS, *parts(2)])
    assert num_rows(url) == 2 * ROWS


def test_output_with_success_marker_is_complete(bucket: str, s3_server: S3) -> None:
    """Even if the marker of incomplete output could not be removed."""
    url = f"{bucket}/out"
    with s3_server.failing("denied", method="DELETE"):
        open_output(url).write(tables())
    assert INCOMPLETE in names(url)
    assert num_rows(url) == NUM_PARTS * ROWS
    with pytest.raises(rk.OptionError, match="must be a new or empty folder"):
        open_output(url)


def test_other_files_are_never_replaced(bucket: str) -> None:
    fs, folder = fsspec.core.url_to_fs(f"{bucket}/out", use_listings_cache=False)
    for present in (["notes.txt"], ["part-000000.parquet"], [INCOMPLETE, "notes.txt"], [INCOMPLETE, SUCCESS]):
        for name in present:
            fs.pipe_file(f"{folder}/{name}", b"mine")
        with pytest.raises(rk.OptionError, match="must be a new or empty folder"):
            open_output(f"{bucket}/out")
        assert names(f"{bucket}/out") == sorted(present)
        fs.rm(folder, recursive=True)


def test_failed_prediction_leaves_nothing(bucket: str, tmp_path: Path) -> None:
    def failing() -> Iterator[pa.Table]:
        yield from tables(2)
        raise LookupError("in the model")

    for path in (f"{bucket}/out", str(tmp_path / "out")):
        with pytest.raises(LookupError, match="in the model"):
            open_output(path).write(failing())
        assert names(path) == []
    assert os.listdir(tmp_path) == []


def test_concurrent_call_with_same_output_is_detected(bucket: str) -> None:
    url = f"{bucket}/out"

    def interrupted() -> Iterator[pa.Table]:
        yield from tables(4)
        open_output(url).write(tables(3))

    with pytest.raises(rk.RaykerasError, match="Two calls must not write to the same `output`"):
        open_output(url).write(interrupted())


def test_local_parts_are_hidden_until_output_is_complete(tmp_path: Path) -> None:
    pq.write_table(next(tables()), tmp_path / "a.parquet")

    def watched() -> Iterator[pa.Table]:
        yield from tables(2)
        assert num_rows(str(tmp_path)) == ROWS

    open_output(str(tmp_path / "out")).write(watched())
    assert num_rows(str(tmp_path)) == 3 * ROWS
