"""Streams yield the planned rows, end when closed, and keep Ray Data's scheduling loop idle when possible."""

from __future__ import annotations

import gc
import inspect
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow as tf

import raykeras as rk
from raykeras.compat import ray_data
from raykeras.data.plan import Order, PassPlan
from raykeras.data.resolve import resolve
from raykeras.data.streaming import reader
from raykeras.data.streaming.cache import CachedRows
from raykeras.data.streaming.dataset import Stream
from raykeras.data.streaming.interleave import RankInput
from raykeras.data.streaming.reader import gather_tasks, read_windows
from raykeras.data.streaming.resources import CpuBudget, plan_budget, reading
from tests.support.cpus import all_held_but
from tests.support.sources import small_source


def slow(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    time.sleep(0.5)
    return columns


def test_closed_stream_stops_reading_ahead(tmp_path: Path) -> None:
    pq.write_table(pa.table({"x": np.arange(64.0)}), tmp_path / "x.parquet", row_group_size=8)
    source = rk.parquet(tmp_path, x="x", transform=slow)
    opened = source.open()
    batch_spec = resolve(source, opened)

    def plan(epoch: int) -> PassPlan:
        return PassPlan(opened.unit_rows, global_batch_size=8, window_rows=8, epoch=epoch)

    stream = Stream(RankInput(*CachedRows(opened, batch_spec).source(batch_spec), plan, 0, 1, 1))
    batches = iter(stream.endless_dataset())
    next(batches)  # a thread reads ahead
    stream.close()
    assert inspect.getgeneratorstate(stream._read) == inspect.GEN_CLOSED


@pytest.mark.parametrize("width", [1, 200], ids=["small rows", "rows too large to join"])
@pytest.mark.parametrize(("order", "num_ranks"), [("shuffled", 1), ("source", 2)])
def test_windows_hold_planned_rows(tmp_path: Path, order: Order, num_ranks: int, width: int) -> None:
    x = np.arange(101 * width, dtype=np.float32).reshape(101, width)
    pq.write_table(pa.table({"x": list(x), "y": np.arange(101)}), tmp_path / "x.parquet", row_group_size=7)
    source = rk.parquet(tmp_path, x="x", y="y")
    opened = source.open()
    batch_spec = resolve(source, opened)
    plan = PassPlan(opened.unit_rows, global_batch_size=8, window_rows=20, order=order)
    read = []
    for rank in range(num_ranks):
        windows = list(plan.windows(rank, num_ranks))
        assert any(len(window.pieces) > 2 for window in windows)
        for task in gather_tasks(((0, window) for window in windows), opened, batch_spec.row_nbytes):
            rows = np.concatenate([plan.source_rows(window) for _, window in task.windows])
            features, labels = read_windows(opened.reader, batch_spec, task)
            np.testing.assert_array_equal(features.reshape(-1, width), x[rows])
            np.testing.assert_array_equal(labels, rows)
            read.append(rows)
    assert sorted(np.concatenate(read)) == list(range(101))


@pytest.mark.parametrize(("order", "num_ranks"), [("source", 1), ("source", 2), ("shuffled", 3), ("shuffled", 8)])
def test_chunks_hold_planned_rows_across_windows(tmp_path: Path, order: Order, num_ranks: int) -> None:
    """With eight ranks, each interleaves a single lane."""
    names, number = [f"row {i}" for i in range(1003)], np.arange(1003.0, dtype=np.float32)
    lists = pa.array([[i] * (i % 3) for i in range(1003)], pa.list_(pa.int64()))
    pq.write_table(pa.table({"number": number, "name": names, "list": lists}), tmp_path / "x.parquet", row_group_size=7)
    source = rk.parquet(tmp_path, x={name: name for name in ("number", "name", "list")}, ragged=["list"])
    opened = source.open()
    batch_spec = resolve(source, opened)

    def plan(epoch: int) -> PassPlan:
        return PassPlan(opened.unit_rows, global_batch_size=48, window_rows=20, order=order, epoch=epoch)

    for rank in range(num_ranks):
        assert len(list(plan(0).windows(rank, num_ranks))) > 4
        dataset = Stream(RankInput(opened, batch_spec, plan, rank, num_ranks, 1)).pass_dataset()
        batches = list(dataset) if num_ranks == 1 else [x for x, _ in dataset]
        rows = plan(0).rank_rows(rank, num_ranks)
        np.testing.assert_array_equal(np.concatenate([x["number"].numpy().ravel() for x in batches]), number[rows])
        assert [name.decode() for x in batches for name in x["name"].numpy().ravel()] == [names[i] for i in rows]
        assert [values for x in batches for values in x["list"].to_list()] == [lists[i].as_py() for i in rows]


class Clock(ray_data.ReadAhead):
    """A clock that advances only in pauses."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.pauses = 100.0, list[float]()

    def monotonic(self) -> float:
        return self.now

    def wait(self, taken: int, timeout_s: float) -> int:
        self.pauses.append(timeout_s)
        self.now += timeout_s
        return super().wait(taken, 0)


def test_scheduling_loop_backs_off(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(ray_data, "time", clock)
    callback = ray_data.pacing(object, clock.number)()
    callback.on_execution_step(None)
    for _ in range(8):
        callback.on_execution_step(None)
    assert clock.pauses[:3] == pytest.approx([0.001, 0.005, 0.025])
    assert clock.pauses[-1] == 0.5
    clock.now += 0.06  # a turn that waited for a task
    callback.on_execution_step(None)
    assert len(clock.pauses) == 8
    callback.on_execution_step(None)
    assert clock.pauses[-1] == 0.001
    clock.take()
    for _ in range(3):
        callback.on_execution_step(None)
    assert clock.pauses[-3:] == pytest.approx([0.005, 0.001, 0.005])


def test_scheduling_loop_idles_without_consumer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It continues when a consumer reads again."""
    from ray.data._internal.execution.streaming_executor import StreamingExecutor

    turns: list[float] = []
    step = StreamingExecutor._scheduling_loop_step

    def counted(executor: StreamingExecutor, topology: object) -> bool:
        turns.append(time.monotonic())
        return bool(step(executor, topology))

    monkeypatch.setattr(StreamingExecutor, "_scheduling_loop_step", counted)
    pq.write_table(
        pa.table({"x": np.arange(8 << 20, dtype=np.float64)}), tmp_path / "x.parquet", row_group_size=1 << 20
    )
    source = rk.parquet(tmp_path, x="x")
    opened = source.open()
    batch_spec = resolve(source, opened)

    def plan(epoch: int) -> PassPlan:
        return PassPlan(opened.unit_rows, global_batch_size=1 << 18, window_rows=1 << 20, epoch=epoch)

    stream = Stream(RankInput(opened, batch_spec, plan, 0, 1, 1, reading=ray_data.ReadLimits(1, 64 << 20)))
    batches = iter(stream.endless_dataset())
    next(batches)
    resting, deadline = 100, time.monotonic() + 60
    while resting > 8:  # while it reads ahead
        assert time.monotonic() < deadline, f"{resting} turns in two seconds"
        turns.clear()
        time.sleep(2)
        resting = len(turns)
    assert resting
    seen = np.concatenate([next(batches).numpy() for _ in range(31)])
    assert len(np.unique(seen)) == len(seen) == 31 << 18
    for _ in range(96):  # more than is read ahead
        next(batches)
    stream.close()
    assert len(turns) > resting


def test_next_execution_starts_as_tables_are_consumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two executions together stay within the limit of one."""
    segment, row_group, allowed = 8, 1 << 17, 4
    monkeypatch.setattr(reader, "SEGMENT_TASKS", segment)
    monkeypatch.setattr(reader, "TASK_NBYTES", 9 * row_group)  # a table takes more than 8 bytes per row
    begun = tmp_path / "begun"

    def tells(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        with open(begun, "a") as file:
            file.write(".")
        return columns

    pq.write_table(
        pa.table({"x": np.arange(2 * segment * row_group)}), tmp_path / "x.parquet", row_group_size=row_group
    )
    source = rk.parquet(tmp_path / "x.parquet", x="x", transform=tells)
    opened = source.open()
    batch_spec = resolve(source, opened)
    plan = PassPlan(opened.unit_rows, global_batch_size=1 << 10, window_rows=row_group)
    windows = ((0, window) for window in plan.windows(0, 1))
    tasks = list(reader.gather_tasks(windows, opened, batch_spec.row_nbytes))
    assert len(tasks) == 2 * segment
    begun.write_text("")
    taken, ahead = 0, []
    limits = ray_data.ReadLimits(cpus=allowed - 2, store_nbytes=allowed * reader.TASK_NBYTES)
    for block in reader.ray_blocks(opened.reader, batch_spec, tasks, limits):
        assert block.num_rows == row_group
        taken += 1
        deadline = time.monotonic() + 60
        while len(begun.read_text()) < min(taken + allowed - 1, len(tasks)):
            assert time.monotonic() < deadline, f"{len(begun.read_text())} tasks have begun, {taken} are taken"
            time.sleep(0.01)
        time.sleep(0.3)  # more would begin, if the limit allowed
        ahead.append(len(begun.read_text()) - taken)
    assert taken == 2 * segment
    assert max(ahead) < allowed  # one is in use


def test_ended_execution_frees_its_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even without garbage collection, which Ray Data's reference cycles would need."""
    segment, num_executions = 2, 4
    monkeypatch.setattr(reader, "SEGMENT_TASKS", segment)
    monkeypatch.setattr(reader, "TASK_NBYTES", 1)
    opened, batch_spec, plan = small_source(tmp_path)
    made: list[weakref.ref[reader.Task]] = []

    def tasks() -> Iterator[reader.Task]:
        windows = ((0, window) for window in plan(0).windows(0, 1))
        for task in reader.gather_tasks(windows, opened, batch_spec.row_nbytes):
            made.append(weakref.ref(task))
            yield task

    gc.disable()
    try:
        read = reader.ray_blocks(opened.reader, batch_spec, tasks(), reading(CpuBudget(), 1, 1))
        assert sum(block.num_rows for block in read) == 64
        assert len(made) == segment * num_executions
        assert [ref() for ref in made] == [None] * len(made)
    finally:
        gc.enable()


def test_task_takes_remaining_cpu_fraction(tmp_path: Path) -> None:
    """A request for a whole CPU would never be scheduled."""
    small = small_source(tmp_path)
    with all_held_but(0.25):
        limits = reading(plan_budget(0.0, 0), 1, 1)
        assert limits.cpus_per_task == pytest.approx(0.25)
        stream = Stream(RankInput(*small, 0, 1, 1, reading=limits))
        seen = np.concatenate([x.numpy().ravel() for x in stream.pass_dataset()])
        stream.close()
    assert sorted(seen) == list(range(64))


def test_closed_stream_leaves_no_thread(tmp_path: Path) -> None:
    """A thread that calls Ray after its shutdown would end the process."""
    small = small_source(tmp_path)
    for _ in range(3):
        before = set(threading.enumerate())
        stream = Stream(RankInput(*small, 0, 1, 1, reading=reading(CpuBudget(), 1, 1)))
        next(iter(stream.endless_dataset()))
        names = {thread.name for thread in set(threading.enumerate()) - before}
        assert "raykeras-read" in names
        stream.close()
        assert "raykeras-read" not in {thread.name for thread in set(threading.enumerate()) - before}


def test_stream_starts_reading_before_iteration(tmp_path: Path) -> None:
    opened, batch_spec, plan = small_source(tmp_path)

    def stream() -> Stream:
        limits = reading(CpuBudget(), 1, 1)
        return Stream(RankInput(opened, batch_spec, plan, 0, 1, 1, num_steps=16, first_step=3, reading=limits))

    asked, begun = stream(), stream()
    begun.begin()
    deadline = time.monotonic() + 60
    while not begun._handed and time.monotonic() < deadline:
        time.sleep(0.01)
    assert begun._handed, "the first rows were not read"
    passes = asked.pass_dataset(), begun.pass_dataset()
    for num_steps in (5, 8):
        batches = [[x.numpy().ravel().tolist() for x in batches] for batches in passes]
        assert batches[0] == batches[1]
        assert len(batches[0]) == num_steps
    asked.close()
    begun.close()


def test_early_read_failure_is_raised_on_iteration(tmp_path: Path) -> None:
    small = small_source(tmp_path)
    stream = Stream(RankInput(*small, 0, 1, 1, reading=reading(CpuBudget(), 1, 1)))
    pq.write_table(pa.table({"other": np.arange(64.0)}), tmp_path / "x.parquet", row_group_size=8)
    stream.begin()
    with pytest.raises(tf.errors.InvalidArgumentError):
        next(iter(stream.pass_dataset()))
    assert isinstance(stream.failure, rk.SourceError)
    assert "has no column 'x' now. Start again." in str(stream.failure)
    stream.close()


@pytest.mark.parametrize("asked", [False, True])
def test_stream_can_be_closed_right_after_start(tmp_path: Path, asked: bool) -> None:
    small = small_source(tmp_path)
    before = set(threading.enumerate())
    stream = Stream(RankInput(*small, 0, 1, 1, reading=reading(CpuBudget(), 1, 1)))
    stream.begin()
    iterator = iter(stream.pass_dataset()) if asked else None
    stream.close()
    assert not {"raykeras-begin", "raykeras-read"} & {t.name for t in set(threading.enumerate()) - before}
    del iterator
