"""A small Parquet source."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import raykeras as rk
from raykeras.data.batch_spec import BatchSpec
from raykeras.data.plan import PassPlan
from raykeras.data.resolve import resolve
from raykeras.data.sources.base import OpenSource


def small_source(folder: Path) -> tuple[OpenSource, BatchSpec, Callable[[int], PassPlan]]:
    """Return an open source of 8 row groups of 8 rows, its batch spec, and a function that plans an epoch."""
    pq.write_table(pa.table({"x": np.arange(64.0)}), folder / "x.parquet", row_group_size=8)
    source = rk.parquet(folder, x="x")
    opened = source.open()

    def plan(epoch: int) -> PassPlan:
        return PassPlan(opened.unit_rows, global_batch_size=8, window_rows=8, epoch=epoch)

    return opened, resolve(source, opened), plan
