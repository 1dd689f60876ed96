"""Warnings about how a source is stored: row groups and files that are too large, too small or of uneven size."""

from __future__ import annotations

import numpy as np

from raykeras.data.plan import default_num_shards
from raykeras.data.sources.base import OpenSource

_LARGE_NBYTES = 256 << 20  # of a row group: fit decodes several at a time

_SMALL_NBYTES, _MANY_GROUPS = 64 << 10, 1000

_CUT_NBYTES = 16 << 20  # smaller row groups are cheap to decode more than once

_UNEVEN = 10  # times the median


def storage_warnings(opened: OpenSource, group_nbytes: np.ndarray) -> list[str]:
    """Return what is unfavorable about a source's files and row groups.

    Args:
        opened: The source.
        group_nbytes: Uncompressed bytes of its row groups, or of some of them: int64 (groups,). Empty if it has none.
    """
    return [*_group_warnings(opened, group_nbytes), *_file_warnings(opened)]


def _group_warnings(opened: OpenSource, group_nbytes: np.ndarray) -> list[str]:
    if not len(group_nbytes):
        return []
    num_groups, largest, shards = len(opened.unit_rows), int(group_nbytes.max()), default_num_shards(1)
    warnings = []
    if largest > _LARGE_NBYTES:
        warnings.append(
            f"Row groups are too large to shuffle in little memory: the largest has {largest / 2**20:,.0f} MiB, and "
            f"about {shards} are in memory at a time. Write them with a smaller `row_group_size`."
        )
    if num_groups < shards and largest > _CUT_NBYTES:
        warnings.append(
            f"There are too few row groups ({num_groups}): rows are shuffled in {shards} parts, so each row group is "
            "decoded several times per epoch. Write the data with a smaller `row_group_size`."
        )
    if num_groups > _MANY_GROUPS and np.median(group_nbytes) < _SMALL_NBYTES:
        warnings.append(
            f"Row groups are too small to read fast: half of {num_groups:,} have less than "
            f"{np.median(group_nbytes) / 2**10:,.0f} KiB. Write them with a larger `row_group_size`, such as 10,000."
        )
    return warnings


def _file_warnings(opened: OpenSource) -> list[str]:
    rows = np.bincount(opened.unit_file, opened.unit_rows, len(opened.files)).astype(np.int64)
    if len(rows) < 2:
        return []
    warnings = []
    if num_empty := int((rows == 0).sum()):
        warnings.append(f"{num_empty:,} of {len(rows):,} files have no rows.")
    largest = int(rows.argmax())
    if rows[largest] > _UNEVEN * max(1, np.median(rows)):
        warnings.append(
            f"Files are skewed: {opened.files[largest]!r} has {rows[largest] / rows.sum():.0%} of the rows. Workers "
            "share row groups, not files, so training is balanced; `validation_split` takes the rows of the last files."
        )
    return warnings
