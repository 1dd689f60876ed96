"""A small Parquet source."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import raykeras as rk
from raykeras.columns import Layout
from raykeras.plan import PassPlan
from raykeras.sources import OpenSource
from raykeras.specs import resolve


def small_source(folder: Path) -> tuple[OpenSource, Layout, Callable[[int], PassPlan]]:
    """Return a source of eight row groups, its layout and its plan."""
    pq.write_table(pa.table({"x": np.arange(64.0)}), folder / "x.parquet", row_group_size=8)
    source = rk.parquet(folder, x="x")
    opened = source.open()

    def plan(epoch: int) -> PassPlan:
        return PassPlan(opened.unit_rows, global_batch_size=8, window_rows=8, epoch=epoch)

    return opened, resolve(source, opened), plan
