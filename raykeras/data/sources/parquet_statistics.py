"""Nulls and ranges of columns, and the sizes of row groups, from the footers of Parquet files."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raykeras.core.errors import SourceError
from raykeras.data.sources.base import OpenSource
from raykeras.data.sources.parquet import ParquetSource
from raykeras.data.sources.parquet_footers import first_line, leaf_columns

_MAX_FILES, _MAX_CHUNKS, _THREADS = 256, 400_000, 16


@dataclass
class ColumnStatistics:
    """What footers say about a column.

    Attributes:
        num_nulls: Rows that are null; None if a row group has no such statistic, or it is not known
            whether rows or elements are null.
        range: Least and greatest number, also of the elements of tensors and lists; None if a row group that has
            values has no such statistic.
    """

    num_nulls: int | None = 0
    range: tuple[Any, Any] | None = None
    _has_range: bool = True

    def add(self, chunk: pq.ColumnChunkMetaData, is_nested: bool) -> None:
        """Add a row group; the nulls of a nested column may be elements, or empty lists."""
        statistics = chunk.statistics if chunk.is_stats_set else None
        nulls = statistics.null_count if statistics is not None and statistics.has_null_count else None
        if nulls is None or self.num_nulls is None or (is_nested and nulls):
            self.num_nulls = None
        else:
            self.num_nulls += nulls
        if nulls == chunk.num_values:
            return
        limits = (statistics.min, statistics.max) if statistics is not None and statistics.has_min_max else ()
        if not limits or not all(isinstance(n, int | float) and math.isfinite(n) for n in limits):
            self.range, self._has_range = None, False
        elif self._has_range:
            low, high = self.range or limits
            self.range = (min(low, limits[0]) + 0, max(high, limits[1]) + 0)  # -0.0 is written for 0.0


@dataclass(frozen=True)
class FooterStatistics:
    """Statistics of the files of a source.

    Attributes:
        columns: The statistics of columns that are stored as one leaf, are not encrypted and are in all files.
        num_files: Files whose footers were read.
        is_complete: Whether these are all files and row groups.
        group_nbytes: Uncompressed bytes of each row group: int64 (groups,).
    """

    columns: Mapping[str, ColumnStatistics] = field(default_factory=dict)
    num_files: int = 0
    is_complete: bool = False
    group_nbytes: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))


def footer_statistics(source: ParquetSource, opened: OpenSource) -> FooterStatistics:
    """Read the statistics of up to 256 files, which are spread over the source.

    Args:
        source: The source.
        opened: Its metadata, read for all columns, so that encrypted columns are known.

    Raises:
        SourceError: If a file cannot be read.
    """
    fs = fsspec.core.url_to_fs(source.paths[0], **dict(source.storage_options or {}))[0]
    chosen = np.unique(np.linspace(0, len(opened.files) - 1, _MAX_FILES).astype(int))
    encrypted = {name for name, error in opened.unusable.items() if isinstance(error, SourceError)}

    def read(path: str) -> pq.FileMetaData:
        try:
            with fs.open(path, "rb") as file:
                return pq.read_metadata(file)
        except (pa.ArrowException, OSError) as error:
            raise SourceError(f"The files of a source must be readable; {path!r} is not: {first_line(error)}") from None

    with ThreadPoolExecutor(_THREADS) as pool:
        footers = list(pool.map(read, (opened.files[i] for i in chosen)))
    columns: dict[str, ColumnStatistics] = {}
    num_files_of: Counter[str] = Counter()
    nbytes: list[int] = []
    num_chunks = 0
    for footer in footers:
        schema = footer.schema.to_arrow_schema()
        leaves = _single_leaves(leaf_columns(schema), encrypted)
        num_files_of.update(leaves.values())
        nested = {name for name in leaves.values() if _is_nested(schema.field(name).type)}
        for g in range(footer.num_row_groups):
            group = footer.row_group(g)
            nbytes.append(group.total_byte_size)
            num_chunks += len(leaves)
            if num_chunks <= _MAX_CHUNKS:
                for j, name in leaves.items():
                    columns.setdefault(name, ColumnStatistics()).add(group.column(j), name in nested)
    everywhere = {name: column for name, column in columns.items() if num_files_of[name] == len(footers)}
    is_complete = len(chosen) == len(opened.files) and num_chunks <= _MAX_CHUNKS
    return FooterStatistics(everywhere, len(footers), is_complete, np.array(nbytes, np.int64))


def _single_leaves(names: Sequence[str], encrypted: Collection[str]) -> dict[int, str]:
    """Return the leaves, with their columns, of columns that have one leaf and a name of their own."""
    counts = Counter(names)
    return {j: name for j, name in enumerate(names) if counts[name] == 1 and name not in encrypted}


def _is_nested(kind: pa.DataType) -> bool:
    return pa.types.is_nested(kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind)
