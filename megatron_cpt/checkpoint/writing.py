"""Files of a checkpoint: written, forced to disk and read back. Runs in the forked processes of a save."""

from __future__ import annotations

import mmap
import os
import queue
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync, WriteBucket
from torch.distributed.checkpoint.storage import WriteResult

from megatron_cpt.checkpoint.layout import copy_hf_files, fsync

ZIP_LOCAL_HEADER = struct.Struct("<26xHH")  # up to the lengths of the name and of the extra field that follow it


class DamagedFile(OSError):
    """What is on disk is not what was written."""


@dataclass(frozen=True)
class Written:
    """What one writer process has written, and found again."""

    sizes: dict[str, int]  # file, relative to the checkpoint's folder -> bytes
    results: list[WriteResult]  # where in the files the tensors are, for .metadata


def bucket_writer(bucket: WriteBucket, transforms: list[Any]) -> Callable[[], Written]:
    """Work that writes one .distcp file and checks it."""

    def write() -> Written:
        path, name, _ = bucket
        results: queue.Queue[tuple[int, Any]] = queue.Queue()
        counts: queue.Queue[int] = queue.Queue()
        counts.put(0)  # megatron-core counts its writers down
        FileSystemWriterAsync.write_preloaded_data(transforms, 0, bucket, results, counts, use_fsync=True)
        _, outcome = results.get()
        if isinstance(outcome, Exception):
            raise outcome
        check_archives(path, [(r.storage_data.offset, r.storage_data.length) for r in outcome])
        return Written({name: os.path.getsize(path)}, outcome)

    return write


def common_writer(folder: str, common: dict[str, Any], hf_folder: str) -> Callable[[], Written]:
    """Work that writes what is not a tensor of one rank: common.pt and the HF files."""

    def write() -> Written:
        path = os.path.join(folder, COMMON_STATE_FNAME)
        torch.save(common, path)
        fsync(path)
        check_archives(path, [(0, os.path.getsize(path))])
        hf = os.path.join(folder, "hf")
        copy_hf_files(hf_folder, hf)
        names = [COMMON_STATE_FNAME, *(os.path.join("hf", name) for name in sorted(os.listdir(hf)))]
        for name in names[1:]:
            fsync(os.path.join(folder, name))
        fsync(hf)
        return Written({name: os.path.getsize(os.path.join(folder, name)) for name in names}, [])

    return write


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
                    _check_archive(content, offset, length)
                except (zipfile.BadZipFile, struct.error) as error:
                    raise DamagedFile(f"{path} is damaged at byte {offset}: {error}") from error


def _check_archive(content: mmap.mmap, offset: int, length: int) -> None:
    """Check one archive of stored (not compressed) records in place; zipfile would copy each of them twice."""
    with zipfile.ZipFile(_Part(content, offset, length)) as archive:
        records = archive.infolist()
    if not records:
        raise zipfile.BadZipFile("no record")
    view = memoryview(content)
    try:
        for record in records:
            header = offset + record.header_offset
            begin = header + ZIP_LOCAL_HEADER.size + sum(ZIP_LOCAL_HEADER.unpack_from(content, header))
            with view[begin : begin + record.file_size] as data:
                if zlib.crc32(data) != record.CRC:
                    raise zipfile.BadZipFile(f"wrong checksum of {record.filename}")
    finally:
        view.release()


class _Part:
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
