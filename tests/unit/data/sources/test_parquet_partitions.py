"""Folder names become the same columns as in `pyarrow.dataset`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest

import raykeras as rk
from raykeras.data.resolve import resolve
from raykeras.data.sources.base import OpenSource

NULL = "__HIVE_DEFAULT_PARTITION__"


def write(folder: Path, *values: str, key: str = "key") -> Path:
    for value in values:
        (folder / f"{key}={value}").mkdir(parents=True)
        pq.write_table(pa.table({"x": [1.0]}), folder / f"{key}={value}" / "0.parquet")
    return folder


def column(opened: OpenSource, name: str = "key") -> list[Any]:
    return [opened.reader.read(opened.unit(i), 0, n, [name])[name].tolist()[0] for i, n in enumerate(opened.unit_rows)]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["-5", "0", "3"], [-5, 0, 3]),
        (["007", "10"], [7, 10]),
        (["-07", "-0"], [-7, 0]),
        (["1", "a"], ["1", "a"]),
        (["1.5", "2"], ["1.5", "2"]),
        (["+1", "2"], ["+1", "2"]),
        (["", "2"], ["", "2"]),
        (["-"], ["-"]),
        (["--1", "2"], ["--1", "2"]),
        (["²", "٣"], ["²", "٣"]),  # digits to `str.isdigit`
        (["a%2Fb", "c%20d"], ["a/b", "c d"]),
        (["%C3%A4", "a+b"], ["ä", "a+b"]),
        (["1%30", "2"], [10, 2]),
        (["100%", "2"], ["100%", "2"]),
        (["true", "false"], ["true", "false"]),
    ],
)
def test_values_match_pyarrow(values: list[str], expected: list[Any], tmp_path: Path) -> None:
    opened = rk.parquet(write(tmp_path, *values), x="x", y="key").open()
    assert sorted(column(opened)) == sorted(expected)
    assert opened.fields["key"].dtype == ("int64" if isinstance(expected[0], int) else "string")
    oracle = pa.dataset.dataset(tmp_path, partitioning="hive").to_table()["key"].to_pylist()
    assert sorted(column(opened)) == sorted(oracle)


def test_integers_are_int64(tmp_path: Path) -> None:
    """`pyarrow.dataset` reads them as int32, and larger ones as text."""
    values = [str(-(2**63)), str(2**63 - 1), "20240229123000"]
    opened = rk.parquet(write(tmp_path / "a", *values), x="key").open()
    assert sorted(map(str, column(opened))) == sorted(values)
    assert opened.fields["key"].dtype == "int64"
    opened = rk.parquet(write(tmp_path / "b", str(2**63), "1"), x="key").open()
    assert opened.fields["key"].dtype == "string"


def test_encoded_key_is_decoded(tmp_path: Path) -> None:
    opened = rk.parquet(write(tmp_path, "1", key="a%20b"), x="a b").open()
    assert column(opened, "a b") == [1]


def test_undecodable_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(rk.SourceError, match=r"must be UTF-8 .* those of '.*key=%FF/0\.parquet' are not"):
        rk.parquet(write(tmp_path, "%FF"), x="x").open()


@pytest.mark.parametrize(
    ("values", "fill", "expected"),
    [
        ([NULL, "3"], 7, [3, 7]),
        ([NULL, "a"], "b", ["a", "b"]),
        ([NULL], np.int32(7), [7]),
        ([NULL], "b", ["b"]),
        (["%5F_HIVE_DEFAULT_PARTITION__", "3"], -1, [-1, 3]),
    ],
)
def test_null_is_filled(values: list[str], fill: Any, expected: list[Any], tmp_path: Path) -> None:
    write(tmp_path, *values)
    message = rf"must not contain nulls; 'key' of .*/0\.parquet is {NULL}. Pass `fill=\{{'key': "
    with pytest.raises(rk.SourceError, match=message):
        rk.parquet(tmp_path, x="key").open()
    with pytest.raises(rk.SourceError, match=message):  # as for columns that are written with predictions
        rk.parquet(tmp_path, x="x").open().field("key")
    source = rk.parquet(tmp_path, x="key", fill={"key": fill})
    opened = source.open()
    assert sorted(column(opened)) == expected
    batch_spec = resolve(source, opened)
    batch_spec.assemble(batch_spec.decode(opened.head(1, ["key"]), ""), "")


@pytest.mark.parametrize(("values", "fill"), [([NULL, "3"], "a"), ([NULL, "3"], 0.5), ([NULL, "a"], 1)])
def test_fill_of_wrong_type_is_refused(values: list[str], fill: Any, tmp_path: Path) -> None:
    with pytest.raises(rk.SourceError, match="`fill` must have a value of the column's type; partition 'key' contains"):
        rk.parquet(write(tmp_path, *values), x="key", fill={"key": fill}).open()


def test_file_without_partition_is_named(tmp_path: Path) -> None:
    write(tmp_path, "1")
    pq.write_table(pa.table({"x": [1.0]}), tmp_path / "loose.parquet")
    with pytest.raises(rk.SourceError, match=r"'key' is in the names of other folders, but not in .*/loose\.parquet"):
        rk.parquet(tmp_path, x="key").open()
    assert rk.parquet(tmp_path, x="x").open().num_rows == 2
