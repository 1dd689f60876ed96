"""A worker's memory does not grow with the data."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.memory import LARGE, SMALL, peak_mib, write


@pytest.mark.slow
def test_a_file_100_times_larger_takes_less_than_200_mib_more(tmp_path: Path) -> None:
    held = []
    for num_rows in (SMALL, LARGE):
        write(tmp_path / str(num_rows) / "0.parquet", num_rows)
        peak = peak_mib(tmp_path / str(num_rows), epochs=2)
        held.append(peak["private"] + peak["shared"])
    assert LARGE == 100 * SMALL
    assert held[1] - held[0] < 200
