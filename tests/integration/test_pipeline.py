"""Loading pipeline files: parameters and errors."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

import raykeras as rk
from raykeras.cli.pipeline import load_pipeline

CODE = """
from pathlib import Path
import raykeras as rk
import beside

def build():
    return beside.VALUE

def pipeline(data: str, size: int = 4, rate: float = 0.5, deep: bool = False, folder: Path | None = None):
    return rk.Pipeline(model=build, train=(data, size, rate, deep, folder), fit={"epochs": size})
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "beside.py").write_text("VALUE = 7\n")
    (tmp_path / "my_digits.py").write_text(CODE)
    return tmp_path / "my_digits.py"


def test_parameters_are_converted_by_annotation(path: Path) -> None:
    texts = {"data": "5", "size": "8", "rate": "1e-3", "deep": "true", "folder": "a/b"}
    loaded = load_pipeline(path, texts)
    assert loaded.train == ("5", 8, 1e-3, True, Path("a/b"))
    assert load_pipeline(path, {"data": "d", "folder": "none"}).train == ("d", 4, 0.5, False, None)
    assert loaded.name == "my_digits"


def test_pipeline_functions_pickle_by_value(path: Path) -> None:
    from ray import cloudpickle

    data = cloudpickle.dumps(load_pipeline(path, {"data": "d"}).model)
    assert b"raykeras_pipeline_my_digits" not in data or pickle.loads(data)() == 7


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({}, "needs 'data'; give it with `-s data=...`"),
        ({"data": "d", "sise": "3"}, r"has no 'sise'. Did you mean 'size'\?"),
        ({"data": "d", "size": "many"}, "`size` of the pipeline must be int; got 'many'"),
        ({"data": "d", "deep": "maybe"}, "`deep` of the pipeline must be bool"),
    ],
)
def test_invalid_parameters_are_refused(path: Path, parameters: dict[str, str], message: str) -> None:
    with pytest.raises(rk.OptionError, match=message):
        load_pipeline(path, parameters)


def test_invalid_pipeline_files_are_refused(path: Path, tmp_path: Path) -> None:
    with pytest.raises(rk.OptionError, match=r"there is no .*my_digit\.py.* Did you mean .*my_digits\.py"):
        load_pipeline(tmp_path / "my_digit.py")
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(rk.OptionError, match="must define `def pipeline"):
        load_pipeline(tmp_path / "empty.py")
    (tmp_path / "other.py").write_text("def pipeline():\n    return 3\n")
    with pytest.raises(rk.OptionError, match="returned int"):
        load_pipeline(tmp_path / "other.py")
    (tmp_path / "fails.py").write_text("def pipeline():\n    return {}['gone']\n")
    with pytest.raises(KeyError, match="gone"):
        load_pipeline(tmp_path / "fails.py")
