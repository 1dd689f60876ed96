"""Whether columns of Parquet files can be used, as far as the footers tell; the rest is checked when it is read.

Enters: the files of a source with their footers, and columns. Leaves: the error of each column that cannot be used,
and the shapes of lists that all have one length.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence

from raykeras.errors import ColumnError, SourceError, ValidationError
from raykeras.sources import Field, Source
from raykeras.sources.footers import Footer

Files = Sequence[tuple[str, Footer]]
"""Paths and footers."""


def check_columns(
    source: Source, files: Files, fields: Mapping[str, Field], names: Iterable[str]
) -> tuple[dict[str, Field], dict[str, ValidationError]]:
    """Find the columns that cannot be used.

    Args:
        source: With its `fill`, `pad` and `ragged`.
        files: Its files.
        fields: The columns of the first file.
        names: Columns to check; whether a column is encrypted is said of all.

    Returns:
        The fields, those of lists that all have one length with that as their shape; and the error of each column
        that cannot be used.
    """
    encrypted = frozenset[str]().union(*(footer.encrypted for _, footer in files))
    first = files[0][1].schema
    others = [(path, f) for path, f in files[1:] if f.schema is not first and not f.schema.equals(first)]
    checked, errors = dict(fields), dict[str, ValidationError]()
    for name in dict.fromkeys([*names, *sorted(encrypted)]):
        is_list = name in fields and fields[name].kind == "list"
        listed = files if is_list and name not in (*source.pad, *source.ragged) else ()
        checks: tuple[Iterator[ValidationError], ...] = (
            _encryption(name, files if name in encrypted else ()),
            _types(name, files[0], others),
            _lengths(name, listed),
            _nulls(name, files if not is_list and name not in source.fill else ()),
        )
        error = next(itertools.chain.from_iterable(checks), None)
        if error is not None:
            errors[name] = error
        elif (
            length := next((v // n for _, footer in listed for _, v, n in footer.lengths.get(name, ())), None)
        ) is not None:
            checked[name] = dataclasses.replace(fields[name], shape=(length,))
    return checked, errors


def _encryption(name: str, files: Files) -> Iterator[SourceError]:
    for path, footer in files:
        if name in footer.encrypted:
            yield SourceError(
                f"Every column that is used must be readable without a key; {name!r} is encrypted in file {path}, as "
                f"are all of {', '.join(map(repr, sorted(footer.encrypted)))}. Write it without encryption, or use "
                "other columns."
            )


def _types(name: str, first: tuple[str, Footer], others: Files) -> Iterator[ColumnError]:
    for path, footer in others:
        a, b = (s.field(name).type if name in s.names else None for s in (first[1].schema, footer.schema))
        if a != b:
            yield ColumnError(
                f"A column must have one type in all files; {name!r} is {a or 'missing'} in {first[0]} and "
                f"{b or 'missing'} in {path}. Write them alike, or read them as two sources."
            )


def _nulls(name: str, files: Files) -> Iterator[ColumnError]:
    for path, footer in files:
        if name in footer.nulls:
            group, nulls = footer.nulls[name]
            yield ColumnError(
                f"x, y and sample_weight must hold no nulls; column {name!r} has {nulls:,} in file {path}, "
                f"row group {group}. Give `fill={{{name!r}: value}}`, or drop those rows."
            )


def _lengths(name: str, files: Files) -> Iterator[ColumnError]:
    seen: tuple[int, str] | None = None
    for path, footer in files:
        for group, values, rows in footer.lengths.get(name, ()):
            where = f"file {path}, row group {group}"
            length, rest = divmod(values, rows)
            seen = seen or (length, where)
            if rest or length != seen[0]:
                yield ColumnError(
                    f"The rows of a tensor must have one shape; the lists of column {name!r} have "
                    f"{values / rows:g} values on average in {where} and {seen[0]:g} in {seen[1]}. "
                    f"Give `pad={{{name!r}: length}}` or `ragged=[{name!r}]`."
                )
