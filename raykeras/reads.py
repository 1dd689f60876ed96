"""Ray Data, told exactly what to read, and in which order.

Enters: a list of things to read and a function that reads one. Leaves: a Ray Data dataset of one
Arrow table for each, in the order of the list.
"""

from __future__ import annotations

import functools
import itertools
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from raykeras.errors import RaykerasError, loading

_WAITED_S = 0.05  # a turn of Ray Data's loop that takes longer has waited for its tasks; they wait for 0.1 s at most
_FIRST_PAUSE_S, _PAUSE_FACTOR, _LAST_PAUSE_S = 0.001, 5, 0.5


@dataclass(frozen=True)
class Reading:
    """What a stream may use of the cluster to read ahead.

    Attributes:
        cpus: Logical CPUs that may work for it at a time.
        store_nbytes: Bytes of the object store that may be held for it.
        cpus_per_task: Logical CPUs that one task takes.
    """

    cpus: float = 1
    store_nbytes: int = 256 << 20
    cpus_per_task: float = 1


class TaskFailure(Exception):
    """Carries an exception of ours out of a task; Ray Data adds to the message of what it catches."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__(str(cause))
        self.cause = cause

    def __reduce__(self) -> tuple[Any, ...]:
        return (TaskFailure, (self.cause,))


def planned_dataset(
    read: Callable[..., pa.Table],
    shared: Any,
    items: Sequence[Any],
    num_rows: Sequence[int],
    *,
    row_nbytes: int,
    reading: Reading,
    bell: Bell,
) -> Any:
    """A dataset that is read item by item.

    Args:
        read: `read(*shared, item)` gives an item's rows. A function of a module.
        shared: Reference, in Ray's object store, to a tuple that all items need.
        items: What to read; picklable.
        num_rows: Rows of each.
        row_nbytes: Bytes of a row.
        reading: Limits.
        bell: Rung by the consumer, who keeps it as long as it reads.
    """
    import ray
    from ray.data.block import BlockMetadata
    from ray.data.datasource import Datasource, ReadTask

    class PlannedDatasource(Datasource):
        """One read task for each item."""

        def get_name(self) -> str:
            return "Planned"

        def estimate_inmemory_data_size(self) -> int:
            return sum(num_rows) * row_nbytes

        def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[Any]:
            return [
                ReadTask(
                    functools.partial(_read_task, read, shared, item),
                    BlockMetadata(num_rows=rows, size_bytes=rows * row_nbytes, input_files=None, exec_stats=None),
                )
                for item, rows in zip(items, num_rows, strict=True)
            ]

    dataset = ray.data.read_datasource(
        PlannedDatasource(), num_cpus=reading.cpus_per_task, override_num_blocks=len(items)
    )
    context = dataset.context
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = None  # what is read together stays one block
    context.raise_original_map_exception = True  # what is mapped over the tables raises errors of ours, too
    context.memory_usage_poll_interval_s = None  # else each task starts a thread that looks at its memory
    context.custom_execution_callback_classes = [*context.custom_execution_callback_classes, _pacing(bell.number)]
    options = context.execution_options
    options.preserve_order = True
    options.resource_limits = options.resource_limits.copy(cpu=reading.cpus, object_store_memory=reading.store_nbytes)
    return dataset


class Bell:
    """Wakes Ray Data's loop over the tasks of one dataset, in the process that consumes it. Thread-safe."""

    def __init__(self) -> None:
        self.number = next(_numbers)
        self._condition, self._rung = threading.Condition(), 0
        _bells[self.number] = self

    def ring(self) -> None:
        """To be called when a table was taken, or no more are wanted."""
        with self._condition:
            self._rung += 1
            self._condition.notify_all()

    def wait(self, heard: int, timeout_s: float) -> int:
        """Waits until it was rung more often than `heard`; returns how often it was."""
        with self._condition:
            self._condition.wait_for(lambda: self._rung != heard, timeout_s)
            return self._rung


_numbers = itertools.count()
_bells: weakref.WeakValueDictionary[int, Bell] = weakref.WeakValueDictionary()


def _bell(number: int) -> Bell:  # a function, which pickle finds by its name
    return _bells.get(number) or Bell()


def _pacing(number: int) -> Any:
    """Makes Ray Data's loop over its tasks pause while there is nothing for it to do.

    While the consumer has all that it may hold, tasks with something to hand over make `ray.wait` return at once, and
    the loop, which runs in the consumer's process, takes half a core and Python's lock: a training in that process
    took four times as long. A turn that did not wait pauses, for longer each time, until a table is taken: it takes
    more than a millisecond of Python's lock, and most slow steps of a training were slow beside one.

    Args:
        number: Of the `Bell` that says so, which Ray could not pickle with the class.
    """
    from ray.data._internal.execution.execution_callback import ExecutionCallback

    class Pacing(ExecutionCallback):
        def __init__(self) -> None:
            self._bell, self._heard = _bell(number), 0
            self._pause_s, self._ended = 0.0, 0.0

        def on_execution_step(self, executor: Any) -> None:
            if time.monotonic() - self._ended >= _WAITED_S:
                self._pause_s = 0.0
            else:
                self._pause_s = min(max(_PAUSE_FACTOR * self._pause_s, _FIRST_PAUSE_S), _LAST_PAUSE_S)
                heard = self._bell.wait(self._heard, self._pause_s)
                if heard != self._heard:
                    self._heard, self._pause_s = heard, 0.0
            self._ended = time.monotonic()

    return Pacing


def _read_task(read: Callable[..., pa.Table], shared: Any, item: Any) -> Iterator[pa.Table]:
    import ray

    try:
        with loading(None):
            needed = ray.get(shared)
        table = read(*needed, item)
    except RaykerasError as error:
        raise TaskFailure(error) from None
    yield table
