"""A rank's windows, read, shuffled and converted where there is a free CPU.

Enters: the windows of a plan, in the order in which they are needed, through all passes. Leaves:
the same windows as tensors, in that order.

`read_windows` is the work itself: it decodes each row group once, runs the transform, puts every
row in its place, and returns a few large arrays. `ray_blocks` has it done by Ray Data tasks, which
hold a row group's worth of memory each and hand back an Arrow table that the worker reads in place;
`local_blocks` does it in this process, for data that is in memory already.
"""

from __future__ import annotations

import itertools
import math
import operator
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import numpy as np
import pyarrow as pa

from raykeras.columns import Layout, cut, joined
from raykeras.errors import RaykerasError, root_cause
from raykeras.plan import Window
from raykeras.reads import Consumer, Reading, planned_dataset
from raykeras.sources import OpenSource, Reader, UnitRef

TASK_NBYTES = 24 << 20
"""Windows are gathered into one task up to this many bytes: less overhead, still fine-grained."""

SEGMENT_TASKS = 512
"""Most tasks of one Ray Data execution; the next execution is started before the last ends."""

SEGMENT_PASSES = 16
"""Most passes of one execution: what is small is not read ahead without end."""

_NAMED_UNITS = 3  # of a window, in an error

_JOINED_ROW_NBYTES = 512
"""Pieces of rows up to this size are joined before their rows are taken: that is faster than to scatter them."""


@dataclass(frozen=True)
class Block:
    """Consecutive rows of one lane.

    Attributes:
        pass_index: The pass it belongs to.
        lane: The lane among the rank's.
        start: First row in the lane.
        tensors: In the order of `Layout.tensors`; all of one length.
    """

    pass_index: int
    lane: int
    start: int
    num_rows: int
    tensors: list[Any]


@dataclass(frozen=True)
class Task:
    """Windows of one pass that are read together."""

    windows: tuple[tuple[int, Window], ...]  # pass, window
    units: dict[int, UnitRef]

    @property
    def pass_index(self) -> int:
        return self.windows[0][0]

    @property
    def num_rows(self) -> int:
        return sum(window.num_rows for _, window in self.windows)


