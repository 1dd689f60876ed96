"""Write tables to a folder of Parquet files that is complete or recognizable as incomplete.

The files are `part-000000.parquet` and so on, and finally an empty `_SUCCESS`, as in Spark. A local folder is written
under a temporary name and renamed. Object stores cannot rename folders: there, the files are written under their final
names, and the folder contains `_INCOMPLETE` until `_SUCCESS` is written.
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

from raykeras.core.errors import OptionError, RaykerasError
from raykeras.core.storage_errors import is_storage_error, retry
from raykeras.data.sources.parquet_markers import INCOMPLETE, SUCCESS

_PART_NAME = "part-{:06d}.parquet"


_PART_PATTERN = re.compile(r"part-\d{6,}\.parquet")


def open_output(output: str) -> Output:
    """Return the output for an `output` argument.

    Args:
        output: Local folder or fsspec URL.

    Raises:
        OptionError: If the folder holds anything but the incomplete output of an earlier call.
    """
    if "://" not in output:
        return LocalOutput(os.path.abspath(os.path.expanduser(output)))
    return RemoteOutput(output.rstrip("/"))


class Output:
    """A folder to write tables to.

    Attributes:
        path: Absolute path of a local folder, or a URL.
    """

    path: str

    def write(self, tables: Iterable[pa.Table]) -> None:
        """Write each table as one Parquet file."""
        raise NotImplementedError


class LocalOutput(Output):
    """A folder on this machine, which appears complete or not at all."""

    def __init__(self, path: str) -> None:
        if os.path.lexists(path) and not (os.path.isdir(path) and not os.listdir(path)):
            raise _not_empty(path)
        self.path = path

    def write(self, tables: Iterable[pa.Table]) -> None:
        parent, name = os.path.split(self.path)
        temporary = os.path.join(parent, f".{name}.partial-{uuid.uuid4().hex[:8]}")  # readers skip hidden folders
        os.makedirs(temporary)
        try:
            for number, table in enumerate(tables):
                pq.write_table(table, os.path.join(temporary, _PART_NAME.format(number)))
            with open(os.path.join(temporary, SUCCESS), "wb"):
                pass
            if os.path.isdir(self.path):
                os.rmdir(self.path)
            os.rename(temporary, self.path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


class RemoteOutput(Output):
    """A folder on an object store."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._fs, self._folder = fsspec.core.url_to_fs(path, use_listings_cache=False)
        self._sizes: dict[str, int] = {}
        self._num_rows = 0
        self._has_failed = False
        names = set(self._list_files())
        foreign = sorted(name for name in names - {INCOMPLETE} if not _PART_PATTERN.fullmatch(name))
        if names and (INCOMPLETE not in names or foreign):
            raise _not_empty(path)

    def write(self, tables: Iterable[pa.Table]) -> None:
        with self._explained_failures():
            retry(functools.partial(self._fs.makedirs, self._folder, exist_ok=True))
            self._put(INCOMPLETE, b"raykeras is writing predictions here, or was stopped before it finished.\n")
            for name in set(self._list_files()) - {INCOMPLETE}:  # of an earlier, incomplete call
                self._remove(name)
        try:
            for number, table in enumerate(tables):
                with self._explained_failures():
                    self._put(_PART_NAME.format(number), _to_parquet(table))
                    self._num_rows += table.num_rows
        except BaseException:
            if not self._has_failed:  # keep the predictions if only storage failed
                with contextlib.suppress(Exception):
                    for name in (*self._sizes, INCOMPLETE):
                        self._remove(name)
            raise
        with self._explained_failures():
            self._complete()

    def _complete(self) -> None:
        """Check that the folder holds exactly the files of this call, and mark it complete."""
        sizes = {name: size for name, size in self._list_files().items() if name != INCOMPLETE}
        if sizes != self._sizes:
            differ = sorted(name for name in {**sizes, **self._sizes} if sizes.get(name) != self._sizes.get(name))
            raise RaykerasError(
                f"Two calls must not write to the same `output`; the files in {self.path!r} are not those that this "
                f"call wrote, for example {differ[0]!r}. Call `predict` again with another `output`."
            )
        self._put(SUCCESS, b"")
        with contextlib.suppress(Exception):  # readers ignore it once `_SUCCESS` exists
            self._remove(INCOMPLETE)

    def _list_files(self) -> dict[str, int]:
        """Return the size in bytes of each file, by path relative to the folder."""

        def find() -> dict[str, Any]:
            return dict(self._fs.find(self._folder, detail=True))

        files = retry(find).items()
        return {path[len(self._folder) :].strip("/"): info["size"] for path, info in files}

    def _put(self, name: str, data: bytes) -> None:
        retry(functools.partial(self._fs.pipe_file, f"{self._folder}/{name}", data))
        if name != INCOMPLETE:
            self._sizes[name] = len(data)

    def _remove(self, name: str) -> None:
        def remove() -> None:
            with contextlib.suppress(FileNotFoundError):  # an earlier attempt may have removed it
                self._fs.rm_file(f"{self._folder}/{name}")

        retry(remove)

    @contextlib.contextmanager
    def _explained_failures(self) -> Iterator[None]:
        """Raise permanent storage failures of the block as errors that say what was written and what to do."""
        try:
            yield
        except Exception as error:
            if not is_storage_error(error):
                raise
            self._has_failed = True
            raise RaykerasError(
                f"`output` must stay writable; {self.path!r} is not: {type(error).__name__}: {error} It holds "
                f"{len(self._sizes)} parts with the first {self._num_rows:,} rows, and {INCOMPLETE!r}, so that "
                "`raykeras.parquet` refuses to read it. Call `predict` again with the same `output` to replace these "
                "files, or remove them."
            ) from error


def _not_empty(path: str) -> OptionError:
    return OptionError(f"`output` must be a new or empty folder; {path!r} is not. Remove it first.")


def _to_parquet(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()
