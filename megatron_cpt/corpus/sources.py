"""Which files a corpus is made of: paths, folders, globs, URLs -> an ordered list of `Source`s, and how to open one.

Everything goes through fsspec, so `s3://bucket/zh/*.jsonl.zst` works like a local glob (with s3fs installed).
"""

from __future__ import annotations

import hashlib
import io
import logging
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any, Literal

import orjson

from megatron_cpt.utils.console import counted
from megatron_cpt.utils.errors import InputError, Refusals, said_by_system

logger = logging.getLogger(__name__)

Format = Literal["jsonl", "text", "parquet", "arrow"]

SUFFIXES: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".txt": "text",
    ".text": "text",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}
DATASETS_FILES = ("state.json", "dataset_info.json")  # beside the Arrow files of `datasets.Dataset.save_to_disk`
TABLES = (".csv", ".tsv")
CONVERSION = "python -c \"from pyarrow import csv, parquet; parquet.write_table(csv.read_csv('a.csv'), 'a.parquet')\""
MOST_PARTITIONS = 99_999  # names of files have five digits for them
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd", ".bz2": "bz2", ".xz": "xz"}


@dataclass(frozen=True)
class Source:
    """One input file. `url` is an absolute local path or an fsspec URL; `version` changes when the file does."""

    url: str
    format: Format
    compression: str | None
    bytes: int
    version: str

    @property
    def content_bytes(self) -> int:
        """About how much text may be inside."""
        return self.bytes * (4 if self.compression or self.format == "parquet" else 1)

    @cached_property
    def is_local(self) -> bool:
        """Whether `url` is a path of this machine."""
        return "://" not in self.url


def parse_partition(partition: str | None, where: str = "") -> tuple[int, int]:
    """As in 3/8 -> (3, 8); None -> (0, 1). `where` begins the message of an error. InputError: it is anything else."""
    if partition is None:
        return 0, 1
    found = re.fullmatch(r"(\d{1,5})/(\d{1,5})", partition, re.ASCII)
    if not found or int(found[1]) >= int(found[2]):
        expected = f"I/N with I from 0 to N - 1 and N at most {MOST_PARTITIONS:,}, as in 0/8"
        raise InputError(f"{where}partition is {partition!r}; expected {expected}")
    return int(found[1]), int(found[2])


