"""Reads the windows of a plan and converts them to tensors, in order, in Ray Data tasks or in this process.

`read_windows` does the work of a task: it decodes each row group once, runs the transform, reorders the rows and
returns a few large arrays. `ray_blocks` runs it in Ray Data tasks, each of which needs the memory of a few row groups
and returns an Arrow table that the worker reads without a copy. `local_blocks` runs it in this process, for a source
that is already in memory.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import numpy as np
import pyarrow as pa

from raykeras.compat.ray_data import ReadAhead, ReadLimits, execute
from raykeras.core.error_context import root_cause
from raykeras.core.errors import RaykerasError
from raykeras.data.batch_spec import BatchSpec, concatenate_column, slice_rows
from raykeras.data.plan import Window
from raykeras.data.sources.base import OpenSource, Reader, UnitRef
from raykeras.data.streaming.read_tasks import planned_dataset

TASK_NBYTES = 24 << 20
"""Maximum bytes of the windows that one task reads, unless a single window is larger."""

SEGMENT_TASKS = 512
"""Maximum tasks of one Ray Data execution; the next execution starts before the previous one ends."""

SEGMENT_PASSES = 16
"""Maximum passes of one execution, so that a small source is not read ahead without limit."""

_NAMED_UNITS = 3  # units of a window that an error names

_JOINED_ROW_NBYTES = 512
"""Pieces whose rows are at most this large are concatenated before their rows are taken, which beats scattering."""


@dataclass(frozen=True)
class Block:
    """Consecutive rows of one lane.

    Attributes:
        pass_index: Index of the pass.
        lane: Index of the lane among the rank's lanes.
        start: Index in the lane of the first row.
        num_rows: Number of rows.
        tensors: The rows, in the order of `BatchSpec.tensors`; each of length `num_rows`.
    """

    pass_index: int
    lane: int
    start: int
    num_rows: int
    tensors: list[Any]


@dataclass(frozen=True)
class Task:
    """Windows of one pass that are read together.

    Attributes:
        windows: The index of the pass with each window.
        units: The units that the windows need, by index.
    """

    windows: tuple[tuple[int, Window], ...]
    units: dict[int, UnitRef]

    @property
    def pass_index(self) -> int:
        return self.windows[0][0]

    @property
    def num_rows(self) -> int:
        return sum(window.num_rows for _, window in self.windows)


def gather_tasks(windows: Iterable[tuple[int, Window]], opened: OpenSource, row_nbytes: int) -> Iterator[Task]:
    """Group consecutive windows of a pass into tasks of up to `TASK_NBYTES`.

    Args:
        windows: The index of the pass with each window, in order.
        opened: The source.
        row_nbytes: Bytes of a row.
    """
    max_rows = max(1, TASK_NBYTES // row_nbytes)
    group: list[tuple[int, Window]] = []
    num_rows = 0
    for item in windows:
        if group and (num_rows + item[1].num_rows > max_rows or item[0] != group[-1][0]):
            yield _task(group, opened)
            group, num_rows = [], 0
        group.append(item)
        num_rows += item[1].num_rows
    if group:
        yield _task(group, opened)


def _task(windows: list[tuple[int, Window]], opened: OpenSource) -> Task:
    units = sorted({unit for _, window in windows for unit, _, _ in window.pieces})
    return Task(tuple(windows), {unit: opened.unit(unit) for unit in units})


def read_windows(reader: Reader, batch_spec: BatchSpec, task: Task) -> list[Any]:
    """Read a task's windows, one after the other, as tensors.

    Returns:
        NumPy arrays (task.num_rows, *shape); Arrow arrays for strings and ragged lists.
    """
    spans = _spans(task)
    last_use = {unit: i for i, (_, w) in enumerate(task.windows) for unit, _, _ in w.pieces}
    loaded: dict[int, Any] = {}  # by unit, until its last use: columns for a transform, else tensors
    result = batch_spec.empty(task.num_rows)
    arrow: list[list[Any]] = [[] for _ in result]
    at = 0
    for i, (_, window) in enumerate(task.windows):
        for unit, _, _ in window.pieces:
            if unit not in loaded:
                ref, (start, stop) = task.units[unit], spans[unit]
                columns = batch_spec.decode(reader.read(ref, start, stop, batch_spec.columns), str(ref))
                loaded[unit] = columns if batch_spec.transform else batch_spec.assemble(columns, str(ref))
        rows = window.rows()
        if batch_spec.transform:
            tensors = _transform(batch_spec, window, spans, loaded, task)
            pieces = [(0, window.num_rows_read, tensors)]
        else:
            pieces = _cut(window, spans, loaded)
        for arrays, target, window_arrays in zip(zip(*(p[2] for p in pieces), strict=True), result, arrow, strict=True):
            if target is not None:
                tensor_pieces = [(a, b, t) for (a, b, _), t in zip(pieces, arrays, strict=True)]
                _place(tensor_pieces, rows, target[at : at + window.num_rows])
            else:
                array = pa.concat_arrays(arrays)
                window_arrays.append(array if rows is None else array.take(pa.array(rows)))
        at += window.num_rows
        for unit in [u for u in loaded if last_use[u] <= i]:
            del loaded[unit]
    return [pa.concat_arrays(a) if t is None else t for t, a in zip(result, arrow, strict=True)]


def _spans(task: Task) -> dict[int, tuple[int, int]]:
    """Return the first and past-the-last row of each unit that any of the windows needs."""
    spans: dict[int, tuple[int, int]] = {}
    for _, window in task.windows:
        for unit, start, stop in window.pieces:
            lo, hi = spans.get(unit, (start, stop))
            spans[unit] = (min(lo, start), max(hi, stop))
    return spans


def _cut(window: Window, spans: dict[int, tuple[int, int]], loaded: dict[int, Any]) -> list[tuple[int, int, list[Any]]]:
    """Return the pieces of a window: first and past-the-last among the rows read, and the tensors."""
    pieces, at = [], 0
    for unit, start, stop in window.pieces:
        lo = spans[unit][0]
        pieces.append((at, at + stop - start, [t[start - lo : stop - lo] for t in loaded[unit]]))
        at += stop - start
    return pieces


def _transform(
    batch_spec: BatchSpec, window: Window, spans: dict[int, tuple[int, int]], loaded: dict[int, Any], task: Task
) -> list[Any]:
    """Apply the user's transform to all rows read for a window, before they are selected or reordered."""
    columns: dict[str, Any] = {}
    for name in batch_spec.columns:
        slices = []
        for unit, start, stop in window.pieces:
            lo = spans[unit][0]
            slices.append(slice_rows(loaded[unit][name], start - lo, stop - lo))
        columns[name] = concatenate_column(name, slices)
    names = list(dict.fromkeys(str(task.units[unit]) for unit, _, _ in window.pieces))
    where = "; ".join(names[:_NAMED_UNITS]) + (f"; or {len(names) - _NAMED_UNITS} more" if names[_NAMED_UNITS:] else "")
    return batch_spec.assemble(batch_spec.apply_transform(columns, window.key, where), where)


