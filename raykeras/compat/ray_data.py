"""Execute Ray Data datasets, and limit how far an execution reads ahead of its consumer."""

from __future__ import annotations

import itertools
import math
import operator
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from raykeras.compat.versions import TESTED, PrivateName, warn_once

CALLBACK = PrivateName(
    "ray.data._internal.execution.execution_callback:ExecutionCallback",
    "pause Ray Data's scheduling loop while it has nothing to do, and stop it",
    "the loop slows down training, and a stream that is closed first waits for the table that is being read",
)

_POLICIES, _RESOURCE_MANAGER = "_backpressure_policies", "_resource_manager"  # of an executor

INSTANCE_NAMES = (
    f"ray.data._internal.execution.streaming_executor.StreamingExecutor.{_POLICIES}",
    f"ray.data._internal.execution.streaming_executor.StreamingExecutor.{_RESOURCE_MANAGER}",
    "ray.data._internal.execution.resource_manager.ResourceManager._global_limits_last_update_time",
)
"""Attributes that are set in `__init__`."""

_CALLBACKS_KEY = "execution_callbacks"

_WAITED_S = 0.05
"""A longer iteration of Ray Data's scheduling loop has waited for its tasks, which it does for 0.1 s at most."""

_FIRST_PAUSE_S, _PAUSE_FACTOR, _LAST_PAUSE_S = 0.001, 5, 0.5


@dataclass(frozen=True)
class ReadLimits:
    """Cluster resources that a stream may use to read ahead.

    Attributes:
        cpus: Logical CPUs that may be in use at a time.
        store_nbytes: Bytes of the object store that may be in use.
        cpus_per_task: Logical CPUs that each task reserves.
    """

    cpus: float = 1
    store_nbytes: int = 256 << 20
    cpus_per_task: float = 1

    @property
    def num_tasks(self) -> int:
        """The number of tasks that may run at a time, at least 1."""
        return max(1, round(self.cpus / self.cpus_per_task))


def configure(context: Any, limits: ReadLimits, read_ahead: ReadAhead) -> None:
    """Set the execution options of a dataset.

    Args:
        context: The `DataContext` of the dataset.
        limits: Resources that the execution may use.
        read_ahead: Limits how many tables the execution produces ahead of its consumer.
    """
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = None  # Rows that are read together stay in one block.
    context.raise_original_map_exception = True  # Functions mapped over the tables raise errors of raykeras.
    context.memory_usage_poll_interval_s = None  # Otherwise each task starts a thread that polls its memory.
    context.downstream_capacity_backpressure_ratio = None  # It leaves CPUs idle; the limits below suffice.
    if callback := CALLBACK.find():
        _add_callback(context, pacing(callback, read_ahead.number))
    options = context.execution_options
    options.preserve_order = True
    options.resource_limits = options.resource_limits.copy(cpu=limits.cpus, object_store_memory=limits.store_nbytes)


def _add_callback(context: Any, callback: type) -> None:
    """Add an `ExecutionCallback` to the executions of a dataset."""
    if hasattr(context, "custom_execution_callback_classes"):
        context.custom_execution_callback_classes = [*context.custom_execution_callback_classes, callback]
    else:  # Ray 2.54 and earlier take instances
        context.set_config(_CALLBACKS_KEY, [*context.get_config(_CALLBACKS_KEY, []), callback()])


def execute(dataset: Any) -> Iterator[Any]:
    """Start to execute a dataset, and wait for its first block.

    The execution ends when the iterator is deleted, or by `ReadAhead.stop`.

    Returns:
        References to the blocks, in order.
    """
    # keeps no reference to a block that was taken
    bundles = map(operator.attrgetter("block_refs"), dataset.iter_internal_ref_bundles())
    return itertools.chain.from_iterable(bundles)


def executed_blocks(dataset: Any) -> list[tuple[Any, int, int]]:
    """Execute a dataset; return the reference, rows and bytes of each of its blocks, in order."""
    return [
        (ref, metadata.num_rows, metadata.size_bytes)
        for bundle in dataset.iter_internal_ref_bundles()
        for ref, metadata in zip(bundle.block_refs, bundle.metadata, strict=True)
    ]


