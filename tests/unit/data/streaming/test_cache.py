"""Which sources are cached in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import raykeras as rk
from raykeras.data.resolve import resolve
from raykeras.data.streaming.cache import should_cache

ROWS, ROW_BYTES = 20, 2 * 4 + 8 + 4  # two float32 features, an int64 label, a float32 weight
FEATURES = ["f0", "f1"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    columns = {
        "f0": np.zeros(ROWS, np.float32),
        "f1": np.zeros(ROWS, np.float32),
        "y": np.zeros(ROWS, np.int64),
        "w": np.ones(ROWS),
        "text": [f"row {i}" for i in range(ROWS)],
    }
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    return tmp_path / "rows.parquet"


def unchanged(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return columns


SPECS: dict[str, dict[str, Any]] = {
    "stacked": {"x": FEATURES, "y": "y", "sample_weight": "w"},
    "text": {"x": {"a": "text", "b": "f1"}, "y": "y"},
    "transformed": {"x": FEATURES, "y": "y", "transform": unchanged},
}


@pytest.mark.parametrize(
    ("spec", "options", "limit", "expected"),
    [
        ("stacked", {}, ROWS * ROW_BYTES, True),
        ("stacked", {}, ROWS * ROW_BYTES - 1, False),
        ("stacked", {"cache": None}, 1 << 20, False),
        ("stacked", {"cache": "memory"}, 0, True),
        ("text", {}, 1 << 20, False),
        ("transformed", {}, 1 << 20, False),
        ("transformed", {"cache": "memory"}, 0, True),
    ],
)
def test_small_sources_are_cached_automatically(
    path: Path, spec: str, options: dict[str, Any], limit: int, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYKERAS_AUTO_CACHE_BYTES", str(limit))
    source = rk.parquet(path, **SPECS[spec], **options)
    opened = source.open()
    assert should_cache(source, opened, resolve(source, opened)) is expected


def test_invalid_cache_option_is_refused() -> None:
    with pytest.raises(rk.OptionError, match=r'`cache` must be "auto", "memory" or None; got \'disk\''):
        rk.parquet("x", x="x", cache="disk")  # type: ignore[arg-type]


def test_invalid_cache_limit_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYKERAS_AUTO_CACHE_BYTES", "1GiB")
    source = rk.parquet(path, x="f0", y="y")
    opened = source.open()
    with pytest.raises(rk.OptionError, match=r"RAYKERAS_AUTO_CACHE_BYTES must be a number of bytes.*got '1GiB'"):
        should_cache(source, opened, resolve(source, opened))
