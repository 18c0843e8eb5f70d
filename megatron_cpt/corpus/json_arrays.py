"""A file that is one JSON array (`[{"text": ...}, ...]`, perhaps over many lines) -> its elements, in bounded memory.

Each element comes as the bytes it has in the file, on one line, so that it is read like a line of JSON Lines.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import IO

import orjson

from megatron_cpt.utils.errors import InputError

BLOCK_BYTES = 1 << 20
PEEK_BYTES = 4096
LONGEST_LITERAL = 16  # so many characters before the end, an error may be that of a number or literal that goes on
SPACE = re.compile(r"[ \t\n\r]*")
# values are thrown away, so they need not be made: a number of 10,000 digits takes as long as it is
_decode = json.JSONDecoder(parse_int=str, parse_float=str, parse_constant=str).raw_decode


def begins_array(begin: bytes) -> bool:
    """Whether a file that begins with these bytes is one JSON array, and not JSON Lines (of which some may be arrays)."""
    begin = begin.removeprefix(codecs.BOM_UTF8).lstrip(b" \t\r\n")
    line, _, rest = begin.partition(b"\n")
    return begin.startswith(b"[") and not (rest.strip() and _is_whole(line))


def _is_whole(line: bytes) -> bool:
    try:
        orjson.loads(line)
    except orjson.JSONDecodeError:
        return False
    return True


class _Window:
    """The part of a stream that is in memory: `text`, of which what is before `at` is done with."""

    def __init__(self, stream: IO[bytes], name: str) -> None:
        self._stream, self._name = stream, name
        # bytes that are no UTF-8 come back as they were: only the element that has them is refused, and not here
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
        self._block = BLOCK_BYTES
        self.text, self.at, self.ended = "", 0, False

    def more(self) -> None:
        """Read on: twice as much as the last time, so that an element of any length takes linear time."""
        data = self._stream.read(self._block)
        self.ended = not data
        self.text = self.text[self.at :] + self._decoder.decode(data, self.ended)
        self.at, self._block = 0, self._block * 2

    def symbol(self) -> str:
        """The next character that is no space, passed over; "" at the end of the file."""
        while True:
            self.at = self._after_space(self.at)
            if self.at < len(self.text) or self.ended:
                break
            self.more()
        self.at += 1
        return self.text[self.at - 1 : self.at]

    def element(self, number: int) -> str:
        """The next element, passed over. InputError: it is no JSON, or the file ends inside it."""
        while True:
            begin = self._after_space(self.at)
            try:
                _, end = _decode(self.text, begin)
                is_cut = len(self.text) - end < LONGEST_LITERAL  # "1" may be the beginning of "1.5"
            except (json.JSONDecodeError, RecursionError) as error:
                if not self._may_go_on(error):
                    what = "nested too deeply" if isinstance(error, RecursionError) else error.msg
                    raise InputError(f"{self._name}: element {number} of the JSON array is no JSON ({what})") from None
                is_cut = True
            if not is_cut or self.ended:
                self.at, self._block = end, BLOCK_BYTES
                return self.text[begin:end]
            self.more()

    def _may_go_on(self, error: json.JSONDecodeError | RecursionError) -> bool:
        """Whether the error may be gone when more of the file is there."""
        if self.ended or isinstance(error, RecursionError):
            return False
        return error.msg.startswith("Unterminated") or len(self.text) - error.pos < LONGEST_LITERAL

    def _after_space(self, place: int) -> int:
        found = SPACE.match(self.text, place)
        return found.end() if found else place


def array_elements(stream: IO[bytes], name: str) -> Iterator[bytes]:
    """The elements of a JSON array, without line breaks. InputError names the file `name`: damaged, or cut short."""
    window = _Window(stream, name)
    if window.symbol() != "[":
        raise InputError(f"{name}: does not begin with [; expected a JSON array")
    number = 0
    mark = window.symbol()
    window.at -= mark != "]"
    while mark != "]":
        number += 1
        yield window.element(number).replace("\n", " ").replace("\r", " ").encode("utf-8", "surrogateescape")
        mark = window.symbol()
        if mark not in (",", "]"):
            found = repr(mark) if mark else "the end of the file"
            raise InputError(f"{name}: found {found} after element {number} of the JSON array; expected , or ]")
    if rest := window.symbol():
        raise InputError(
            f"{name}: found {rest!r} after the end of the JSON array; expected one array, or an object per line"
        )
