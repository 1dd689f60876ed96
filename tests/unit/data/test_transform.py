"""A transform receives every usable column, and a column that it does not request never fails a run."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import raykeras as rk
from raykeras.data.plan import PassPlan
from raykeras.data.resolve import resolve
from raykeras.data.sources.base import Source
from raykeras.data.streaming.cache import CachedRows
from raykeras.data.streaming.reader import gather_tasks, read_windows

Columns = dict[str, np.ndarray]

NUM_ROWS, GROUP = 8, 4
TABLE = pa.table(
    {
        "x": np.arange(float(NUM_ROWS)),
        "ragged": [[1]] * 7 + [[1, 2]],
        "uneven": [[1], [2, 3, 4], [1, 2], [1, 2], *[[1, 2]] * 4],  # two values on average
        "when": pa.array(range(NUM_ROWS), pa.timestamp("s")),
        "null": [*[1.0] * 7, None],
    }
)
CANNOT = {
    "ragged": r"have 1\.25 values .*row group 1 and 1 in .*row group 0. Pass `pad=\{'ragged': length\}`",
    "uneven": r"'uneven' has a list of 1 values and others of 2 .*Pass `pad=\{'uneven': length\}`",
    "when": r"'when' is timestamp\[ms\]",
    "null": r"'null' has 1 in .*row group 1. Pass `fill=\{'null': value\}`",
}


def write(folder: Path, table: pa.Table = TABLE, name: str = "a.parquet", **options: Any) -> Path:
    pq.write_table(table, folder / name, row_group_size=GROUP, **options)
    return folder


def x_of(source: Source, held: bool = False) -> np.ndarray:
    """Return all of x as a run of one rank reads it, in source order."""
    opened = source.open()
    batch_spec = resolve(source, opened)
    plan = PassPlan(opened.unit_rows, global_batch_size=4, window_rows=4, order="source")
    if held:
        opened, batch_spec = CachedRows(opened, batch_spec).source(batch_spec)
    tasks = gather_tasks(((0, window) for window in plan.windows(0, 1)), opened, 1 << 30)
    reader = pickle.loads(pickle.dumps(opened.reader))
    return np.concatenate([read_windows(reader, batch_spec, task)[0] for task in tasks])


def unchanged(columns: Columns) -> Columns:
    return columns


def doubled(columns: Columns) -> Columns:
    return {"z": 2 * columns["x"]}


def asks(name: str) -> Any:
    def asking(columns: Columns) -> Columns:
        return {"z": columns[name]}

    return asking


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("write_statistics", [True, False])
@pytest.mark.parametrize("transform", [doubled, unchanged])
def test_unused_column_never_fails(transform: Any, write_statistics: bool, held: bool, tmp_path: Path) -> None:
    write(tmp_path, write_statistics=write_statistics)
    x = "z" if transform is doubled else "x"
    expected = np.arange(NUM_ROWS) * (2 if transform is doubled else 1)
    np.testing.assert_array_equal(x_of(rk.parquet(tmp_path, x=x, transform=transform), held), expected)


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("write_statistics", [True, False])
@pytest.mark.parametrize("name", CANNOT)
def test_requested_unusable_column_is_explained(name: str, write_statistics: bool, held: bool, tmp_path: Path) -> None:
    write(tmp_path, write_statistics=write_statistics)
    asked = rf"`transform` 'asks.<locals>.asking' requested column '{name}' in file .*a\.parquet, row group \d"
    with pytest.raises(rk.ColumnError, match=rf"{asked}.*which cannot be used: .*{CANNOT[name]}"):
        x_of(rk.parquet(tmp_path, x="z", transform=asks(name)), held)


@pytest.mark.parametrize("write_statistics", [True, False])
@pytest.mark.parametrize("name", CANNOT)
def test_used_unusable_column_is_explained(name: str, write_statistics: bool, tmp_path: Path) -> None:
    write(tmp_path, write_statistics=write_statistics)
    with pytest.raises(rk.ColumnError, match=CANNOT[name]):
        x_of(rk.parquet(tmp_path, x=name, transform=unchanged))


def test_transform_gets_only_selected_columns(tmp_path: Path) -> None:
    seen = set()

    def sees(columns: Columns) -> Columns:
        seen.update(columns)
        return {"z": columns["x"]}

    source = rk.parquet(write(tmp_path), x="z", transform=sees)
    opened = source.open()
    batch_spec = resolve(source, opened)
    assert seen == {"x"}
    assert batch_spec.columns == ["uneven", "x"]  # that its lengths differ is only discovered on reading
    seen.clear()
    source = rk.parquet(tmp_path, x="z", transform=sees, columns=["x", "null"], fill={"null": 0.0})
    assert resolve(source, source.open()).columns == ["x", "null"]
    assert seen == {"x", "null"}


def test_pad_and_fill_make_columns_available(tmp_path: Path) -> None:
    def stacked(columns: Columns) -> Columns:
        return {"z": columns["ragged"] + columns["null"][:, None]}

    source = rk.parquet(write(tmp_path), x="z", transform=stacked, pad={"ragged": 2, "uneven": 2}, fill={"null": 5.0})
    np.testing.assert_array_equal(x_of(source), [[2, 1]] * 7 + [[6, 7]])


@pytest.mark.parametrize("name", CANNOT)
def test_chosen_column_must_be_usable(name: str, tmp_path: Path) -> None:
    with pytest.raises(rk.ColumnError, match=CANNOT[name]):
        x_of(rk.parquet(write(tmp_path), x="z", transform=doubled, columns=["x", name]))


def test_unknown_columns_suggest_nearest(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(rk.ColumnError, match=r"got 'nul'. Did you mean 'null'\?"):
        x_of(rk.parquet(tmp_path, x="z", transform=doubled, columns=["x", "nul"]))
    message = r"requested column 'xx' in .*which is not among its columns. Did you mean 'x'\? Columns: x\."
    with pytest.raises(rk.ColumnError, match=message):
        x_of(rk.parquet(tmp_path, x="z", transform=asks("xx"), columns=["x"]))


def test_transform_may_handle_missing_column(tmp_path: Path) -> None:
    def careful(columns: Columns) -> Columns:
        assert "ragged" not in columns
        assert columns.get("ragged") is None
        try:
            columns["ragged"]
        except KeyError:
            return {"z": columns["x"]}
        raise AssertionError

    np.testing.assert_array_equal(x_of(rk.parquet(write(tmp_path), x="z", transform=careful)), np.arange(NUM_ROWS))


def test_files_may_differ_in_unused_columns(tmp_path: Path) -> None:
    write(tmp_path)
    write(tmp_path, TABLE.set_column(4, "null", pa.array(["a"] * NUM_ROWS)), name="b.parquet")
    assert len(x_of(rk.parquet(tmp_path, x="z", transform=doubled))) == 2 * NUM_ROWS
    with pytest.raises(rk.ColumnError, match=r"'null' is double in .*a\.parquet and string in .*b\.parquet"):
        x_of(rk.parquet(tmp_path, x="z", transform=asks("null")))


def test_differing_list_lengths_across_row_groups_are_detected(tmp_path: Path) -> None:
    """Lengths are unknown where the statistics were not checked."""
    source = rk.parquet(write(tmp_path, pa.table({"x": np.arange(8.0), "l": [[1]] * 4 + [[1, 2]] * 4})), x="z")
    opened = rk.parquet(tmp_path, x="x").open()
    for transform, raised in ((doubled, False), (asks("l"), True)):
        source = rk.parquet(tmp_path, x="z", transform=transform)
        batch_spec = resolve(source, opened)
        plan = PassPlan(opened.unit_rows, global_batch_size=8, window_rows=8, order="source")
        task = next(gather_tasks(((0, window) for window in plan.windows(0, 1)), opened, 1 << 30))
        if raised:
            with pytest.raises(rk.ColumnError, match=r"'l' has lists of 1 and of 2 values. Pass `pad=\{'l': length\}`"):
                read_windows(opened.reader, batch_spec, task)
        else:
            read_windows(opened.reader, batch_spec, task)


@pytest.mark.parametrize(
    "options", [{"columns": ["x"]}, {"columns": "x", "transform": doubled}, {"columns": [], "transform": doubled}]
)
def test_invalid_columns_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(rk.OptionError, match="`columns`"):
        rk.parquet("a.parquet", x="x", **options)


def test_errors_name_transform_file_and_row_group(tmp_path: Path) -> None:
    def fails(columns: Columns) -> Columns:
        if columns["x"][0] >= GROUP:
            raise ZeroDivisionError("no")
        return columns

    def shortens(columns: Columns) -> Columns:
        return {"x": columns["x"][: 4 if columns["x"][0] < GROUP else 3]}

    def returns_none(columns: Columns) -> Any:
        return columns if columns["x"][0] < GROUP else None

    write(tmp_path, TABLE.select(["x"]))
    where = r"file .*a\.parquet, row group 1"
    for transform, error, message in (
        (fails, rk.UserCodeError, rf"`transform` '.*fails' raised ZeroDivisionError in {where}: no"),
        (shortens, rk.ColumnError, rf"'.*shortens' got 4 and returned 3 for 'x' in {where}"),
        (returns_none, rk.ColumnError, rf"'.*returns_none' returned NoneType in {where}"),
    ):
        with pytest.raises(error, match=message):
            x_of(rk.parquet(tmp_path, x="x", transform=transform))


def test_columns_select_keys_of_archive(tmp_path: Path) -> None:
    arrays = {"x_train": np.arange(4.0), "y_train": np.zeros(4), "x_test": np.arange(2.0)}
    np.savez(tmp_path / "a.npz", **arrays, objects=np.array([{}], object))
    source = rk.npy(
        tmp_path / "a.npz", x="z", transform=lambda c: {"z": 2 * c["x_train"]}, columns=["x_train", "y_train"]
    )
    np.testing.assert_array_equal(x_of_arrays(source), [0, 2, 4, 6])
    with pytest.raises(rk.ColumnError, match=r"got 'x_trian'. Did you mean 'x_train'\?"):
        rk.npy(tmp_path / "a.npz", x="z", transform=doubled, columns=["x_trian"]).open()
    with pytest.raises(rk.OptionError, match="`columns` names keys"):
        rk.npy(str(tmp_path / "x.npy"), transform=doubled, columns=["x"])


def x_of_arrays(source: Source) -> np.ndarray:
    opened = source.open()
    batch_spec = resolve(source, opened)
    columns = batch_spec.decode(opened.head(100, batch_spec.columns), "here")
    return batch_spec.assemble(batch_spec.apply_transform(columns, (0,), "here"), "here")[0]
