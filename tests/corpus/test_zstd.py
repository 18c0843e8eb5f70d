"""zstd streams of all shapes."""

from __future__ import annotations

import io

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from megatron_cpt.corpus.zstd import ZstdReader

TEXT = b"".join(b'{"text": "line %d"}\n' % i for i in range(20_000))
SKIPPABLE = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"


def compress(content: bytes, window_log: int | None = None) -> bytes:
    parameters = zstandard.ZstdCompressionParameters(window_log=window_log) if window_log else None
    return zstandard.ZstdCompressor(compression_params=parameters).compress(content)


def read(data: bytes) -> bytes:
    return io.BufferedReader(ZstdReader(io.BytesIO(data))).read()


@given(sizes=st.lists(st.integers(0, len(TEXT)), max_size=4))
def test_frames_one_after_the_other(sizes: list[int]) -> None:
    data = b"".join(compress(TEXT[:size]) + SKIPPABLE for size in sizes)
    assert read(data) == b"".join(TEXT[:size] for size in sizes)


def test_large_windows() -> None:
    assert read(compress(TEXT, window_log=30)) == TEXT


@pytest.mark.parametrize("cut", [3, 10, 1000, -1])
def test_cut_short(cut: int) -> None:
    for whole in (b"", compress(b"whole")):
        with pytest.raises(OSError, match="ends inside a frame"):
            read(whole + compress(TEXT)[:cut])


@pytest.mark.parametrize("data", [b"no zstd at all", compress(TEXT) + b"rest"])
def test_not_zstd(data: bytes) -> None:
    with pytest.raises(OSError, match="Unknown frame descriptor"):
        read(data)
