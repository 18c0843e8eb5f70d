"""Reading .zst files as they are found: of many frames, with large windows, and perhaps cut short."""

from __future__ import annotations

import io
from typing import IO, Any

import zstandard

MAX_WINDOW_BYTES = 2**31  # `zstd --long=31`, as large dumps are packed
READ_BYTES = 1 << 16


class ZstdReader(io.RawIOBase):
    """The content of a zstd stream.

    The readers of fsspec and zstandard stop after the first frame, or take a file that was cut for a whole one; that of
    pyarrow refuses large windows.
    """

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw = raw
        self._frame = self._new_frame()
        self._begun = False
        self._content = memoryview(b"")

    def _new_frame(self) -> Any:
        return zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES).decompressobj()

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` as far as content is at hand; 0 at the end. OSError: damaged, or cut short."""
        while not self._content:
            data = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame, self._begun = self._new_frame(), False
            data = data or self._raw.read(READ_BYTES)
            if not data:
                if self._begun:
                    raise OSError("the file ends inside a frame")
                return 0
            self._begun = True
            try:
                self._content = memoryview(self._frame.decompress(data))
            except zstandard.ZstdError as error:
                raise OSError(str(error)) from None
        count = min(len(buffer), len(self._content))
        buffer[:count] = self._content[:count]
        self._content = self._content[count:]
        return count
