"""What the methods of a source return and show."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import raykeras as rk
from raykeras.data.plan import PassPlan

NUM_ROWS = 40


@pytest.fixture
def path(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (NUM_ROWS, 2, 3), np.uint8)
    table = pa.table(
        {
            "row": np.arange(NUM_ROWS),
            "value": pa.array(np.arange(NUM_ROWS) / 2, mask=np.arange(NUM_ROWS) == 1),
            "image": pa.FixedShapeTensorArray.from_numpy_ndarray(images),
            "name": [f"n{i}" for i in range(NUM_ROWS)],
            "tokens": [list(range(i % 3)) for i in range(NUM_ROWS)],
            "when": pa.array(range(NUM_ROWS), pa.date32()),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=8)
    return tmp_path / "a.parquet"


def test_head_returns_stored_rows(path: Path) -> None:
    rows = rk.parquet(path).head(10)  # of two row groups
    assert list(rows.columns) == ["row", "value", "image", "name", "tokens", "when"]
    assert rows["row"].dtype == np.int64 and rows["row"].tolist() == list(range(10))
    assert rows["value"][0] == 0 and rows["value"][1] is None
    assert rows["image"][3].shape == (2, 3) and rows["image"][3].dtype == np.uint8
    assert rows["name"].tolist() == [f"n{i}" for i in range(10)]
    assert rows["tokens"][2].tolist() == [0, 1]
    assert len(rk.parquet(path).head(1000)) == NUM_ROWS
    with pytest.raises(rk.OptionError, match="`num_rows` must be a whole number of at least 1"):
        rk.parquet(path).head(0)


def test_schema_has_all_columns(path: Path) -> None:
    schema = rk.parquet(path, x="row").schema
    assert {name: (field.kind, field.dtype, field.shape) for name, field in schema.items()} == {
        "row": ("dense", "int64", ()),
        "value": ("dense", "float64", ()),
        "image": ("dense", "uint8", (2, 3)),
        "name": ("string", "string", ()),
        "tokens": ("list", "int64", ()),
        "when": ("dense", "arrow:date32[day]", ()),
    }


@pytest.mark.parametrize("shuffle", [True, False, 16])
def test_batch_is_the_first_that_fit_trains_on(path: Path, shuffle: bool | int) -> None:
    source = rk.parquet(path, x="row", y=["row", "row"])
    x, y = source.batch(12, shuffle=shuffle, seed=3)
    order = "shuffled" if shuffle else "source"
    window_rows = shuffle if type(shuffle) is int else 1 << 14
    plan = PassPlan(
        source.open().unit_rows,
        global_batch_size=12,
        window_rows=window_rows,
        order=order,
        seed=3,  # type: ignore[arg-type]
    )
    assert x.tolist() == plan.batch_rows(0).tolist()
    assert y.shape == (12, 2) and y[:, 1].tolist() == x.tolist()


def test_batch_has_the_structure_of_the_specs(path: Path) -> None:
    source = rk.parquet(
        path,
        x={"picture": "image", "words": "tokens", "name": "name"},
        y="value",
        sample_weight="row",
        ragged=["tokens"],
        fill={"value": -1},
    )
    x, y, weight = source.batch(5, shuffle=False)
    assert x["picture"].shape == (5, 2, 3) and x["picture"].dtype == np.uint8
    assert [row.tolist() for row in x["words"]] == [[], [0], [0, 1], [], [0]]
    assert x["name"].tolist() == [b"n0", b"n1", b"n2", b"n3", b"n4"]
    assert y.tolist() == [0, -1, 1, 1.5, 2] and y.dtype == np.float32
    assert weight.tolist() == [0, 1, 2, 3, 4] and weight.dtype == np.float32
    assert len(rk.parquet(path, x="row").batch(5)) == 1


def test_batch_is_transformed(path: Path) -> None:
    def add_noise(columns: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
        return {"x": columns["row"] + rng.uniform(0, 0.5, len(columns["row"]))}

    source = rk.parquet(path, x="x", transform=add_noise, columns=["row"])
    (first,), (again,) = source.batch(8), source.batch(8)
    assert first.dtype == np.float32 and (first == again).all() and (first % 1 != 0).any()


def test_batch_reads_without_ray_and_tensorflow(path: Path) -> None:
    code = (
        f"import sys, raykeras as rk; source = rk.parquet({str(path)!r}, x='row'); source.batch(); source.head(); "
        "print(source, [m for m in ('ray', 'tensorflow', 'keras') if m in sys.modules])"
    )
    root = Path(rk.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.rstrip().endswith("[]")


def test_batch_of_npy_files(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.arange(6.0).reshape(3, 2))
    (x,) = rk.npy(str(tmp_path / "x.npy")).batch(2, shuffle=False)
    assert x.tolist() == [[0, 1], [2, 3]]


def test_print_shows_columns_and_roles(path: Path) -> None:
    lines = str(rk.parquet(path, x={"i": "image"}, y="row", sample_weight="row")).splitlines()
    assert lines[0] == "ParquetSource: 40 rows, 1 file"
    rows = [" ".join(line.split()) for line in lines]
    assert "image image 2×3, uint8 x" in rows
    assert "row integer, int64 y, sample_weight" in rows
    assert "when not usable: date32[day]" in rows


def test_repr_reads_nothing() -> None:
    source = rk.parquet("s3://me:pw@bucket/a", x="a", storage_options={"secret": "abc"}, transform=len)  # type: ignore[arg-type]
    assert repr(source) == (
        "ParquetSource(x='a', transform='len', paths=['s3://***@bucket/a'], storage_options={'secret': '***'})"
    )
    assert str(source).startswith("ParquetSource: `source.schema` reads its columns")


def test_source_that_cannot_be_read_is_shown(tmp_path: Path) -> None:
    source = rk.parquet(tmp_path / "none.parquet", x="a")
    assert "there is no" in str(source).splitlines()[0]
    assert "there is no" in source._repr_html_()


def test_hostile_names_are_shown_safely(tmp_path: Path) -> None:
    name = "<b>\x1b[31m\nred"
    pq.write_table(pa.table({name: [1, 2]}), tmp_path / "a.parquet")
    source = rk.parquet(tmp_path, x=name)
    assert "<b>�[31m�red" in str(source)
    assert "\x1b" not in str(source) + repr(source) + source._repr_html_()
    assert "&lt;b&gt;" in source._repr_html_()


def test_many_columns_are_cut(tmp_path: Path) -> None:
    pq.write_table(pa.table({f"c{i}": [1] for i in range(100)}), tmp_path / "a.parquet")
    assert "and 60 more" in str(rk.parquet(tmp_path, x="c1"))
