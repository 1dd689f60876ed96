"""What is found in sources: figures from footers and samples, and warnings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import raykeras as rk
from raykeras.data.inspection import inspect_source
from raykeras.data.sources.base import Field
from raykeras.data.storage_warnings import storage_warnings


def write(path: Path, table: pa.Table | dict[str, object], **options: object) -> Path:
    pq.write_table(pa.table(table) if isinstance(table, dict) else table, path, **options)
    return path


def test_figures_equal_those_of_all_rows(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values, is_null = rng.integers(-50, 50, 5000), rng.random(5000) < 0.1
    table = pa.table(
        {"a": pa.array(values, mask=is_null), "flag": values > 0, "f": pa.array(rng.random(5000), pa.float32())}
    )
    for name, statistics in (("with", True), ("without", False)):
        path = write(tmp_path / f"{name}.parquet", table, row_group_size=500, write_statistics=statistics)
        a = inspect_source(rk.parquet(path)).column("a")
        kept = values[~is_null]
        if statistics:
            assert (a.num_nulls, a.range) == (is_null.sum(), (kept.min(), kept.max()))
            assert (a.nulls_from, a.range_from) == ("footers", "footers")
        else:
            assert a.num_nulls is not None and 0 < a.num_nulls < is_null.sum()
            assert (a.nulls_from, a.range_from) == ("sample", "sample")


def test_small_sources_are_read_completely(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"a": [3, None, 3, 1]}, write_statistics=False)
    a = inspect_source(rk.parquet(path)).column("a")
    assert (a.num_nulls, a.range, a.num_distinct, a.examples) == (1, (1, 3), 2, (3, 1))
    assert a.nulls_from == "all rows"


def test_kinds_in_plain_words(tmp_path: Path) -> None:
    def tensor(*shape: int, dtype: str = "uint8") -> pa.Array:
        return pa.FixedShapeTensorArray.from_numpy_ndarray(np.zeros((2, *shape), dtype))

    columns = {
        "gray": (tensor(8, 8), "image 8×8, uint8"),
        "rgb": (tensor(8, 8, 3, dtype="float32"), "image 8×8×3, float32"),
        "matrix": (tensor(4, 6, dtype="float32"), "matrix 4×6, float32"),
        "vector": (pa.array([[1.0, 2.0]] * 2, pa.list_(pa.float64(), 2)), "vector 2, float64"),
        "clip": (tensor(2, 8, 8, 3), "tensor 2×8×8×3, uint8"),
        "flag": ([True, False], "true or false"),
        "count": (pa.array([1, 2], pa.uint8()), "integer, uint8"),
        "price": ([0.5, 1.5], "number, float64"),
        "name": (["a", "b"], "text"),
        "group": (pa.array(["a", "b"]).dictionary_encode(), "text"),
        "raw": ([b"a", b"b"], "bytes"),
        "even": ([[1, 2], [3, 4]], "lists of 2 int64"),
        "ragged": ([[1], [1, 2, 3]], "lists of 1 to 3 int64"),
        "pair": ([{"a": 1}, None], "not usable: struct<a: int64>"),
    }
    path = write(tmp_path / "a.parquet", {name: column for name, (column, _) in columns.items()})
    found = inspect_source(rk.parquet(path))
    assert {c.name: c.kind for c in found.columns} == {name: kind for name, (_, kind) in columns.items()}


def test_odd_columns_do_not_hide_others(tmp_path: Path) -> None:
    nan, inf = float("nan"), float("inf")
    table = {
        "nothing": [None, None, None],
        "empty": [[], [], []],
        "null_lists": [None, [1], []],
        "nested": [{"a": [1]}, None, {"a": []}],
        "map": pa.array([[("k", 1)]] * 3, pa.map_(pa.string(), pa.int64())),
        "extreme": [inf, -inf, nan],
        "huge": pa.array([0, 2**64 - 1, 5], pa.uint64()),
    }
    found = inspect_source(rk.parquet(write(tmp_path / "a.parquet", table)))
    assert found.column("huge").range == (0, 2**64 - 1)
    assert found.column("extreme").range is None and found.column("extreme").num_not_finite == 3
    assert found.column("null_lists").num_nulls == 1
    assert [c.name for c in found.columns if not c.is_usable] == ["nothing", "empty", "nested", "map"]
    assert any("Null lists cannot be used" in warning for warning in found.warnings)


def test_unreadable_columns_are_explained(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"x": [1, 2], "y": [1, 2], "z": [1, 2]})
    write(tmp_path / "b.parquet", {"x": ["a"], "z": [3]})
    write(tmp_path / "c.parquet", {"x": pa.array([], pa.int64()), "z": pa.array([], pa.int64())})
    found = inspect_source(rk.parquet(tmp_path))
    assert {c.name: c.is_usable for c in found.columns} == {"x": False, "y": False, "z": True}
    assert "int64 in" in found.column("x").note and "missing in" in found.column("y").note
    assert "1 of 3 files have no rows." in found.warnings


def test_columns_of_the_same_name_are_refused(tmp_path: Path) -> None:
    table = pa.table([pa.array([1]), pa.array([2]), pa.array([3])], names=["x", "x", "y"])
    path = write(tmp_path / "a.parquet", table)
    assert "2 are named 'x'" in inspect_source(rk.parquet(path)).column("x").note
    with pytest.raises(rk.ColumnError, match="2 are named 'x'"):
        rk.parquet(path, x="x").open()
    rk.parquet(path, x="y").open()


def test_damaged_row_group_affects_only_its_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"x": np.arange(100), "y": np.arange(100)}, compression="none")
    content = path.read_bytes()
    path.write_bytes(content[:8] + b"\xff" * 64 + content[72:])
    found = inspect_source(rk.parquet(path))
    assert not found.column("x").is_usable and "truncated or corrupt" in found.column("x").note
    assert found.column("y").is_usable and found.column("y").examples == (0, 1, 2)


def test_two_thousand_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {f"c{i}": [i, i + 1] for i in range(2000)})
    found = inspect_source(rk.parquet(path))
    assert len(found.columns) == 2000 and found.column("c1999").range == (1999, 2000)


def test_sample_reads_only_the_first_rows_of_large_row_groups(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"x": np.arange(100_000), "l": [[i] for i in range(100_000)]})
    found = inspect_source(rk.parquet(path))
    assert found.num_sampled_rows == 128
    assert found.column("x").range == (0, 99_999) and found.column("x").examples == (0, 1, 2)
    opened = rk.parquet(path).open()
    read = opened.reader.read(opened.unit(0), 20, 500, ["x", "l"])
    assert read["x"].to_pylist() == list(range(20, 500)) and read["l"].to_pylist()[-1] == [499]


def test_partitions_are_columns(tmp_path: Path) -> None:
    for year in (2023, 2024):
        (tmp_path / f"year={year}").mkdir()
        write(tmp_path / f"year={year}" / "a.parquet", {"x": [1.5]})
    year_column = inspect_source(rk.parquet(tmp_path)).column("year")
    assert (year_column.kind, year_column.range, year_column.num_distinct) == ("integer, int64", (2023, 2024), 2)


def test_npy_and_archives_are_inspected(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.ones((3, 2)), y=np.array([0, 1, 1]))
    found = inspect_source(rk.npy(str(tmp_path / "a.npz"), x=()))
    assert [(c.name, c.kind, c.range) for c in found.columns] == [
        ("x", "vector 2, float64", (1, 1)),
        ("y", "integer, int64", (0, 1)),
    ]


def test_balance_counts_all_rows(tmp_path: Path) -> None:
    labels = np.repeat([2, 0, 1], [500, 300, 200])
    path = write(tmp_path / "a.parquet", {"label": labels, "x": [[1]] * 1000}, row_group_size=100)
    found = inspect_source(rk.parquet(path))
    counts = found.balance("label")
    assert dict(counts.counts) == {2: 500, 0: 300, 1: 200} and list(counts.counts) == [2, 0, 1]
    assert counts.is_complete and not counts.is_sorted
    write(path, {"label": np.sort(labels), "x": [[1]] * 1000}, row_group_size=100)
    assert inspect_source(rk.parquet(path)).balance("label").is_sorted
    with pytest.raises(rk.ColumnError, match="one number or text per row"):
        found.balance("x")
    with pytest.raises(rk.ColumnError, match="Did you mean 'label'"):
        found.balance("labels")


def test_balance_of_text_with_nulls(tmp_path: Path) -> None:
    column = pa.array(["a", None, "b", "a"]).dictionary_encode()
    counts = inspect_source(rk.parquet(write(tmp_path / "a.parquet", {"c": column}))).balance("c")
    assert dict(counts.counts) == {"a": 2, "b": 1} and counts.num_nulls == 1


def opened_with(rows: list[list[int]]) -> object:
    """Return an open source of files with row groups of these rows."""
    from raykeras.data.sources.base import OpenSource

    groups = [n for file in rows for n in file]
    return OpenSource(
        reader=None,  # type: ignore[arg-type]
        fields={"x": Field("x", "dense", "float32")},
        files=tuple(f"{i}.parquet" for i in range(len(rows))),
        unit_file=np.repeat(np.arange(len(rows)), [len(file) for file in rows]),
        unit_group=np.arange(len(groups)),
        unit_start=np.zeros(len(groups), np.int64),
        unit_rows=np.array(groups),
        fingerprint="",
    )


@pytest.mark.parametrize(
    ("rows", "nbytes", "warnings"),
    [
        ([[100] * 10], [1 << 20] * 10, []),
        ([[100]], [1 << 10], []),
        ([[100] * 10], [1 << 30] * 10, ["too large to shuffle"]),
        ([[100, 100]], [1 << 25] * 2, ["too few row groups (2)"]),
        ([[10] * 2000], [1 << 10] * 2000, ["too small to read fast"]),
        ([[10], [10], [10], [1000]], [1 << 10] * 4, ["Files are skewed: '3.parquet' has 97%"]),
        ([[10], [0]], [1 << 10] * 2, ["1 of 2 files have no rows"]),
    ],
)
def test_unfavorable_sizes_are_warned_about(rows: list[list[int]], nbytes: list[int], warnings: list[str]) -> None:
    found = storage_warnings(opened_with(rows), np.array(nbytes))  # type: ignore[arg-type]
    assert len(found) == len(warnings)
    assert all(expected in warning for expected, warning in zip(warnings, found, strict=True))
