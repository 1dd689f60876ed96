"""The table of troubles: every row cites a thread and names tests that exist, and quotes messages that appear."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import raykeras as rk
from tests.support.markdown import ROOT

PAGE = ROOT / "docs" / "reference" / "troubles.md"

ROWS = [[cell.strip() for cell in line.split(" | ")] for line in PAGE.read_text().splitlines() if line[:3] != "| |"]
ROWS = [cells for cells in ROWS if re.fullmatch(r"\| \d+", cells[0])]

TESTS = {name for path in ROOT.glob("tests/**/test_*.py") for name in re.findall(r"def (test_\w+)", path.read_text())}


def build() -> None:
    """Stand for a function that builds a model: every call is refused before it."""


def batches() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield batches; their number is unknown."""
    yield np.zeros((2, 1)), np.zeros(2)


def read_null() -> None:
    pq.write_table(pa.table({"age": [1, None]}), "data.parquet")
    rk.parquet("data.parquet", x="age").open()


def read_lists() -> None:
    pq.write_table(pa.table({"series": [[1.0], [1.0, 2.0]]}), "data.parquet")
    rk.parquet("data.parquet", x="series").open()


def fit_generator_on_two_workers() -> None:
    rk.fit(build, batches(), scale=rk.Scale(workers=2))


def validate_on_generator() -> None:
    rk.fit(build, np.zeros((2, 1)), np.zeros(2), validation_data=batches())


CALLS: dict[str, Callable[[], None]] = {
    "A null in an integer column": read_null,
    "Lists of different lengths": read_lists,
    "A generator ends": fit_generator_on_two_workers,
    "Validation on a generator": validate_on_generator,
}
"""A call that gives the message of a row, by how the row begins."""


def test_there_are_forty_rows() -> None:
    assert [cells[0] for cells in ROWS] == [f"| {number}" for number in range(1, 41)]


@pytest.mark.parametrize("cells", ROWS, ids=lambda cells: cells[1][:40])
def test_row_cites_threads_and_names_tests(cells: list[str]) -> None:
    _, trouble, threads, _, tests = cells
    assert trouble
    assert re.search(r"\[[\w-]+#(\d+)\]\(https://github\.com/[\w-]+/[\w-]+/(issues|pull)/\1\)", threads)
    named = set(re.findall(r"`(test_\w+)`", tests))
    assert named and named <= TESTS


def test_messages_appear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    messages = {trouble: said[1] for _, trouble, _, what, _ in ROWS if (said := re.search("[Ss]ays ``(.+?) ?``", what))}
    assert len(messages) == len(CALLS)
    for trouble, message in messages.items():
        (call,) = (call for start, call in CALLS.items() if trouble.startswith(start))
        with pytest.raises(rk.ValidationError, match=re.escape(message)):
            call()
