"""Files that appear whole or not at all, and reach the disk."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


@contextmanager
def replacing(path: str | Path, suffix: str = "") -> Iterator[str]:
    """The name of a temporary file beside another, whose place it takes when the block ends well; else it is removed.

    One process writes at a time: what a kill leaves is replaced by the next. `suffix`: for libraries that go by names.
    """
    temporary = f"{path}.tmp{suffix}"
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def write_text(path: str | Path, text: str) -> None:
    """Write a file so that it appears whole or not at all."""
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: str | Path, content: Any) -> None:
    """`write_text` of indented JSON."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    write_text(path, text.encode("utf-8", "backslashreplace").decode())  # halves of characters, as JSON writes them


def finite(value: Any) -> Any:
    """The same with None for every number that is not finite, which JSON does not know."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """A stream under a temporary name in the same folder; renamed to `path` on a clean exit, removed on an error."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def fsync(path: str) -> None:
    """Force a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_files(folder: str) -> dict[str, int]:
    """Force all files below a folder to disk; their sizes by name relative to it."""
    sizes = {}
    for parent, _, names in os.walk(folder):
        for path in (os.path.join(parent, name) for name in names):
            fsync(path)
            sizes[os.path.relpath(path, folder)] = os.path.getsize(path)
        fsync(parent)
    return dict(sorted(sizes.items()))
