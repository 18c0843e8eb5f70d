"""The zip archives that torch.save writes, in place: where their records lie in a mapped file, and their checksums."""

from __future__ import annotations

import io
import mmap
import os
import struct
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

ZIP_LOCAL_HEADER = struct.Struct("<26xHH")  # up to the lengths of the name and of the extra field that follow it


class DamagedFile(OSError):
    """What is on disk is not what was written."""


@dataclass(frozen=True)
class Record:
    """A file of an archive: bytes [begin, end) of the mapped file, and their CRC-32 as the archive has it."""

    begin: int
    end: int
    crc: int


def records_of(content: mmap.mmap, offset: int, length: int) -> dict[str, Record]:
    """The records of the archive at this place, by name; they are stored, not compressed.

    Raises:
        zipfile.BadZipFile, struct.error: there is none
    """
    with zipfile.ZipFile(_Part(content, offset, length)) as archive:
        records = {}
        for info in archive.infolist():
            if info.compress_type != zipfile.ZIP_STORED:
                raise zipfile.BadZipFile(f"{info.filename} is compressed")
            header = offset + info.header_offset
            begin = header + ZIP_LOCAL_HEADER.size + sum(ZIP_LOCAL_HEADER.unpack_from(content, header))
            if begin + info.file_size > offset + length:
                raise zipfile.BadZipFile(f"{info.filename} goes beyond the archive")
            records[info.filename] = Record(begin, begin + info.file_size, info.CRC)
    if not records:
        raise zipfile.BadZipFile("no record")
    return records


def check_record(content: mmap.mmap, name: str, record: Record) -> None:
    """Raise zipfile.BadZipFile unless the record has the checksum that the archive says; copies nothing."""
    with memoryview(content) as view, view[record.begin : record.end] as data:
        if zlib.crc32(data) != record.crc:
            raise zipfile.BadZipFile(f"wrong checksum of {name}")


def check_archives(path: str, places: Iterable[tuple[int, int]]) -> None:
    """Compare the zip archives at the (offset, length) places of a file with the checksums in them.

    torch.save computes the checksums of what it is given in memory, so this covers the whole way to the file.

    Raises:
        DamagedFile: naming the file and the place
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size == 0:
            raise DamagedFile(f"{path} is empty")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            for offset, length in places:
                if offset + length > size:
                    raise DamagedFile(f"{path} has {size} bytes, but a tensor ends at {offset + length}")
                try:
                    for name, record in records_of(content, offset, length).items():
                        check_record(content, name, record)
                except (zipfile.BadZipFile, struct.error) as error:
                    raise DamagedFile(f"{path} is damaged at byte {offset}: {error}") from error


class _Part(io.RawIOBase):
    """A stretch of a mapped file as a file of its own, as far as zipfile needs one."""

    def __init__(self, content: mmap.mmap, offset: int, length: int) -> None:
        self._content, self._offset, self._length, self._position = content, offset, length, 0

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, position: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        if start + position < 0:
            raise OSError("position before the start")
        self._position = start + position
        return self._position

    def read(self, size: int = -1) -> bytes:
        end = self._length if size < 0 else min(self._length, self._position + size)
        data = self._content[self._offset + self._position : self._offset + max(end, self._position)]
        self._position += len(data)
        return data
