"""A member of a zip archive that is written in place.

Enters: an archive, and a member whose writer must be able to seek, as that of an HDF5 file. Leaves: the same archive
with the member in it, stored. `zipfile` would take a file of its own for it first, and copy that.
"""

from __future__ import annotations

import contextlib
import io
import mmap
import zipfile
import zlib
from collections.abc import Iterator
from typing import IO, Any


@contextlib.contextmanager
def stored_member(file: IO[bytes], name: str) -> Iterator[StoredMember]:
    """A new, last member of an archive, as a file to be written and read.

    Args:
        file: The archive, open for reading and writing.
        name: Of the member.
    """
    with zipfile.ZipFile(file, "a") as archive:
        info = zipfile.ZipInfo(name)
        info.header_offset, info.CRC = archive.start_dir, 0
        member = StoredMember(file, info.header_offset + len(info.FileHeader(zip64=True)))
        yield member
        info.file_size = info.compress_size = member.size
        info.CRC = member.crc()
        file.seek(info.header_offset)
        file.write(info.FileHeader(zip64=True))
        archive.filelist.append(info)
        archive.NameToInfo[name] = info
        archive.start_dir = member.start + member.size
        archive._didModify = True  # type: ignore[attr-defined]  # so that closing writes the directory


def crc_of_archive(file: IO[bytes], member: StoredMember) -> int:
    """CRC-32 of a whole archive, of which the last member is not read again."""
    end = member.start + member.size
    file.seek(0)
    head = zlib.crc32(file.read(member.start))
    file.seek(end)
    tail = file.read()
    return combined_crc(combined_crc(head, member.crc(), member.size), zlib.crc32(tail), len(tail))


def combined_crc(one: int, other: int, size: int) -> int:
    """CRC-32 of two pieces after each other, from those of both; `size` is the second one's.

    As zlib's `crc32_combine`: `size` zero bytes after the first piece are a linear map of its CRC, made of the squares
    of that of one bit.
    """
    polynomial = 0xEDB88320
    power = [polynomial, *(1 << bit for bit in range(31))]  # of one zero bit
    for _ in range(3):  # of eight
        power = [_product(power, row) for row in power]
    while size:
        if size & 1:
            one = _product(power, one)
        power = [_product(power, row) for row in power]
        size >>= 1
    return one ^ other


def _product(matrix: list[int], vector: int) -> int:
    """Of a matrix over the field of two elements, by columns, and a vector."""
    total = 0
    for bit, column in enumerate(matrix):
        if vector >> bit & 1:
            total ^= column
    return total


class StoredMember(io.BytesIO):
    """The rest of an open file, from a position on, as a file of its own.

    Attributes:
        start: The position.
        size: Of what was written.
    """

    def __init__(self, file: IO[bytes], start: int) -> None:
        super().__init__()
        self._file, self.start = file, start
        self._at = self.size = 0
        self._crc: int | None = None

    def seek(self, offset: int, whence: int = 0, /) -> int:
        self._at = offset + (0, self._at, self.size)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def write(self, data: Any, /) -> int:
        self._file.seek(self.start + self._at)
        written = self._file.write(data)
        self._at += written
        self.size = max(self.size, self._at)
        return written

    def readinto(self, buffer: Any, /) -> int:
        self._file.seek(self.start + self._at)
        data = self._file.read(min(len(buffer), self.size - self._at))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def truncate(self, size: int | None = None, /) -> int:
        self.size = self._at if size is None else size
        self._file.truncate(self.start + self.size)
        return self.size

    def flush(self) -> None:
        self._file.flush()

    def crc(self) -> int:
        """CRC-32 of all of it; when it is written."""
        if self._crc is None:
            self._file.flush()
            with mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as view:
                self._crc = zlib.crc32(view[self.start : self.start + self.size])
        return self._crc