class ReadAhead:
    """Tracks the tables that an execution has started and its consumer has taken. Thread-safe.

    Ray Data's scheduling loop runs in the consumer's process and finds its `ReadAhead` there by `number`.

    Args:
        first: Number of tables of the previous dataset that are taken before this dataset's.
        most: Maximum number of tables of both datasets that are being produced or wait to be taken.
    """

    def __init__(self, first: int = 0, most: float = math.inf) -> None:
        self.number = next(_numbers)
        self._changed = threading.Condition()
        self._taken, self._started, self._first, self._most = 0, 0, first, most
        self._is_requested = False
        self._executor: Callable[[], Any] = _nothing
        _read_aheads[self.number] = self

    def take(self) -> None:
        """Record that a table was taken, or that no more are needed."""
        with self._changed:
            self._taken += 1
            self._changed.notify_all()

    def set_first(self, num_tables: int) -> None:
        """Record that `num_tables` tables of the previous dataset are left."""
        with self._changed:
            self._first = num_tables
            self._changed.notify_all()

    def begin(self) -> None:
        """Record that this dataset's first table is requested, or that none is needed."""
        with self._changed:
            self._first, self._is_requested = 0, True
            self._changed.notify_all()

    def attach(self, executor: Any) -> None:
        """Record the executor, weakly: Ray Data ends an execution once nothing refers to it."""
        self._executor = weakref.ref(executor)

    def stop(self) -> None:
        """Shut the execution down, if it has started, and cancel its tasks."""
        self.begin()
        self.take()
        if (executor := self._executor()) is not None:
            executor.shutdown(force=False)

    def wait(self, taken: int, timeout_s: float) -> int:
        """Wait until the number of tables taken is no longer `taken`; return the number."""
        with self._changed:
            self._changed.wait_for(lambda: self._taken != taken, timeout_s)
            return self._taken

    def wait_for_capacity(self) -> None:
        """Wait until another task may start, or this dataset's tables are requested.

        When no task runs and no table is pending, Ray Data starts a task regardless of its backpressure policies.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._is_requested or not self._is_full())

    def may_start(self, num_started: int) -> bool:
        """Return whether another task may start after `num_started` have."""
        with self._changed:
            self._started = max(self._started, num_started)
            return not self._is_full()

    def _is_full(self) -> bool:
        return self._first + self._started - self._taken >= self._most


_numbers = itertools.count()

_read_aheads: weakref.WeakValueDictionary[int, ReadAhead] = weakref.WeakValueDictionary()


def _nothing() -> None:
    return None


def _read_ahead(number: int) -> ReadAhead:  # A function, since pickle stores it by name.
    return _read_aheads.get(number) or ReadAhead()


def pacing(base: Any, number: int) -> type:
    """Return a callback that limits an execution, and pauses Ray Data's scheduling loop while it has nothing to do.

    The loop runs in the consumer's process and holds the GIL, which slows training down. While the consumer is full,
    finished tasks make its `ray.wait` return at once, so that the loop would spin. An iteration that did not wait is
    therefore followed by a pause, which grows until a table is taken.

    Args:
        base: `ExecutionCallback` of Ray Data.
        number: Number of the `ReadAhead`, which Ray could not pickle with the class.
    """

    class Pacing(base):
        def __init__(self) -> None:
            self._read_ahead, self._taken = _read_ahead(number), 0
            self._pause_s, self._ended = 0.0, 0.0

        def __reduce__(self) -> Any:  # Ray 2.54 and earlier copy it with the dataset's context.
            return type(self), ()

        def before_execution_starts(self, executor: Any) -> None:
            self._read_ahead.attach(executor)
            _limit(executor, self._read_ahead)
            self._read_ahead.wait_for_capacity()

        def on_execution_step(self, executor: Any) -> None:
            self._read_ahead.wait_for_capacity()
            if time.monotonic() - self._ended >= _WAITED_S:
                self._pause_s = 0.0
            else:
                self._pause_s = min(max(_PAUSE_FACTOR * self._pause_s, _FIRST_PAUSE_S), _LAST_PAUSE_S)
                taken = self._read_ahead.wait(self._taken, self._pause_s)
                if taken != self._taken:
                    self._taken, self._pause_s = taken, 0.0
            self._ended = time.monotonic()

    return Pacing


def _limit(executor: Any, read_ahead: ReadAhead) -> None:
    """Add an `AdmissionPolicy` to an execution; warn once if this version of Ray Data has no place for it."""
    try:
        policies, resource_manager = getattr(executor, _POLICIES), getattr(executor, _RESOURCE_MANAGER)
    except AttributeError as error:
        warn_once(
            f"raykeras needs to limit how many tables a stream reads ahead: {error}. "
            "Without it, a stream may read twice as far ahead while one execution follows another. "
            f"Tested: ray{TESTED['ray']}."
        )
    else:
        policies.insert(0, AdmissionPolicy(read_ahead, resource_manager))


class AdmissionPolicy:
    """A backpressure policy that starts a task for each table taken from this or the previous dataset.

    The resource limits of Ray Data apply to each dataset separately; without the policy, two consecutive datasets
    would use twice the limits.

    Args:
        read_ahead: Tracks the tables.
        resource_manager: The resource limits of the execution.
    """

    name = "raykeras"

    def __init__(self, read_ahead: ReadAhead, resource_manager: Any) -> None:
        self._read_ahead, self._resource_manager = read_ahead, resource_manager

    def can_add_input(self, op: Any) -> bool:
        _refresh_limits(self._resource_manager)
        return self._read_ahead.may_start(op.metrics.num_tasks_submitted)

    def max_task_output_bytes_to_read(self, op: Any) -> None:
        """Set no limit."""


def _refresh_limits(resource_manager: Any) -> None:
    """Have Ray Data query the cluster's resources again while its limits are still zero.

    An actor answers the query. Ray Data would read the answer a second later, and run one task at a time until then.
    """
    if hasattr(resource_manager, "_global_limits_last_update_time") and not resource_manager.get_global_limits().cpu:
        resource_manager._global_limits_last_update_time = 0
