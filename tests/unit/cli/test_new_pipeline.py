"""The pipeline files that `raykeras new` writes; `tests/integration/test_new.py` trains them."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

import raykeras as rk
from raykeras.cli.main import main
from raykeras.cli.pipeline import Pipeline
from raykeras.cli.target import target_of
from raykeras.data.inspection import inspect_source


def new(*arguments: object) -> Any:
    return CliRunner().invoke(main, ["new", *map(str, arguments)])


def pipeline_of(path: Path) -> Pipeline:
    """Run a pipeline file, without Ray."""
    names: dict[str, Any] = {"__name__": "new_pipeline"}
    exec(compile(path.read_text(), str(path), "exec"), names)
    return names["pipeline"]()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = np.arange(60)
    table = pa.table(
        {
            "age": pa.array(rows % 7, mask=rows == 3),
            "fare": np.where(rows == 4, np.nan, rows / 2),
            "city": np.array(["b", "a"])[rows % 2],
            "comment": [f"text {i}" for i in rows],
            "image": pa.FixedShapeTensorArray.from_numpy_ndarray(np.full((60, 8, 8), 16, np.uint8)),
            "species": np.array(["gentoo", "adelie", "chinstrap"])[rows % 3],
        }
    )
    pq.write_table(table, tmp_path / "birds.parquet", row_group_size=10)
    return tmp_path / "birds.parquet"


def test_file_is_readable_and_says_what_to_do(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = new("birds", "--data", "birds.parquet", "--y", "species")
    assert done.exit_code == 0, done.output
    assert done.output.splitlines()[0].endswith("predicts species from 2 columns of numbers, city, image")
    assert done.output.splitlines()[-1] == "    raykeras fit birds.py"
    text = (tmp_path / "birds.py").read_text()
    assert ast.get_docstring(ast.parse(text)).splitlines()[2].strip() == "raykeras fit birds.py"  # type: ignore[union-attr]
    assert '# Left out: "comment" (text that differs in most rows)' in text
    for command in (["check", "--select", "E,F,I,B"], ["format", "--check"]):
        options = ["--isolated", "--line-length", "120", "birds.py"]
        subprocess.run([sys.executable, "-m", "ruff", *command, *options], check=True)


def test_batches_have_indices_of_classes_and_no_nan(data: Path, tmp_path: Path) -> None:
    new(tmp_path / "birds.py", "--data", data, "--y", "species")
    pipeline = pipeline_of(tmp_path / "birds.py")
    x, y = pipeline.train.batch(60, shuffle=False)
    assert set(x) == {"numbers", "city", "image"} and np.isfinite(x["numbers"]).all()
    assert y[:3].tolist() == [2, 0, 1]  # of the sorted names
    assert pipeline.fit == {"batch_size": 32, "epochs": 10, "validation_split": 0.2}


def test_train_and_test_folders_are_used(tmp_path: Path) -> None:
    for part in ("train", "test"):
        (tmp_path / "d" / part).mkdir(parents=True)
        pq.write_table(pa.table({"a": [1.0, 2, 3], "b": [0.5, 1, 2]}), tmp_path / "d" / part / "a.parquet")
    assert new(tmp_path / "p.py", "--data", tmp_path / "d", "--y", "b").exit_code == 0
    pipeline = pipeline_of(tmp_path / "p.py")
    assert pipeline.train.paths == (f"{tmp_path}/d/train",)
    assert pipeline.test.paths == pipeline.validation.paths == (f"{tmp_path}/d/test",)
    assert "validation_split" not in pipeline.fit


def test_nothing_is_overwritten(data: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("mine")
    for name in ("mine.py", "mine"):
        done = new(tmp_path / name, "--data", data)
        assert done.exit_code == 2 and "overwrites no file" in done.output
    assert (tmp_path / "mine.py").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.txt"], "A pipeline is a Python file"),
        (['a".py'], "A pipeline is a Python file"),
        (["a", "--y", "specie"], "Did you mean 'species'"),
        (["a", "--y", "age"], "'age' has 1 nulls"),
        (["a", "--y", "fare"], "'fare' contains NaN or infinite"),
        (["a", "--x", "species", "--y", "species"], "y must not be an input as well"),
    ],
)
def test_unsuitable_requests_are_refused(data: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    name, *options = arguments
    done = new(tmp_path / name, "--data", data, *options)
    assert done.exit_code == 2 and message in done.output
    assert list(tmp_path.iterdir()) == [data]


def test_hostile_names_do_not_become_code(tmp_path: Path) -> None:
    evil = '"""\nraise SystemExit(1)\n\\\x1b[31m'
    table = {evil: [evil, "b"] * 20, f"{evil}2": [1, 2] * 20, f"{evil}3": [[1]] * 40, f"{evil}y": [0, 1] * 20}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    done = new(tmp_path / "p.py", "--data", tmp_path / "a.parquet", "--y", f"{evil}y")
    assert done.exit_code == 0, done.output
    assert all(char.isprintable() or char == "\n" for char in done.output + (tmp_path / "p.py").read_text())
    x, y = pipeline_of(tmp_path / "p.py").train.batch(4)
    assert len(x) == 3 and y.shape == (4,)


def test_credentials_are_not_written(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda url, **_: (fsspec.filesystem("file"), str(data)))
    done = new(tmp_path / "p.py", "--data", "s3://me:secret@bucket/a.parquet", "--y", "species")
    assert done.exit_code == 0, done.output
    assert "secret" not in done.output + (tmp_path / "p.py").read_text()
    assert done.output.splitlines()[-1].endswith("p.py -s data=URL")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([True, False], ("binary", 0, ())),
        ([0, 1], ("binary", 0, ())),
        ([0.0, 1.0], ("binary", 0, ())),
        ([0, 1, 2, 4], ("classes", 5, ())),
        ([-1, 1], ("classes", 2, (-1, 1))),
        ([10, 20, 30], ("classes", 3, (10, 20, 30))),
        (list(range(500)), ("number", 0, ())),
        ([0.5, 1.5], ("number", 0, ())),
        (["b", "a"], ("classes", 2, ("a", "b"))),
    ],
)
def test_loss_follows_from_the_values(tmp_path: Path, values: list[Any], expected: tuple[Any, ...]) -> None:
    pq.write_table(pa.table({"y": values}), tmp_path / "a.parquet")
    target = target_of(inspect_source(rk.parquet(tmp_path)), "y")
    assert (target.kind, target.num_classes, target.classes) == expected
