"""Streams end when they are closed, and Ray Data's loop takes no more of a core than it needs."""

from __future__ import annotations

import inspect
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import raykeras as rk
from raykeras import reads
from raykeras.chunks import Feed
from raykeras.held import Held
from raykeras.plan import PassPlan
from raykeras.specs import resolve
from raykeras.stream import Stream


def slow(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    time.sleep(0.5)
    return columns


def test_nothing_is_read_after_a_stream_was_closed_while_it_reads_ahead(tmp_path: Path) -> None:
    pq.write_table(pa.table({"x": np.arange(64.0)}), tmp_path / "x.parquet", row_group_size=8)
    source = rk.parquet(tmp_path, x="x", transform=slow)
    opened = source.open()
    layout = resolve(source, opened)

    def plan(epoch: int) -> PassPlan:
        return PassPlan(opened.unit_rows, global_batch_size=8, window_rows=8, epoch=epoch)

    stream = Stream(Feed(*Held(opened, layout).source(layout), plan, 0, 1, 1))
    batches = iter(stream.endless_dataset())
    next(batches)  # and a thread makes the next ones
    stream.close()
    assert inspect.getgeneratorstate(stream._chunks) == inspect.GEN_CLOSED


class Clock:
    """Time that passes only in `sleep`."""

    def __init__(self) -> None:
        self.now, self.pauses = 100.0, list[float]()

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


def test_turns_that_did_not_wait_for_a_task_are_followed_by_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(reads, "time", clock)
    callback = reads._pacing()()
    callback.on_execution_step(None)
    for _ in range(8):
        callback.on_execution_step(None)
    assert clock.pauses[:3] == [0.001, 0.002, 0.004]
    assert clock.pauses[-1] == 0.05
    clock.now += 0.004  # a turn that waited
    callback.on_execution_step(None)
    assert len(clock.pauses) == 8
    callback.on_execution_step(None)
    assert clock.pauses[-1] == 0.001
