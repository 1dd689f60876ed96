"""Ray Data, told exactly what to read, and in which order.

Enters: a list of things to read and a function that reads one. Leaves: a Ray Data dataset of one
Arrow table for each, in the order of the list.
"""

from __future__ import annotations

import functools
import itertools
import math
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

    @property
    def num_tasks(self) -> int:
        """How many may run at a time."""
        return max(1, round(self.cpus / self.cpus_per_task))


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
    consumer: Consumer,
) -> Any:
    """A dataset that is read item by item.

    Args:
        read: `read(*shared, item)` gives an item's rows. A function of a module.
        shared: Reference, in Ray's object store, to a tuple that all items need.
        items: What to read; picklable.
        num_rows: Rows of each.
        row_nbytes: Bytes of a row.
        reading: Limits.
        consumer: Told of each table that is taken; to be kept as long as there are any.
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
    configure(dataset.context, reading, consumer)
    return dataset


def configure(context: Any, reading: Reading, consumer: Consumer) -> None:
    """Sets how a dataset is executed, in its context."""
    from ray.data._internal.execution.backpressure_policy import (
        ENABLED_BACKPRESSURE_POLICIES,
        ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY,
    )

    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = None  # what is read together stays one block
    context.raise_original_map_exception = True  # what is mapped over the tables raises errors of ours, too
    context.memory_usage_poll_interval_s = None  # else each task starts a thread that looks at its memory
    context.downstream_capacity_backpressure_ratio = None  # of 16 CPUs 4 more rested; the limits below suffice
    context.custom_execution_callback_classes = [*context.custom_execution_callback_classes, _pacing(consumer.number)]
    policies = context.get_config(ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY, ENABLED_BACKPRESSURE_POLICIES)
    context.set_config(ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY, [_turn(consumer.number), *policies])
    options = context.execution_options
    options.preserve_order = True
    options.resource_limits = options.resource_limits.copy(cpu=reading.cpus, object_store_memory=reading.store_nbytes)


class Consumer:
    """What Ray Data's loop over the tasks of a dataset knows of what takes its tables, in its process. Thread-safe.

    Args:
        first: Tables of another dataset that are taken before.
        most: Tables of both that may be made, or have been and wait.
    """

    def __init__(self, first: int = 0, most: float = math.inf) -> None:
        self.number = next(_numbers)
        self._changed = threading.Condition()
        self._taken, self._started, self._first, self._most = 0, 0, first, most
        self._is_its_turn = False
        _consumers[self.number] = self

    def take(self) -> None:
        """To be called when a table was taken, or no more are wanted."""
        with self._changed:
            self._taken += 1
            self._changed.notify_all()

    def set_first(self, num_tables: int) -> None:
        """To be called when a table of the other dataset was taken: so many are left."""
        with self._changed:
            self._first = num_tables
            self._changed.notify_all()

    def begin(self) -> None:
        """To be called when the first of this dataset's tables is asked for, or none is wanted."""
        with self._changed:
            self._first, self._is_its_turn = 0, True
            self._changed.notify_all()

    def wait(self, taken: int, timeout_s: float) -> int:
        """Waits until other than so many tables were taken; returns how many were."""
        with self._changed:
            self._changed.wait_for(lambda: self._taken != taken, timeout_s)
            return self._taken

    def wait_for_room(self) -> None:
        """Waits until another task may start, or this dataset's tables are asked for.

        Ray Data starts a task whatever its policies say, where none runs and no table waits that it has not handed on.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._is_its_turn or not self._is_full())

    def may_start(self, num_started: int) -> bool:
        """Whether another task may start, where so many have."""
        with self._changed:
            self._started = max(self._started, num_started)
            return not self._is_full()

    def _is_full(self) -> bool:
        return self._first + self._started - self._taken >= self._most


_numbers = itertools.count()
_consumers: weakref.WeakValueDictionary[int, Consumer] = weakref.WeakValueDictionary()


def _consumer(number: int) -> Consumer:  # a function, which pickle finds by its name
    return _consumers.get(number) or Consumer()


def _pacing(number: int) -> Any:
    """Makes Ray Data's loop over its tasks pause while there is nothing for it to do, and else begin at once.

    While the consumer has all that it may hold, tasks with something to hand over make `ray.wait` return at once, and
    the loop, which runs in the consumer's process, takes half a core and Python's lock: a training in that process
    took four times as long. A turn that did not wait pauses, for longer each time, until a table is taken: it takes
    more than a millisecond of Python's lock, and most slow steps of a training were slow beside one.

    What the cluster has is asked of an actor, and until the answer is looked at, a second later, a dataset has one
    task at a time.

    Args:
        number: Of the `Consumer`, which Ray could not pickle with the class.
    """
    from ray.data._internal.execution.execution_callback import ExecutionCallback

    class Pacing(ExecutionCallback):
        def __init__(self) -> None:
            self._consumer, self._taken = _consumer(number), 0
            self._pause_s, self._ended = 0.0, 0.0

        def before_execution_starts(self, executor: Any) -> None:
            _ask_for_limits(executor)
            self._consumer.wait_for_room()

        def on_execution_step(self, executor: Any) -> None:
            _ask_for_limits(executor)
            self._consumer.wait_for_room()
            if time.monotonic() - self._ended >= _WAITED_S:
                self._pause_s = 0.0
            else:
                self._pause_s = min(max(_PAUSE_FACTOR * self._pause_s, _FIRST_PAUSE_S), _LAST_PAUSE_S)
                taken = self._consumer.wait(self._taken, self._pause_s)
                if taken != self._taken:
                    self._taken, self._pause_s = taken, 0.0
            self._ended = time.monotonic()

    return Pacing


def _ask_for_limits(executor: Any) -> None:
    """Has Ray Data look again for what it may use, as long as that is nothing."""
    manager = executor._resource_manager
    if not manager.get_global_limits().cpu:
        manager._global_limits_last_update_time = 0


def _turn(number: int) -> Any:
    """Lets a dataset start a task for each table that is taken, of the dataset before or its own.

    Each would otherwise hold as much as one may: a dataset's limits are for itself, and are set when it begins.

    Args:
        number: Of the `Consumer` of both.
    """
    from ray.data._internal.execution.backpressure_policy import BackpressurePolicy

    class Turn(BackpressurePolicy):
        def can_add_input(self, op: Any) -> bool:
            return _consumer(number).may_start(op.metrics.num_tasks_submitted)

    return Turn


def _read_task(read: Callable[..., pa.Table], shared: Any, item: Any) -> Iterator[pa.Table]:
    import ray

    try:
        with loading(None):
            needed = ray.get(shared)
        table = read(*needed, item)
    except RaykerasError as error:
        raise TaskFailure(error) from None
    yield table
