"""Rows that are read once and held, where they fit in memory.

Enters: an open source and its layout. Leaves: the same rows as a source in memory, in the same units, so that the
plan, and with it the order of rows, is the one that they would have had from storage.

Reading takes place in threads of this process, from when it is asked for until somebody needs a row; TensorFlow may be
imported meanwhile. What is held is what a batch is made of, converted and stacked; where a `transform` makes rows anew
in every epoch, it is the stored columns.
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

from raykeras.columns import Layout, Tensor, cut, joined
from raykeras.errors import OptionError
from raykeras.sources import Columns, Field, OpenSource, Source, UnitRef
from raykeras.sources.arrays import ArrayReader

AUTO_CACHE_BYTES = "RAYKERAS_AUTO_CACHE_BYTES"
"""Environment variable: the most bytes that `cache="auto"` keeps in memory, by default 1 GiB; 0 turns it off."""

_AUTO_NBYTES = 1 << 30

_MAX_THREADS = 8


def is_held(source: Source, opened: OpenSource, layout: Layout) -> bool:
    """Whether a source's rows are to be held."""
    if opened.reader.in_memory or source.cache is None:
        return False
    if source.cache == "memory":
        return True
    if layout.transform is not None or any(tensor.kind != "dense" for tensor in layout.tensors):
        return False  # of which it is not known how large they are
    limit = min(_auto_nbytes(), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 8)
    return opened.num_rows * layout.row_nbytes <= limit


def _auto_nbytes() -> int:
    text = os.environ.get(AUTO_CACHE_BYTES, str(_AUTO_NBYTES))
    if not text.isdecimal():
        raise OptionError(
            f"The environment variable {AUTO_CACHE_BYTES} must be a number of bytes, 0 for no automatic cache; got "
            f"{text!r}."
        )
    return int(text)


class Held:
    """The rows of a source, on their way into memory or there.

    Args:
        opened, layout: The source, and what is made of it.
    """

    def __init__(self, opened: OpenSource, layout: Layout) -> None:
        self._opened, self._layout = opened, layout
        self._reader: HeldReader | None = None

    @property
    def reader(self) -> HeldReader:
        """Reads what is held."""
        self.start()
        assert self._reader is not None
        return self._reader

    def start(self) -> None:
        """Begins to read, if that was not done yet."""
        if self._reader is None:
            self._reader = HeldReader(self._opened, self._layout)

    def source(self, layout: Layout) -> tuple[OpenSource, Layout]:
        """The rows as a source in memory, and what makes the tensors of `layout` of them."""
        starts = np.cumsum(self._opened.unit_rows) - self._opened.unit_rows
        opened = dataclasses.replace(self._opened, reader=self.reader, unit_start=starts)
        return opened, layout if layout.transform else _of_tensors(layout)


class HeldReader(ArrayReader):
    """Reads what is held, and waits until it is."""

    def __init__(self, opened: OpenSource, layout: Layout) -> None:
        super().__init__(None)
        self._read: Future[Columns] = Future()
        # of a thread that is no daemon an interrupted program would wait for the end
        threading.Thread(target=self._fill, args=(opened, layout), name="raykeras-held", daemon=True).start()

    @property
    def arrays(self) -> Columns:
        """Raises what reading raised."""
        if self._arrays is None and self._ref is None:
            self._arrays = self._read.result()
        return super().arrays

    def __getstate__(self) -> dict[str, Any]:
        return {"_arrays": None if self._ref is not None else self.arrays, "_ref": self._ref}

    def read(self, unit: UnitRef, start: int, stop: int, columns: Sequence[str]) -> Columns:
        return {name: cut(self.arrays[name], unit.start + start, unit.start + stop) for name in columns}

    def _fill(self, opened: OpenSource, layout: Layout) -> None:
        try:
            self._read.set_result((_stored_columns if layout.transform else _tensors)(opened, layout))
        except BaseException as error:  # raised in the thread that needs the rows
            self._read.set_exception(error)


def _tensors(opened: OpenSource, layout: Layout) -> Columns:
    """All rows as what batches are made of, by the tensors' labels."""
    starts = np.cumsum(opened.unit_rows) - opened.unit_rows
    whole = layout.empty(opened.num_rows)
    parts: list[list[Any]] = [[None] * len(starts) for _ in whole]

    def take(unit: int, columns: Columns, where: str) -> None:
        rows = slice(int(starts[unit]), int(starts[unit] + opened.unit_rows[unit]))
        for target, gathered, tensor in zip(whole, parts, layout.assemble(columns, where), strict=True):
            if target is None:
                gathered[unit] = tensor
            else:
                target[rows] = tensor

    _read_units(opened, layout, take)
    held = zip(layout.tensors, whole, parts, strict=True)
    return {
        _name(tensor): pa.concat_arrays(gathered) if target is None else target
        for tensor, target, gathered in held
        if _is_stored(tensor)
    }


def _stored_columns(opened: OpenSource, layout: Layout) -> Columns:
    """All rows as a transform takes them, by the columns' names."""
    parts: list[Columns] = [{} for _ in opened.unit_rows]
    _read_units(opened, layout, lambda unit, columns, where: parts[unit].update(columns))
    whole: Columns = {}
    for name in layout.columns:
        whole[name] = joined(name, [part.pop(name) for part in parts])
    return whole


def _read_units(opened: OpenSource, layout: Layout, take: Callable[[int, Columns, str], None]) -> None:
    """Gives `take` the decoded columns of each unit, from several threads."""
    num_threads = min(_MAX_THREADS, os.cpu_count() or 1)

    def read(first: int) -> None:
        reader = copy.copy(opened.reader)  # its open files are one thread's
        for unit in range(first, len(opened.unit_rows), num_threads):
            ref = opened.unit(unit)
            stored = reader.read(ref, 0, int(opened.unit_rows[unit]), layout.columns)
            take(unit, layout.decode(stored, str(ref)), str(ref))

    with ThreadPoolExecutor(num_threads, thread_name_prefix="raykeras-held") as pool:
        list(pool.map(read, range(num_threads)))


def _name(tensor: Tensor) -> str:
    """Return the name that a tensor is held by, which errors tell: its label, and its column where it has one."""
    return f"{tensor.label}: {tensor.columns[0]}" if len(tensor.columns) == 1 else tensor.label


def _is_stored(tensor: Tensor) -> bool:
    """Whether it is more than weights of one."""
    return bool(tensor.columns) or bool(tensor.class_weight)


def _of_tensors(layout: Layout) -> Layout:
    """Makes the same tensors of what is held."""
    tensors, fields = [], []
    for tensor in layout.tensors:
        if _is_stored(tensor):
            kind: Any = {"dense": "dense", "string": "string", "ragged": "list"}[tensor.kind]
            fields.append(Field(_name(tensor), kind, tensor.dtype, tensor.shape))
            tensor = dataclasses.replace(tensor, columns=(_name(tensor),), class_weight=(), class_column=None)
        tensors.append(tensor)
    ragged = tuple(field.name for field in fields if field.kind == "list")
    return dataclasses.replace(layout, tensors=tuple(tensors), stored=tuple(fields), pad={}, ragged=ragged, fill={})
