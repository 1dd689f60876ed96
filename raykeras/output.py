"""A folder of Parquet files that is complete, or says that it is not.

Enters: tables. Leaves: `part-000000.parquet` and so on, and then an empty file `_SUCCESS`, as Spark writes it. A local
folder is written beside its place and renamed. Object stores cannot rename a folder, so its files are written under
their final names, with a file `_INCOMPLETE` beside them until `_SUCCESS` is there.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from raykeras.errors import OptionError, RaykerasError, SourceError
from raykeras.storage_errors import is_of_storage, retried

SUCCESS = "_SUCCESS"
INCOMPLETE = "_INCOMPLETE"

_NAME = "part-{:06d}.parquet"
_PART = re.compile(r"part-\d{6,}\.parquet")


def open_output(output: str) -> Output:
    """The folder for an `output` argument.

    Raises:
        OptionError: If it holds anything but what an earlier call wrote that did not complete it.
    """
    if "://" not in output:
        return LocalOutput(os.path.abspath(os.path.expanduser(output)))
    return RemoteOutput(output.rstrip("/"))


class Output:
    """Where tables are written.

    Attributes:
        path: Absolute folder or URL.
    """

    path: str

    def write(self, tables: Iterable[pa.Table]) -> None:
        """Writes each table as a part."""
        raise NotImplementedError


class LocalOutput(Output):
    """A folder of this machine, which is there as a whole or not at all."""

    def __init__(self, path: str) -> None:
        if os.path.lexists(path) and not (os.path.isdir(path) and not os.listdir(path)):
            raise _not_empty(path)
        self.path = path

    def write(self, tables: Iterable[pa.Table]) -> None:
        folder, name = os.path.split(self.path)
        beside = os.path.join(folder, f".{name}.partial-{uuid.uuid4().hex[:8]}")  # hidden from readers of the parent
        os.makedirs(beside)
        try:
            for number, table in enumerate(tables):
                pq.write_table(table, os.path.join(beside, _NAME.format(number)))
            with open(os.path.join(beside, SUCCESS), "wb"):
                pass
            if os.path.isdir(self.path):
                os.rmdir(self.path)
            os.rename(beside, self.path)
        except BaseException:
            shutil.rmtree(beside, ignore_errors=True)
            raise


class RemoteOutput(Output):
    """A folder of an object store."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._fs, self._folder = fsspec.core.url_to_fs(path, use_listings_cache=False)
        self._sizes: dict[str, int] = {}
        self._num_rows = 0
        self._has_failed = False
        names = set(self._found())
        foreign = sorted(name for name in names - {INCOMPLETE} if not _PART.fullmatch(name))
        if names and (INCOMPLETE not in names or foreign):
            raise _not_empty(path)

    def write(self, tables: Iterable[pa.Table]) -> None:
        with self._reported():
            retried(functools.partial(self._fs.makedirs, self._folder, exist_ok=True))
            self._put(INCOMPLETE, b"raykeras writes predictions here, or was stopped while it did.\n")
            for name in set(self._found()) - {INCOMPLETE}:  # of a call that did not complete it
                self._remove(name)
        try:
            for number, table in enumerate(tables):
                with self._reported():
                    self._put(_NAME.format(number), _parquet(table))
                    self._num_rows += table.num_rows
        except BaseException:
            if not self._has_failed:  # what was computed is kept where only storage failed
                with contextlib.suppress(Exception):
                    for name in (*self._sizes, INCOMPLETE):
                        self._remove(name)
            raise
        with self._reported():
            self._complete()

    def _complete(self) -> None:
        found = {name: size for name, size in self._found().items() if name != INCOMPLETE}
        if found != self._sizes:
            differ = sorted(name for name in {**found, **self._sizes} if found.get(name) != self._sizes.get(name))
            raise RaykerasError(
                f"Two calls must not write to one `output`; {self.path!r} holds other files than this one wrote, such "
                f"as {differ[0]!r}. Call `predict` again with an `output` of its own."
            )
        self._put(SUCCESS, b"")
        with contextlib.suppress(Exception):  # it says nothing any more
            self._remove(INCOMPLETE)

    def _found(self) -> dict[str, int]:
        """Relative path and size of each file."""

        def find() -> dict[str, Any]:
            return dict(self._fs.find(self._folder, detail=True))

        found = retried(find).items()
        return {path[len(self._folder) :].strip("/"): info["size"] for path, info in found}

    def _put(self, name: str, data: bytes) -> None:
        retried(functools.partial(self._fs.pipe_file, f"{self._folder}/{name}", data))
        if name != INCOMPLETE:
            self._sizes[name] = len(data)

    def _remove(self, name: str) -> None:
        def remove() -> None:
            with contextlib.suppress(FileNotFoundError):  # an earlier attempt did
                self._fs.rm_file(f"{self._folder}/{name}")

        retried(remove)

    @contextlib.contextmanager
    def _reported(self) -> Iterator[None]:
        """Says what is there and what to do where storage failed for good."""
        try:
            yield
        except Exception as error:
            if not is_of_storage(error):
                raise
            self._has_failed = True
            raise RaykerasError(
                f"`output` must stay writable; {self.path!r} is not: {type(error).__name__}: {error} It holds "
                f"{len(self._sizes)} parts with the first {self._num_rows:,} rows, and {INCOMPLETE!r}, for which "
                "`raykeras.parquet` refuses it. Call `predict` again with the same `output`, which replaces them, or "
                "remove them."
            ) from error


def _not_empty(path: str) -> OptionError:
    return OptionError(f"`output` must be a new or empty folder; {path!r} is not. Remove it first.")


def _parquet(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def refuse_incomplete(paths: Iterable[str]) -> None:
    """Checks a listing of files for outputs that were not completed.

    Raises:
        SourceError: If there is one.
    """
    listed = set(paths)
    for path in sorted(listed):
        folder, _, name = path.rpartition("/")
        if name == INCOMPLETE and f"{folder}/{SUCCESS}" not in listed:
            raise SourceError(
                f"A source must be complete; {folder!r} holds {INCOMPLETE!r} and no {SUCCESS!r}: `raykeras.predict` "
                "still writes to it, or was stopped before it had written all rows. Wait for it, or call it again with "
                "the same `output`."
            )