def gather_tasks(windows: Iterable[tuple[int, Window]], opened: OpenSource, row_nbytes: int) -> Iterator[Task]:
    """Consecutive windows of a pass as tasks of about `TASK_NBYTES`."""
    rows = max(1, TASK_NBYTES // row_nbytes)
    gathered: list[tuple[int, Window]] = []
    num_rows = 0
    for item in windows:
        if gathered and (num_rows + item[1].num_rows > rows or item[0] != gathered[-1][0]):
            yield _task(gathered, opened)
            gathered, num_rows = [], 0
        gathered.append(item)
        num_rows += item[1].num_rows
    if gathered:
        yield _task(gathered, opened)


def _task(windows: list[tuple[int, Window]], opened: OpenSource) -> Task:
    units = sorted({unit for _, window in windows for unit, _, _ in window.pieces})
    return Task(tuple(windows), {unit: opened.unit(unit) for unit in units})


def read_windows(reader: Reader, layout: Layout, task: Task) -> list[Any]:
    """The rows of a task's windows, one after the other, as tensors.

    Returns:
        NumPy arrays (task.num_rows, *shape); Arrow arrays for strings and ragged lists.
    """
    spans = _spans(task)
    last_use = {unit: i for i, (_, w) in enumerate(task.windows) for unit, _, _ in w.pieces}
    cache: dict[int, Any] = {}
    result = layout.empty(task.num_rows)
    parts: list[list[Any]] = [[] for _ in result]
    at = 0
    for i, (_, window) in enumerate(task.windows):
        for unit, _, _ in window.pieces:
            if unit not in cache:
                ref, (start, stop) = task.units[unit], spans[unit]
                columns = layout.decode(reader.read(ref, start, stop, layout.columns), str(ref))
                cache[unit] = columns if layout.transform else layout.assemble(columns, str(ref))
        rows = window.rows()
        if layout.transform:
            tensors = _transformed(layout, window, spans, cache, task)
            pieces = [(0, window.num_rows_read, tensors)]
        else:
            pieces = _cut(window, spans, cache)
        for array, target, gathered in zip(zip(*(p[2] for p in pieces), strict=True), result, parts, strict=True):
            if target is not None:
                placed = [(a, b, t) for (a, b, _), t in zip(pieces, array, strict=True)]
                _place(placed, rows, target[at : at + window.num_rows])
            else:
                whole = pa.concat_arrays(array)
                gathered.append(whole if rows is None else whole.take(pa.array(rows)))
        at += window.num_rows
        for unit in [u for u in cache if last_use[u] <= i]:
            del cache[unit]
    return [pa.concat_arrays(p) if t is None else t for t, p in zip(result, parts, strict=True)]


def _spans(task: Task) -> dict[int, tuple[int, int]]:
    """First and past-the-last row that any of the windows needs of each unit."""
    spans: dict[int, tuple[int, int]] = {}
    for _, window in task.windows:
        for unit, start, stop in window.pieces:
            lo, hi = spans.get(unit, (start, stop))
            spans[unit] = (min(lo, start), max(hi, stop))
    return spans


def _cut(window: Window, spans: dict[int, tuple[int, int]], cache: dict[int, Any]) -> list[tuple[int, int, list[Any]]]:
    """The window's pieces: first and past-the-last row among those read, and their tensors."""
    pieces, at = [], 0
    for unit, start, stop in window.pieces:
        lo = spans[unit][0]
        pieces.append((at, at + stop - start, [t[start - lo : stop - lo] for t in cache[unit]]))
        at += stop - start
    return pieces


def _transformed(
    layout: Layout, window: Window, spans: dict[int, tuple[int, int]], cache: dict[int, Any], task: Task
) -> list[Any]:
    """All rows read for a window through the user's function, before any is chosen or moved."""
    columns: dict[str, Any] = {}
    for name in layout.columns:
        slices = []
        for unit, start, stop in window.pieces:
            lo = spans[unit][0]
            slices.append(cut(cache[unit][name], start - lo, stop - lo))
        columns[name] = joined(name, slices)
    units = list(dict.fromkeys(str(task.units[unit]) for unit, _, _ in window.pieces))
    where = "; ".join(units[:_NAMED_UNITS]) + (f"; or {len(units) - _NAMED_UNITS} more" if units[_NAMED_UNITS:] else "")
    return layout.assemble(layout.apply_transform(columns, window.key, where), where)


def _place(pieces: Sequence[tuple[int, int, np.ndarray]], rows: np.ndarray | None, target: np.ndarray) -> None:
    """Writes pieces of the rows read to where `Window.rows` wants them."""
    if rows is None:
        for a, b, piece in pieces:
            target[a:b] = piece
        return
    arrays = [piece for _, _, piece in pieces]
    if len(arrays) == 1 or target.itemsize * math.prod(target.shape[1:]) <= _JOINED_ROW_NBYTES:
        whole = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
        # with "raise" NumPy would write to a copy of the target
        np.take(whole, rows, axis=0, out=target, mode="clip")
    elif len(rows) == pieces[-1][1]:  # a permutation: scatter each piece
        where = np.empty(len(rows), np.int64)
        where[rows] = np.arange(len(rows))
        for a, b, piece in pieces:
            target[where[a:b]] = piece
    else:  # an ascending choice
        for a, b, piece in pieces:
            lo, hi = np.searchsorted(rows, (a, b))
            target[lo:hi] = piece[rows[lo:hi] - a]


def local_blocks(reader: Reader, layout: Layout, tasks: Iterable[Task]) -> Generator[Block]:
    """Reads in this process, when asked."""
    for task in tasks:
        yield from _blocks(task, [read_windows(reader, layout, task)])


def ray_blocks(reader: Reader, layout: Layout, tasks: Iterable[Task], reading: Reading) -> Generator[Block]:
    """Reads through Ray Data.

    Args:
        reader: Reads units.
        layout: Makes tensors of them.
        tasks: What to read, in order; may be endless.
        reading: Limits.
    """
    import ray

    shared = ray.put((reader, layout))
    tasks = iter(tasks)
    ahead: deque[tuple[deque[Task], _Execution]] = deque()
    ended: tuple[_Execution, ...] = ()  # it may still ask Ray

    def start() -> None:
        segment: deque[Task] = deque()
        for task in tasks:
            segment.append(task)
            if len(segment) == SEGMENT_TASKS or task.pass_index - segment[0].pass_index == SEGMENT_PASSES:
                break
        if segment:
            previous = ahead[-1][1] if ahead else None
            ahead.append((segment, _Execution(shared, segment, layout.row_nbytes, reading, previous)))

    start()
    try:
        while ahead:
            segment, execution = ahead[0]
            execution.begin()
            tables = _Tables(execution)
            early = min(len(segment), 2 * reading.num_tasks + 2)
            while segment:
                if len(segment) == early:
                    start()  # an execution takes a second to start: have it ready when this one ends
                task = segment.popleft()  # no list keeps what was read: there are many, of many objects each
                yield from _blocks(task, (layout.unpack(table) for table in _rows_of(task, tables)))
            ended = (ahead.popleft()[1],)
    finally:
        for execution in (*ended, *(execution for _, execution in ahead)):
            execution.close()


def _rows_of(task: Task, tables: _Tables) -> Iterator[pa.Table]:
    missing = task.num_rows
    while missing:
        table = tables.take(missing)
        missing -= len(table)
        yield table


def _blocks(task: Task, arrays: Iterable[list[Any]]) -> Iterator[Block]:
    """Cuts what was read at the windows' borders."""
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
    """Tables of an execution, cut to no more rows than are wanted."""

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
    """The tables of one Ray Data execution, begun at once in a thread, which has the next one ready while one is used.

    Ray Data's own iterator does so too, but has three tables in hand, which it takes from those that may be made.

    Args:
        shared, segment, row_nbytes, reading: As `planned_dataset` takes them.
        previous: The execution before, whose tables are taken first: together they hold no more than one may.
    """

    def __init__(
        self, shared: Any, segment: Iterable[Task], row_nbytes: int, reading: Reading, previous: _Execution | None
    ) -> None:
        unread = list(segment)
        self._left = len(unread)
        self._next: Consumer | None = None
        most = max(1, reading.store_nbytes // TASK_NBYTES - 1)  # beside the one that is used
        self._consumer = Consumer(previous._left if previous else 0, most)
        if previous:
            previous._next = self._consumer
        self._executor: Any = None
        self._is_closed = False
        self._wanted = threading.Semaphore()
        self._ready = SimpleQueue[pa.Table | BaseException | None]()
        arguments = (shared, unread, row_nbytes, reading)  # which the thread does not keep when it has ended
        self._thread = threading.Thread(target=self._run, args=arguments, name="raykeras-read", daemon=True)
        self._thread.start()

    def begin(self) -> None:
        """To be called before the first table is taken."""
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
        self._left -= 1
        if self._next:
            self._next.set_first(self._left)
        return table

    def close(self) -> None:
        """Ends the execution; its tasks are cancelled."""
        self._is_closed = True
        self._consumer.begin()
        self._consumer.take()
        self._wanted.release()
        if (executor := self._executor) is not None:
            executor.shutdown(force=False)
        self._thread.join()  # one that met a Ray that was shut down meanwhile would end the process

    def _run(self, shared: Any, segment: list[Task], row_nbytes: int, reading: Reading) -> None:
        import ray

        try:
            num_rows = [task.num_rows for task in segment]
            dataset = planned_dataset(
                _read, shared, segment, num_rows, row_nbytes=row_nbytes, reading=reading, consumer=self._consumer
            )
            bundles, _, self._executor = dataset._execute_to_iterator()
            segment.clear()  # Ray has them; its objects here refer to one another, and Python keeps such for long
            refs = itertools.chain.from_iterable(map(operator.attrgetter("block_refs"), bundles))
            tables = map(ray.get, refs)  # which holds none that was handed on
            try:
                self._wanted.acquire()
                while not self._is_closed:
                    self._ready.put(next(tables))
                    self._wanted.acquire()
            finally:
                self._executor.shutdown(force=False)
                self._executor = None
        except StopIteration:
            self._ready.put(None)
        except BaseException as error:  # raised in the thread that reads
            self._ready.put(error)


def _read(reader: Reader, layout: Layout, task: Task) -> pa.Table:
    return layout.pack(read_windows(reader, layout, task))
