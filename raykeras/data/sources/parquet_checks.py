"""Check, by the footers, whether columns of Parquet files can be used.

What footers do not show, such as lists of different lengths in one row group, is checked when the rows are read.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence

from raykeras.core.errors import ColumnError, SourceError, ValidationError
from raykeras.data.sources.base import Field, Source
from raykeras.data.sources.parquet_footers import Footer


class UnreadableColumn(ColumnError):
    """A column that differs between files, or that shares its name with another."""


Files = Sequence[tuple[str, Footer]]
"""Pairs of path and footer."""


def check_columns(
    source: Source, files: Files, fields: Mapping[str, Field], names: Iterable[str]
) -> tuple[dict[str, Field], dict[str, ValidationError]]:
    """Find the columns that cannot be used.

    Args:
        source: The source, with its `fill`, `pad` and `ragged`.
        files: Its files.
        fields: The columns of the first file.
        names: Columns to check; all others are checked only for encryption.

    Returns:
        The fields, in which lists that all have the same length have it as their shape; and the error for each column
        that cannot be used.
    """
    encrypted = frozenset[str]().union(*(footer.encrypted for _, footer in files))
    first = files[0][1].schema
    others = [(path, f) for path, f in files[1:] if f.schema is not first and not f.schema.equals(first)]
    checked, errors = dict(fields), dict[str, ValidationError]()
    for name in dict.fromkeys([*names, *sorted(encrypted)]):
        is_list = name in fields and fields[name].kind == "list"
        list_files = files if is_list and name not in (*source.pad, *source.ragged) else ()
        checks: tuple[Iterator[ValidationError], ...] = (
            _encryption(name, files if name in encrypted else ()),
            _duplicates(name, [files[0], *others]),
            _types(name, files[0], others),
            _lengths(name, list_files),
            _nulls(name, files if not is_list and name not in source.fill else ()),
        )
        error = next(itertools.chain.from_iterable(checks), None)
        if error is not None:
            errors[name] = error
        elif (
            length := next((v // n for _, footer in list_files for _, v, n in footer.lengths.get(name, ())), None)
        ) is not None:
            checked[name] = dataclasses.replace(fields[name], shape=(length,))
    return checked, errors


def _encryption(name: str, files: Files) -> Iterator[SourceError]:
    for path, footer in files:
        if name in footer.encrypted:
            yield SourceError(
                f"Columns must be readable without a key; {name!r} is encrypted in file {path}, as are all of "
                f"{', '.join(map(repr, sorted(footer.encrypted)))}. Write it without encryption, or use other columns."
            )


def _duplicates(name: str, files: Files) -> Iterator[UnreadableColumn]:
    for path, footer in files:
        if (number := footer.schema.names.count(name)) > 1:
            yield UnreadableColumn(
                f"Columns must have different names; {number} are named {name!r} in file {path}. Rename them when you "
                "write the data."
            )


def _types(name: str, first: tuple[str, Footer], others: Files) -> Iterator[UnreadableColumn]:
    for path, footer in others:
        a, b = (s.field(name).type if name in s.names else None for s in (first[1].schema, footer.schema))
        if a != b:
            yield UnreadableColumn(
                f"A column must have the same type in all files; {name!r} is {a or 'missing'} in {first[0]} and "
                f"{b or 'missing'} in {path}. Write the files with one schema, or read them as two sources."
            )


def _nulls(name: str, files: Files) -> Iterator[ColumnError]:
    for path, footer in files:
        if name in footer.nulls:
            group, nulls = footer.nulls[name]
            yield ColumnError(
                f"x, y and sample_weight must not contain nulls; column {name!r} has {nulls:,} in file {path}, "
                f"row group {group}. Pass `fill={{{name!r}: value}}`, or drop those rows."
            )


def _lengths(name: str, files: Files) -> Iterator[ColumnError]:
    first: tuple[int, str] | None = None
    for path, footer in files:
        for group, values, rows in footer.lengths.get(name, ()):
            where = f"file {path}, row group {group}"
            length, rest = divmod(values, rows)
            first = first or (length, where)
            if rest or length != first[0]:
                yield ColumnError(
                    f"All rows of a tensor must have the same shape; the lists of column {name!r} have "
                    f"{values / rows:g} values on average in {where} and {first[0]:g} in {first[1]}. "
                    f"Pass `pad={{{name!r}: length}}` or `ragged=[{name!r}]`."
                )