def _place(pieces: Sequence[tuple[int, int, np.ndarray]], rows: np.ndarray | None, target: np.ndarray) -> None:
    """Write the rows read to `target`, in the order of `Window.rows`.

    Args:
        pieces: First and past-the-last of the rows, and the rows: (stop - start, *shape).
        rows: What `Window.rows` returned.
        target: (num_rows, *shape).
    """
    if rows is None:
        for a, b, piece in pieces:
            target[a:b] = piece
        return
    arrays = [piece for _, _, piece in pieces]
    if len(arrays) == 1 or target.itemsize * math.prod(target.shape[1:]) <= _JOINED_ROW_NBYTES:
        rows_read = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
        # With the default mode "raise", NumPy writes to a copy of the target first.
        np.take(rows_read, rows, axis=0, out=target, mode="clip")
    elif len(rows) == pieces[-1][1]:  # a permutation: scatter each piece
        inverse = np.empty(len(rows), np.int64)
        inverse[rows] = np.arange(len(rows))
        for a, b, piece in pieces:
            target[inverse[a:b]] = piece
    else:  # an ascending selection
        for a, b, piece in pieces:
            lo, hi = np.searchsorted(rows, (a, b))
            target[lo:hi] = piece[rows[lo:hi] - a]


def local_blocks(reader: Reader, batch_spec: BatchSpec, tasks: Iterable[Task]) -> Generator[Block]:
    """Read the tasks in this process, one at a time on demand."""
    for task in tasks:
        yield from _blocks(task, [read_windows(reader, batch_spec, task)])


def ray_blocks(reader: Reader, batch_spec: BatchSpec, tasks: Iterable[Task], reading: ReadLimits) -> Generator[Block]:
    """Read the tasks with Ray Data.

    Args:
        reader: Reader of the units.
        batch_spec: The tensors to make.
        tasks: The tasks, in order; may be endless.
        reading: Limits for the executions.
    """
    import ray

    shared = ray.put((reader, batch_spec))
    tasks = iter(tasks)
    executions: deque[tuple[deque[Task], _Execution]] = deque()  # the current one, and the next once it has started
    ended: tuple[_Execution, ...] = ()  # its thread may still use Ray

    def start_next() -> None:
        segment: deque[Task] = deque()
        for task in tasks:
            segment.append(task)
            if len(segment) == SEGMENT_TASKS or task.pass_index - segment[0].pass_index == SEGMENT_PASSES:
                break
        if segment:
            previous = executions[-1][1] if executions else None
            executions.append((segment, _Execution(shared, segment, batch_spec.row_nbytes, reading, previous)))

    start_next()
    try:
        while executions:
            segment, execution = executions[0]
            execution.begin()
            tables = _Tables(execution)
            start_at = min(len(segment), 2 * reading.num_tasks + 2)
            while segment:
                if len(segment) == start_at:
                    start_next()  # starting an execution is slow: have it ready when this one ends
                task = segment.popleft()  # frees each task once it is read
                yield from _blocks(task, (batch_spec.unpack(table) for table in _task_tables(task, tables)))
            ended = (executions.popleft()[1],)
    finally:
        for execution in (*ended, *(execution for _, execution in executions)):
            execution.close()


