"""A Ray Data dataset whose read tasks, and their order, are planned: one Arrow table for each item of a list."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa

from raykeras.compat.ray_data import ReadAhead, ReadLimits, configure
from raykeras.core.error_context import loading
from raykeras.core.errors import RaykerasError


class TaskFailure(Exception):
    """Carry a `RaykerasError` out of a task: Ray Data changes the message of an exception that it catches."""

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
    reading: ReadLimits,
    consumer: ReadAhead,
) -> Any:
    """Return a dataset with one read task, and one table, for each item.

    Args:
        read: `read(*shared, item)` returns the rows of an item. A module-level function.
        shared: Reference to a tuple in Ray's object store: the arguments that all items share.
        items: What to read; picklable.
        num_rows: Rows of each item.
        row_nbytes: Bytes of a row.
        reading: Limits for the execution.
        consumer: Counts the tables that are taken. Keep a reference to it for as long as tables remain.

    Returns:
        A `ray.data.Dataset` of the tables, in the order of `items`.
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


def _read_task(read: Callable[..., pa.Table], shared: Any, item: Any) -> Iterator[pa.Table]:
    import ray

    try:
        with loading(None):
            arguments = ray.get(shared)
        table = read(*arguments, item)
    except RaykerasError as error:
        raise TaskFailure(error) from None
    yield table
