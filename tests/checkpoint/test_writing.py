"""What is on disk is compared with what was in memory."""

from __future__ import annotations

import io
import struct
import zipfile
from pathlib import Path

import pytest
import torch

from megatron_cpt.checkpoint.zip_reader import DamagedFile, check_archives


@pytest.fixture
def archives(tmp_path: Path) -> tuple[Path, list[tuple[int, int]]]:
    """Three tensors, one after the other, as in a .distcp file."""
    path, places = tmp_path / "__0_0.distcp", []
    with open(path, "wb") as file:
        for size in (10, 100_000, 3):
            start = file.tell()
            torch.save(torch.arange(size), file)
            places.append((start, file.tell() - start))
    return path, places


def test_an_intact_file_passes(archives: tuple[Path, list[tuple[int, int]]]) -> None:
    check_archives(str(archives[0]), archives[1])


def records(content: bytes, start: int, length: int) -> list[int]:
    """Where the middle bytes of the records of the archive at `start` lie in the file."""
    found = []
    with zipfile.ZipFile(io.BytesIO(content[start : start + length])) as archive:
        for info in archive.infolist():
            names = struct.unpack_from("<HH", content, start + info.header_offset + 26)  # lengths of name and extra field
            if info.file_size:
                found.append(start + info.header_offset + 30 + sum(names) + info.file_size // 2)
    return found


def test_one_changed_bit_in_any_record_is_found(archives: tuple[Path, list[tuple[int, int]]]) -> None:
    path, places = archives
    content = path.read_bytes()
    positions = [position for start, length in places for position in records(content, start, length)]
    assert len(positions) > 3 * len(places)
    for position in positions:
        changed = bytearray(content)
        changed[position] ^= 4
        path.write_bytes(changed)
        with pytest.raises(DamagedFile, match=r"__0_0\.distcp is damaged at byte"):
            check_archives(str(path), places)


def test_a_file_cut_short_is_found(archives: tuple[Path, list[tuple[int, int]]]) -> None:
    path, places = archives
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DamagedFile, match="but a tensor ends at"):
        check_archives(str(path), places)
    path.write_bytes(b"")
    with pytest.raises(DamagedFile, match="is empty"):
        check_archives(str(path), places)