def printable(path: str) -> str:
    """A path as text: bytes of a file name that are no UTF-8 are written as escapes."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def find_sources(
    patterns: Sequence[str],
    file_format: Format | Literal["auto"] = "auto",
    is_output: Callable[[str], bool] = lambda path: False,
) -> tuple[list[Source], list[str]]:
    """(sources, files of unknown kind that were passed over) for files, folders, globs and URLs, in the order given.

    Folders and globs are sorted; a file named twice is read once. In a folder only files of a known kind are taken (see
    SUFFIXES), at any depth and without hidden ones; a file named itself is plain text when its kind is unknown. A folder
    that `datasets.Dataset.save_to_disk` wrote gives its Arrow files. `is_output`: says of a local path that it is what
    will be written; among the files of a folder or glob it is left out. InputError: a pattern that matches nothing, or
    names an output.
    """
    seen: set[str] = set()
    sources, passed_over = [], []
    matches, refusals = [], Refusals()
    for pattern in patterns:
        with refusals.noted():
            matches.append((pattern, *_match(pattern, file_format)))
    refusals.raise_any()
    for pattern, found, unknown in matches:
        passed_over += unknown
        for source in found:
            identity = os.path.realpath(source.url) if source.is_local else source.url
            if source.is_local and is_output(identity):
                if os.path.isfile(os.path.expanduser(pattern)):
                    raise InputError(
                        f"input {printable(source.url)}: is a file of the output; expected another output_prefix"
                    )
                continue
            if identity not in seen:
                seen.add(identity)
                sources.append(source)
    return sources, passed_over


def note_passed_over(files: Sequence[str]) -> None:
    """Say on stderr which files of folders are not read."""
    if files:
        some = ", ".join(map(printable, files[:3])) + (", ..." if len(files) > 3 else "")
        logger.info(f"not read, of unknown kind: {counted(len(files), 'file')} ({some})")


def _match(pattern: str, file_format: Format | Literal["auto"]) -> tuple[list[Source], list[str]]:
    """The files one pattern stands for, and those in folders whose kind is unknown."""
    from fsspec.core import url_to_fs

    if not pattern:  # as of a variable of the shell that is not set; it would be the folder one is in
        raise InputError("input has an empty path; expected a file, a folder with files or a glob")
    try:
        fs, path = url_to_fs(os.path.expanduser(pattern))
        if not fs.exists(path):
            matches = sorted(fs.glob(path)) if any(c in path for c in "*?[") else []
        else:
            matches = [path]
        found, unknown = [], []
        for match in matches:
            named, candidates = _files_at(fs, match)
            for file in candidates:
                kind = file_format if file_format != "auto" else format_of(file)
                if kind is None and not named:
                    unknown.append(file)
                    continue
                if kind is None:
                    _refuse_table(file)
                if _is_local(fs) and not os.access(file, os.R_OK):
                    raise InputError(f"input {printable(file)}: Permission denied; expected a file that you may read")
                found.append(_source(fs, file, kind or "text"))
    except InputError:
        raise
    except (OSError, ValueError, ImportError) as error:  # ValueError: protocol not known; ImportError: s3fs not installed
        raise InputError(f"input {pattern}: {said_by_system(error)}") from None
    if not found:
        other = f" (only {', '.join(unknown[:3])}, of unknown kind; give file_format to read them)" if unknown else ""
        raise InputError(f"input {pattern}: found no files{other}; expected a file, a folder with files or a glob")
    return found, unknown


def _refuse_table(path: str) -> None:
    """InputError for a file of comma-separated values, which would be one document with all its commas and quotes."""
    stem, ending = os.path.splitext(path.lower())
    if (os.path.splitext(stem)[1] if ending in COMPRESSIONS else ending) in TABLES:
        raise InputError(f"input {path}: is a table of separated values; expected Parquet, as {CONVERSION} makes of it")


def _files_at(fs: Any, path: str) -> tuple[bool, list[str]]:
    """(whether they are named, files): a file itself, or those of a folder."""
    if not fs.isdir(path):
        return True, [path]
    if fs.exists(f"{path}/dataset_dict.json"):
        splits = orjson.loads(fs.cat_file(f"{path}/dataset_dict.json"))["splits"]
        raise InputError(f"{path}: a DatasetDict with the splits {splits}; expected one of them, as in {path}/{splits[0]}")
    if fs.exists(f"{path}/state.json") and fs.exists(f"{path}/dataset_info.json"):
        files = orjson.loads(fs.cat_file(f"{path}/state.json"))["_data_files"]
        return True, [f"{path}/{file['filename']}" for file in files]
    inside = sorted(_walk(path) if _is_local(fs) else fs.find(path))
    with_arrow = {os.path.dirname(file) for file in inside if file.endswith(".arrow")}
    return False, [
        file
        for file in inside
        if not any(name.startswith(".") for name in file[len(path) :].split("/"))
        and not (os.path.basename(file) in DATASETS_FILES and os.path.dirname(file) in with_arrow)
    ]


def _walk(folder: str) -> Iterator[str]:
    """All files below a local folder, also those behind links to folders; none twice by going in circles.

    OSError: a folder cannot be listed, whose files would be left out without a word.
    """
    visited = set()

    def refuse(error: OSError) -> None:
        raise error

    for path, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        visited.add(os.path.realpath(path))
        folders[:] = [name for name in folders if os.path.realpath(os.path.join(path, name)) not in visited]
        yield from (os.path.join(path, name) for name in files)


def _is_local(fs: Any) -> bool:
    return "file" in (fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,))


def format_of(path: str) -> Format | None:
    """The format a file name says, seen through a compression suffix; None when it says nothing."""
    stem, suffix = os.path.splitext(path.lower())
    return SUFFIXES.get(os.path.splitext(stem)[1] if suffix in COMPRESSIONS else suffix)


def check_unchanged(sources: Iterable[Source]) -> None:
    """InputError when a file is not what it was when it was found."""
    from fsspec.core import url_to_fs

    for source in sources:
        fs, path = url_to_fs(source.url)
        try:
            now = _source(fs, path, source.format)
        except OSError as error:
            raise InputError(f"{printable(source.url)}: changed during the run: {error.strerror or error}") from None
        if (now.bytes, now.version) != (source.bytes, source.version):
            found = f"had {source.bytes:,} bytes, has {now.bytes:,}"
            raise InputError(f"{printable(source.url)}: changed during the run ({found}); expected it to stay as it was")


def _source(fs: Any, path: str, kind: Format) -> Source:
    compression = COMPRESSIONS.get(os.path.splitext(path.lower())[1])
    if compression and kind in ("parquet", "arrow"):
        raise InputError(f"{path}: a compressed {kind} file; expected it unpacked ({kind} compresses inside)")
    info = fs.info(path)
    if info["type"] not in ("file", "link"):
        raise InputError(f"{path}: is no file but {info['type']} (a pipe?); expected a file")
    local = _is_local(fs)
    version = info.get("mtime") or info.get("ETag") or info.get("etag") or info.get("LastModified") or ""
    url = os.path.abspath(path) if local else fs.unstrip_protocol(path)
    return Source(url, kind, compression, int(info["size"] or 0), str(version))


@contextmanager
def open_source(source: Source) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """(stream of the content, stream of the file itself): the same unless compressed. InputError names the file.

    Errors of a damaged compressed file come out as InputError too, from inside the `with` block.
    """
    with open_file(source) as raw:
        if source.compression is None:
            yield raw, raw
            return
        if source.compression == "zstd":
            from megatron_cpt.corpus.zstd import ZstdReader

            stream: Any = ZstdReader(raw)
        else:
            from fsspec.compression import compr

            stream = compr[source.compression](raw, mode="rb")
        try:
            yield io.BufferedReader(stream, 1 << 20), raw  # for `readline`
        except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
            raise InputError(f"{printable(source.url)}: damaged {source.compression} data ({error})") from None


@contextmanager
def open_file(source: Source) -> Iterator[IO[bytes]]:
    """The bytes of the file as they are stored. InputError when it cannot be opened."""
    from fsspec.core import url_to_fs

    try:
        fs, path = url_to_fs(source.url)
        # remote files are read in parts by many workers: no more at a time than a part
        stream = fs.open(path, "rb") if source.is_local else _remote(fs.open(path, "rb", block_size=2 << 20))
    except OSError as error:
        raise InputError(f"{printable(source.url)}: cannot be read ({error.strerror or error})") from None
    with stream:
        yield stream


def _remote(stream: Any) -> IO[bytes]:
    """fsspec's files lack the limit of `readline`."""
    return io.BufferedReader(stream, 1 << 20)


def sha256_file(path: str | Path) -> str:
    """sha256 (hex) of a file's content, read in parts."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
