"""Marker files that show whether a folder of Parquet files is complete."""

from __future__ import annotations

from collections.abc import Iterable

from raykeras.core.errors import SourceError

SUCCESS = "_SUCCESS"


INCOMPLETE = "_INCOMPLETE"


def refuse_incomplete(paths: Iterable[str]) -> None:
    """Check a listing of files for folders that `raykeras.predict` has not completed.

    Raises:
        SourceError: If there is such a folder.
    """
    existing = set(paths)
    for path in sorted(existing):
        folder, _, name = path.rpartition("/")
        if name == INCOMPLETE and f"{folder}/{SUCCESS}" not in existing:
            raise SourceError(
                f"A source must be complete; {folder!r} contains {INCOMPLETE!r} but no {SUCCESS!r}: `raykeras.predict` "
                "is still writing to it, or was stopped before it wrote all rows. Wait for it, or call it again with "
                "the same `output`."
            )