def _task_tables(task: Task, tables: _Tables) -> Iterator[pa.Table]:
    remaining = task.num_rows
    while remaining:
        table = tables.take(remaining)
        remaining -= len(table)
        yield table


def _blocks(task: Task, arrays: Iterable[list[Any]]) -> Iterator[Block]:
    """Cut a task's tensors at the boundaries of its windows."""
    windows = iter(task.windows)
    pass_index, window = next(windows)
    done = 0
    for tensors in arrays:
        at, size = 0, len(tensors[0])
        while at < size:
            if done == window.num_rows:
                pass_index, window = next(windows)
                done = 0
            take = min(size - at, window.num_rows - done)
            yield Block(pass_index, window.lane, window.start + done, take, [t[at : at + take] for t in tensors])
            done += take
            at += take


class _Tables:
    """The tables of an execution, sliced so that none has more rows than requested."""

    def __init__(self, tables: Iterator[pa.Table]) -> None:
        self._tables = tables
        self._rest: pa.Table | None = None

    def take(self, num_rows: int) -> pa.Table:
        table = self._rest if self._rest is not None else next(self._tables)
        while not len(table):
            table = next(self._tables)
        self._rest = table.slice(num_rows) if len(table) > num_rows else None
        return table.slice(0, num_rows)


class _Execution(Iterator[pa.Table]):
    """The tables of one Ray Data execution, which a thread starts at once and fetches one ahead.

    Ray Data's own iterator fetches three ahead, which count towards the tables that the execution may have in memory.

    Args:
        shared: See `planned_dataset`.
        segment: The tasks; see `items` of `planned_dataset`.
        row_nbytes: Bytes of a row.
        reading: Limits for the execution.
        previous: The execution whose tables are taken before. The two share the limit of one execution.

    Attributes:
        num_left: Number of tables that have not been taken.
        next_consumer: Counts the tables of the next execution.
    """

    def __init__(
        self, shared: Any, segment: Iterable[Task], row_nbytes: int, reading: ReadLimits, previous: _Execution | None
    ) -> None:
        unread = list(segment)
        self.num_left = len(unread)
        self.next_consumer: ReadAhead | None = None
        max_tables = max(1, reading.store_nbytes // TASK_NBYTES - 1)  # without the one in use
        self._consumer = ReadAhead(previous.num_left if previous else 0, max_tables)
        if previous:
            previous.next_consumer = self._consumer
        self._is_closed = False
        self._wanted = threading.Semaphore()
        self._ready = SimpleQueue[pa.Table | BaseException | None]()
        arguments = (shared, unread, row_nbytes, reading)  # not attributes, so that they are freed with the thread
        self._thread = threading.Thread(target=self._run, args=arguments, name="raykeras-read", daemon=True)
        self._thread.start()

    def begin(self) -> None:
        """Stop counting the tables of the previous execution. To be called before the first table is taken."""
        self._consumer.begin()

    def __next__(self) -> pa.Table:
        table = self._ready.get()
        self._wanted.release()
        if isinstance(table, BaseException):
            cause = root_cause(table)
            if isinstance(cause, RaykerasError):
                raise cause from None
            raise table
        if table is None:
            raise StopIteration
        self._consumer.take()
        self.num_left -= 1
        if self.next_consumer:
            self.next_consumer.set_first(self.num_left)
        return table

    def close(self) -> None:
        """Shut the execution down and cancel its tasks."""
        self._is_closed = True
        self._wanted.release()
        self._consumer.stop()
        self._thread.join()  # a thread that calls Ray after its shutdown ends the process

    def _run(self, shared: Any, segment: list[Task], row_nbytes: int, reading: ReadLimits) -> None:
        import ray

        try:
            num_rows = [task.num_rows for task in segment]
            dataset = planned_dataset(
                _read, shared, segment, num_rows, row_nbytes=row_nbytes, reading=reading, consumer=self._consumer
            )
            tables = map(ray.get, execute(dataset))  # keeps no reference to a table that was taken
            segment.clear()  # the dataset is part of reference cycles, which would keep the tasks alive
            try:
                self._wanted.acquire()
                while not self._is_closed:
                    self._ready.put(next(tables))
                    self._wanted.acquire()
            finally:
                self._consumer.stop()
        except StopIteration:
            self._ready.put(None)
        except BaseException as error:  # raised in the thread that takes the tables
            self._ready.put(error)


def _read(reader: Reader, batch_spec: BatchSpec, task: Task) -> pa.Table:
    return batch_spec.pack(read_windows(reader, batch_spec, task))
