"""Files of raw text -> documents, in a fixed order: JSON lines (one document a line) or plain text (one a file)."""

from __future__ import annotations

import codecs
import glob
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import orjson

from megatron_cpt.errors import InputError

BATCH_BYTES = 1 << 20
JSON_LINES = (".jsonl", ".ndjson", ".json")


class Chunk(NamedTuple):
    """Consecutive lines of one file, or (`first_line` 0) a whole text file as a single element."""

    source: int
    path: str
    first_line: int
    lines: list[bytes]

    def nbytes(self) -> int:
        return sum(map(len, self.lines))


def find_files(patterns: Sequence[str], leave_out: Iterable[str] = ()) -> list[Path]:
    """Files, folders and globs -> absolute file paths in the order given, folders and globs sorted, each file once.

    `leave_out`: files that are no input (a corpus written into its own input folder). InputError: nothing matches.
    """
    seen = {Path(path).resolve() for path in leave_out}
    found: list[Path] = []
    for pattern in patterns:
        path = Path(pattern).expanduser()
        matches = [path] if path.exists() else [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
        files = [file.absolute() for match in matches for file in _files_in(match)]
        if not files:
            raise InputError(f"input {pattern}: found no files; wanted a file, a folder with files or a glob")
        for file in files:
            if file.resolve() not in seen:
                seen.add(file.resolve())
                found.append(file)
    return found


def _files_in(path: Path) -> list[Path]:
    """A file itself; a folder's files at any depth, sorted, without hidden ones."""
    if not path.is_dir():
        return [path]
    inside = sorted(file for file in path.rglob("*") if file.is_file())
    return [file for file in inside if not any(part.startswith(".") for part in file.relative_to(path).parts)]


def read_chunks(files: list[Path]) -> Iterator[Chunk]:
    """The files' content in order, in chunks of about BATCH_BYTES (one line or text file is never cut)."""
    for source, file in enumerate(files):
        with _open(file) as stream:
            if file.suffix.lower() not in JSON_LINES:
                yield Chunk(source, str(file), 0, [stream.read()])
                continue
            line = 1
            while lines := stream.readlines(BATCH_BYTES):
                yield Chunk(source, str(file), line, lines)
                line += len(lines)


def _open(file: Path) -> IO[bytes]:
    try:
        return file.open("rb")
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror})") from None


def batches(chunks: Iterable[Chunk]) -> Iterator[list[Chunk]]:
    """Group chunks until a batch holds BATCH_BYTES, so that many small files do not make many small batches."""
    batch: list[Chunk] = []
    size = 0
    for chunk in chunks:
        batch.append(chunk)
        size += chunk.nbytes()
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def texts_of(chunk: Chunk, text_key: str) -> Iterator[str]:
    """The documents of a chunk; blank lines are no documents. InputError names file and line."""
    if chunk.first_line == 0:
        yield _decode(chunk.lines[0], chunk.path)
        return
    for number, line in enumerate(chunk.lines, start=chunk.first_line):
        line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if line.strip():
            yield _text_field(line, text_key, f"{chunk.path}:{number}")


def _decode(content: bytes, path: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: byte {error.start} is not UTF-8; wanted plain text, or JSON lines in {', '.join(JSON_LINES)}"
        ) from None


def _text_field(line: bytes, text_key: str, where: str) -> str:
    """The text in one JSON line."""
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise InputError(
            f"{where}: not valid JSON (column {error.colno}: {error.msg}); wanted one JSON object per line"
        ) from None
    for key in text_key.split("."):
        if not isinstance(value, dict):
            raise InputError(f"{where}: found {type(value).__name__}; wanted an object with field {text_key!r}")
        if key not in value:
            raise InputError(f"{where}: no field {text_key!r}; found {sorted(value)}")
        value = value[key]
    if not isinstance(value, str):
        raise InputError(f"{where}: field {text_key!r} is {type(value).__name__}; wanted a string")
    return value
