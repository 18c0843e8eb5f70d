"""The zip archives that torch.save writes, in place: where their records lie in a mapped file, and their checksums."""

from __future__ import annotations

import io
import itertools
import mmap
import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

from megatron_cpt.utils.errors import InputError

Content = mmap.mmap
MOST_DIRECTORY_BYTES = 32 << 20  # of the list of records, some 100 each; zipfile makes twelve times as much of it
ZIP_LOCAL_HEADER = struct.Struct("<26xHH")  # up to the lengths of the name and of the extra field that follow it


class DamagedFile(OSError):
    """What is on disk is not what was written."""


@dataclass(frozen=True)
class ZipPart:
    """A file of an archive: bytes [begin, end) of the mapped file, and their CRC-32 as the archive has it."""

    begin: int
    end: int
    crc: int


def open_mapped(path: str) -> Content:
    """A file in memory, page by page as it is read.

    torch wants memory that it may write to; as long as nobody does, no page of it is copied.

    Raises:
        InputError: it cannot be read, is empty or no plain file, such as a pipe, which would be waited for
    """
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            plain_file = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
            content = mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) if plain_file else None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if content is None:
        raise InputError(f"{path} cannot be read: it is no plain file")
    return content


def records_of(content: Content, offset: int, length: int) -> dict[str, ZipPart]:
    """The records of the archive at this place, by name; they are stored, not compressed.

    Raises:
        zipfile.BadZipFile: there is none, or one of its records is not within it
    """
    if offset + length > len(content):
        raise zipfile.BadZipFile(f"the file ends at byte {len(content)}, the archive should end at {offset + length}")
    try:
        records = _records(content, offset, length)
    except zipfile.BadZipFile as error:
        if "not a zip file" not in str(error):
            raise
        raise zipfile.BadZipFile(f"{error}; expected a zip archive, as torch.save writes since version 1.6") from error
    except (struct.error, ValueError, OSError, NotImplementedError, OverflowError, EOFError) as error:
        # What zipfile raises where numbers are damaged; OSError is _Stretch's, which is in memory, and none of a disk.
        raise zipfile.BadZipFile(f"no archive: {error}") from error
    if not records:
        raise zipfile.BadZipFile("no record")
    return records


def _records(content: Content, offset: int, length: int) -> dict[str, ZipPart]:
    records: dict[str, ZipPart] = {}
    with zipfile.ZipFile(_Stretch(content, offset, length)) as archive:
        for info in archive.infolist():
            if info.compress_type != zipfile.ZIP_STORED:
                raise zipfile.BadZipFile(f"{info.filename} is compressed")
            if info.filename in records:
                raise zipfile.BadZipFile(f"{info.filename} is there twice")
            header = offset + info.header_offset
            if not offset <= header <= offset + length - ZIP_LOCAL_HEADER.size:
                raise zipfile.BadZipFile(f"{info.filename} is not within the archive")
            begin = header + ZIP_LOCAL_HEADER.size + sum(ZIP_LOCAL_HEADER.unpack_from(content, header))
            if begin + info.file_size > offset + length:
                raise zipfile.BadZipFile(f"{info.filename} goes beyond the archive")
            records[info.filename] = ZipPart(begin, begin + info.file_size, info.CRC)
    for one, other in itertools.pairwise(sorted(records.values(), key=lambda part: (part.begin, part.end))):
        if one.end > other.begin:
            raise zipfile.BadZipFile(f"two records lie at byte {other.begin}")
    return records


def check_record(content: Content, name: str, record: ZipPart) -> None:
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
                except zipfile.BadZipFile as error:
                    raise DamagedFile(f"{path} is damaged at byte {offset}: {error}") from error


class _Stretch(io.RawIOBase):
    """A stretch of a mapped file as a file of its own, as far as zipfile needs one."""

    def __init__(self, content: Content, offset: int, length: int) -> None:
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
        if end - self._position > MOST_DIRECTORY_BYTES:  # the list is read in one piece
            raise zipfile.BadZipFile(
                f"its list of records has {end - self._position:,} bytes; expected at most {MOST_DIRECTORY_BYTES:,}"
            )
        data = self._content[self._offset + self._position : self._offset + max(end, self._position)]
        self._position += len(data)
        return data
