"""Write a member of a zip archive in place, with seeking.

HDF5 needs to seek in the file it writes. `zipfile` members cannot seek when written, so that the member would have to
be written to a separate file first and copied.
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
    """Yield a new, last member of an archive as a file to write; finish the archive after the block.

    Args:
        file: The archive, open for reading and writing.
        name: Name of the member, which is stored uncompressed.
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
        archive._didModify = True  # type: ignore[attr-defined]  # Makes close() write the directory.


def crc_of_archive(file: IO[bytes], member: StoredMember) -> int:
    """Return the CRC-32 of an archive's file without reading its last member again."""
    end = member.start + member.size
    file.seek(0)
    head = zlib.crc32(file.read(member.start))
    file.seek(end)
    tail = file.read()
    return combined_crc(combined_crc(head, member.crc(), member.size), zlib.crc32(tail), len(tail))


def combined_crc(first: int, second: int, second_size: int) -> int:
    """Return the CRC-32 of two concatenated byte strings.

    This is zlib's `crc32_combine`: appending zero bytes is a linear map of the CRC, composed from repeated squares of
    the map for one zero bit.

    Args:
        first: CRC-32 of the first string.
        second: CRC-32 of the second string.
        second_size: Bytes of the second string.
    """
    polynomial = 0xEDB88320
    power = [polynomial, *(1 << bit for bit in range(31))]  # the map for one zero bit
    for _ in range(3):  # for eight
        power = [_product(power, column) for column in power]
    while second_size:
        if second_size & 1:
            first = _product(power, first)
        power = [_product(power, column) for column in power]
        second_size >>= 1
    return first ^ second


def _product(matrix: list[int], vector: int) -> int:
    """Return the product of a matrix over GF(2), given by its columns as bit masks, and a vector."""
    total = 0
    for bit, column in enumerate(matrix):
        if vector >> bit & 1:
            total ^= column
    return total


class StoredMember(io.BytesIO):
    """The part of an open file from a position on, as a seekable file.

    Attributes:
        start: Position in the file.
        size: Number of bytes written so far.
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
        """Return the CRC-32 of the member, which must be written completely."""
        if self._crc is None:
            self._file.flush()
            with mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as view:
                self._crc = zlib.crc32(view[self.start : self.start + self.size])
        return self._crc
