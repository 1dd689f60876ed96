"""A worker's memory does not grow with the data."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.memory import LARGE, SMALL, peak_mib


@pytest.mark.slow
def test_a_file_100_times_larger_takes_less_than_200_mib_more(tmp_path: Path) -> None:
    small, large = (sum(peak_mib(num_rows, tmp_path).values()) for num_rows in (SMALL, LARGE))
    assert LARGE == 100 * SMALL
    assert large - small < 200
