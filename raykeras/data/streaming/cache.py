"""In-memory cache of a source's rows.

The cache is a source with the units of the original one, so that the plan, and with it the order of rows, stays the
same. It holds the tensors of the batches, converted and stacked, or, if a `transform` makes new rows in every epoch,
the stored columns. Background threads fill it, without TensorFlow, which may be imported meanwhile.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa

from raykeras.core.errors import OptionError
from raykeras.data.batch_spec import BatchSpec, ElementSpec, concatenate_column, slice_rows
from raykeras.data.sources.arrays import ArrayReader
from raykeras.data.sources.base import Columns, Field, OpenSource, Source, UnitRef

AUTO_CACHE_BYTES = "RAYKERAS_AUTO_CACHE_BYTES"
"""Environment variable: the largest source, in bytes, that `cache="auto"` caches. Default: 1 GiB; 0 disables it."""

_AUTO_NBYTES = 1 << 30
_MAX_THREADS = 8


def should_cache(source: Source, opened: OpenSource, batch_spec: BatchSpec) -> bool:
    """Return whether to cache the rows of a source."""
    if opened.reader.in_memory or source.cache is None:
        return False
    if source.cache == "memory":
        return True
    if batch_spec.transform is not None or any(tensor.kind != "dense" for tensor in batch_spec.tensors):
        return False  # their size is unknown
    limit = min(_auto_nbytes(), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 8)
    return opened.num_rows * batch_spec.row_nbytes <= limit


def _auto_nbytes() -> int:
    text = os.environ.get(AUTO_CACHE_BYTES, str(_AUTO_NBYTES))
    if not text.isdecimal():
        raise OptionError(
            f"The environment variable {AUTO_CACHE_BYTES} must be a number of bytes, or 0 to disable automatic "
            f"caching; got {text!r}."
        )
    return int(text)


class CachedRows:
    """The cached rows of a source.

    Args:
        opened: The source.
        batch_spec: The tensors to make of its rows.
    """

    def __init__(self, opened: OpenSource, batch_spec: BatchSpec) -> None:
        self._opened, self._batch_spec = opened, batch_spec
        self._reader: CachedReader | None = None

    @property
    def reader(self) -> CachedReader:
        """The reader of the cache, which starts to fill if it has not yet."""
        self.start()
        assert self._reader is not None
        return self._reader

    def start(self) -> None:
        """Start to fill the cache in the background, unless that has been done."""
        if self._reader is None:
            self._reader = CachedReader(self._opened, self._batch_spec)

    def source(self, batch_spec: BatchSpec) -> tuple[OpenSource, BatchSpec]:
        """Return the cache as a source in memory, and the spec that makes the tensors of `batch_spec` from it."""
        starts = np.cumsum(self._opened.unit_rows) - self._opened.unit_rows
        opened = dataclasses.replace(self._opened, reader=self.reader, unit_start=starts)
        return opened, batch_spec if batch_spec.transform else _cached_spec(batch_spec)


class CachedReader(ArrayReader):
    """Read from the cache, waiting until it is filled."""

    def __init__(self, opened: OpenSource, batch_spec: BatchSpec) -> None:
        super().__init__(None)
        self._columns: Future[Columns] = Future()
        # A daemon, so that an interrupted program does not wait for it.
        threading.Thread(target=self._fill, args=(opened, batch_spec), name="raykeras-cache", daemon=True).start()

    @property
    def arrays(self) -> Columns:
        """The cached arrays by name; raises the exception that filling the cache raised."""
        if self._arrays is None and self._ref is None:
            self._arrays = self._columns.result()
        return super().arrays

    def __getstate__(self) -> dict[str, Any]:
        return {"_arrays": None if self._ref is not None else self.arrays, "_ref": self._ref}

    def read(self, unit: UnitRef, start: int, stop: int, columns: Sequence[str]) -> Columns:
        return {name: slice_rows(self.arrays[name], unit.start + start, unit.start + stop) for name in columns}

    def _fill(self, opened: OpenSource, batch_spec: BatchSpec) -> None:
        try:
            self._columns.set_result((_read_columns if batch_spec.transform else _read_tensors)(opened, batch_spec))
        except BaseException as error:  # raised in the thread that needs the rows
            self._columns.set_exception(error)


def _read_tensors(opened: OpenSource, batch_spec: BatchSpec) -> Columns:
    """Return the tensors of all rows, by the names that `_cache_name` gives them."""
    starts = np.cumsum(opened.unit_rows) - opened.unit_rows
    arrays = batch_spec.empty(opened.num_rows)
    unit_tensors: list[list[Any]] = [[None] * len(starts) for _ in arrays]

    def store(unit: int, columns: Columns, where: str) -> None:
        rows = slice(int(starts[unit]), int(starts[unit] + opened.unit_rows[unit]))
        for target, by_unit, tensor in zip(arrays, unit_tensors, batch_spec.assemble(columns, where), strict=True):
            if target is None:
                by_unit[unit] = tensor
            else:
                target[rows] = tensor

    _read_units(opened, batch_spec, store)
    cached = zip(batch_spec.tensors, arrays, unit_tensors, strict=True)
    return {
        _cache_name(tensor): pa.concat_arrays(by_unit) if target is None else target
        for tensor, target, by_unit in cached
        if _is_cached(tensor)
    }


def _read_columns(opened: OpenSource, batch_spec: BatchSpec) -> Columns:
    """Return the decoded columns of all rows, by name, as the transform takes them."""
    unit_columns: list[Columns] = [{} for _ in opened.unit_rows]
    _read_units(opened, batch_spec, lambda unit, columns, where: unit_columns[unit].update(columns))
    all_columns: Columns = {}
    for name in batch_spec.columns:
        all_columns[name] = concatenate_column(name, [columns.pop(name) for columns in unit_columns])
    return all_columns


def _read_units(opened: OpenSource, batch_spec: BatchSpec, store: Callable[[int, Columns, str], None]) -> None:
    """Read and decode every unit in several threads, which call `store(unit, columns, where)`."""
    num_threads = min(_MAX_THREADS, os.cpu_count() or 1)

    def read(first: int) -> None:
        reader = copy.copy(opened.reader)  # a reader's open files must not be shared between threads
        for unit in range(first, len(opened.unit_rows), num_threads):
            ref = opened.unit(unit)
            stored = reader.read(ref, 0, int(opened.unit_rows[unit]), batch_spec.columns)
            store(unit, batch_spec.decode(stored, str(ref)), str(ref))

    with ThreadPoolExecutor(num_threads, thread_name_prefix="raykeras-cache") as pool:
        list(pool.map(read, range(num_threads)))


def _cache_name(tensor: ElementSpec) -> str:
    """Return the name of a cached tensor, which errors show: its label, and its column if it has a single one."""
    return f"{tensor.label}: {tensor.columns[0]}" if len(tensor.columns) == 1 else tensor.label


def _is_cached(tensor: ElementSpec) -> bool:
    """Return False for weights that are all one, which need no storage."""
    return bool(tensor.columns) or bool(tensor.class_weight)


def _cached_spec(batch_spec: BatchSpec) -> BatchSpec:
    """Return the spec that makes the same tensors from the cache."""
    tensors, fields = [], []
    for tensor in batch_spec.tensors:
        if _is_cached(tensor):
            kind: Any = {"dense": "dense", "string": "string", "ragged": "list"}[tensor.kind]
            fields.append(Field(_cache_name(tensor), kind, tensor.dtype, tensor.shape))
            tensor = dataclasses.replace(tensor, columns=(_cache_name(tensor),), class_weight=(), class_column=None)
        tensors.append(tensor)
    ragged = tuple(field.name for field in fields if field.kind == "list")
    return dataclasses.replace(batch_spec, tensors=tuple(tensors), stored=tuple(fields), pad={}, ragged=ragged, fill={})
