"""What `raykeras inspect` prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from raykeras.cli.main import main

DIGITS = Path(__file__).parents[3] / "pipelines" / "digits" / "train"


def run(*arguments: object) -> Any:
    return CliRunner().invoke(main, ["inspect", *map(str, arguments)], env={"COLUMNS": "100"})


def row(output: str, start: str) -> list[str]:
    return next(line for line in output.splitlines() if line.startswith(start)).split()


def test_columns_balance_and_suggestion() -> None:
    shown = run(DIGITS, "--balance", "label").output
    assert row(shown, "image") == ["image", "image", "8×8,", "uint8", "0", "0", "to", "16"]
    assert row(shown, "label")[:7] == ["label", "integer,", "int64", "0", "0", "to", "9"]
    assert "1,500 rows in 4 files, 12 row groups of 119 to 128 rows each" in shown
    assert row(shown, "3 ")[:3] == ["3", "161", "10.7%"]
    assert f'rk.parquet("{DIGITS}", x="image", y="label", sample_weight="weight")' in shown
    assert "raykeras new pipeline.py --data" in shown


def test_bytes_need_a_transform(tmp_path: Path) -> None:
    pq.write_table(pa.table({"photo": [b"\x89PNG", b"\xff\xd8"], "label": [0, 1]}), tmp_path / "a.parquet")
    shown = run(tmp_path / "a.parquet").output
    assert "Bytes, such as encoded images, need a `transform` that decodes them: 'photo'." in shown
    assert "suggested source" not in shown and "raykeras new" not in shown  # there is nothing to train on


def test_json_has_everything(tmp_path: Path) -> None:
    table = {"x": [0.5, float("inf"), None], "tokens": [[1], [], [1, 2]], "label": ["a", "b", "a"]}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    found = json.loads(run(tmp_path / "a.parquet", "--json", "--balance", "label").output)
    assert (found["num_rows"], found["num_files"], found["num_row_groups"]) == (3, 1, 1)
    x, tokens, label = found["columns"]
    assert (x["nulls"], x["nulls_from"], x["examples"]) == (1, "footers", [0.5, "inf"])
    assert (tokens["kind"], tokens["lengths"], tokens["usable"]) == ("lists of 0 to 2 int64", [0, 2], True)
    assert label["distinct_in_sample"] == 2
    assert found["balance"]["values"] == [["a", 2], ["b", 1]]
    assert found["suggestion"]["y"] == "label" and found["suggestion"]["fill"] == {"x": 0.5}
    assert len(found["warnings"]) == 3


@pytest.mark.parametrize("option", [(), ("--json",)])
def test_control_characters_never_reach_the_terminal(tmp_path: Path, option: tuple[str, ...]) -> None:
    evil = "\x1b]0;title\x07[bold]\n\u202e\x9b31m"
    (tmp_path / f"k={evil.replace(chr(10), '')}").mkdir()
    table = pa.table({evil: [evil, "b"], f"{evil}2": [[1], [1, 2]], f"{evil}3": [None, 1]})
    pq.write_table(table, tmp_path / f"k={evil.replace(chr(10), '')}" / "a.parquet")
    for balance in ((), ("--balance", evil), ("--balance", "none")):
        shown = run(tmp_path, *option, *balance).output
        assert all(char.isprintable() or char == "\n" for char in shown)
        assert "[bold]" in shown


def test_sorted_and_imbalanced_classes_are_warned_about(tmp_path: Path) -> None:
    pq.write_table(pa.table({"label": np.repeat([0, 1], [95, 5]), "x": np.arange(100)}), tmp_path / "a.parquet")
    shown = " ".join(run(tmp_path, "--balance", "label").output.split())
    assert "The rows are sorted by 'label'" in shown
    assert "most frequent value occurs 19 times as often" in shown


def test_many_columns_are_cut(tmp_path: Path) -> None:
    pq.write_table(pa.table({f"c{i}": [1, 2] for i in range(2000)}), tmp_path / "a.parquet")
    shown = run(tmp_path).output
    assert "and 1,960 more columns; --all shows them" in shown and "c500" not in shown
    assert "c500" in run(tmp_path, "--all").output
    assert len(json.loads(run(tmp_path, "--json").output)["columns"]) == 2000


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" + b"\0" * 100 + b"PAR1"])
def test_invalid_files_are_one_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.parquet").write_bytes(content)
    done = run(tmp_path / "a.parquet")
    assert done.exit_code == 2 and done.output.startswith("raykeras: error: The files of a source must be")


def test_credentials_are_not_shown(tmp_path: Path) -> None:
    pq.write_table(pa.table({"x": [1, 2], "y": [1, 2]}), tmp_path / "a.parquet")
    shown = run(f"file://{tmp_path}/a.parquet").output
    assert f"file://{tmp_path}" in shown
