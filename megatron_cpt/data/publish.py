"""The last steps of making a corpus: shuffle, index, and the renames that make it appear, the manifest last."""

from __future__ import annotations

import os
import re
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cpt.data.indexed import write_index
from megatron_cpt.data.manifest import FileInfo, manifest_path
from megatron_cpt.data.partial import partial_folder, read_state
from megatron_cpt.data.shuffle import shuffle_documents
from megatron_cpt.data.sources import sha256_file
from megatron_cpt.errors import InputError

CHUNK = 1 << 24
SUFFIXES = (".bin", ".idx", ".json", ".metadata.jsonl", ".errors.jsonl")


def outputs(prefix: str) -> list[str]:
    """All files a corpus may have."""
    return [prefix + suffix for suffix in SUFFIXES]


def is_output(prefix: str, path: str) -> bool:
    """Whether a path is of the corpus `prefix`, of one of its partitions, or of one of them in the making."""
    stem = os.path.realpath(prefix)
    suffixes = "|".join(map(re.escape, SUFFIXES))
    pattern = rf"(-\d{{5}}-of-\d{{5}})?({suffixes}|\.partial(/.*|\.lock)?)"
    return path.startswith(stem) and re.fullmatch(pattern, path[len(stem) :]) is not None


def check_output(prefix: str, overwrite: bool) -> None:
    """InputError when the corpus exists (without `overwrite`), in part even, or its folder cannot be made or written."""
    if "://" in prefix:
        raise InputError(f"output_prefix {prefix}: is a URL; wanted a path of this machine")
    existing = [path for path in outputs(prefix) if Path(path).exists()]
    if existing and not overwrite and "publish" not in (read_state(partial_folder(prefix)) or {}):
        raise InputError(f"output_prefix {prefix}: found {', '.join(existing)}; wanted a new name or overwrite")
    is_corpus = partial_folder(prefix).exists() or any(path.endswith((".bin", ".idx")) for path in existing)
    if existing and not is_corpus:
        raise InputError(f"output_prefix {prefix}: {existing[0]} is of no corpus: not replaced; wanted another name")
    folder = Path(prefix).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"output_prefix {prefix}: cannot make folder {folder} ({error.strerror})") from None
    if not os.access(folder, os.W_OK):
        raise InputError(f"output_prefix {prefix}: folder {folder} is not writable")


def complete(
    folder: Path, dtype: str, bin_sha256: str, shuffle_seed: int | None, *, with_metadata: bool, with_errors: bool
) -> tuple[dict[str, str], dict[str, FileInfo]]:
    """Shuffle if wanted and write the index, all in the partial `folder`, whose tokens.bin has the checksum `bin_sha256`.

    Returns ({file in the folder: suffix of PREFIX}, {"bin" and "idx": size and checksum}).
    """
    suffix = ""
    if shuffle_seed is not None:
        suffix = ".shuffled"
        bin_sha256 = _shuffle(folder, shuffle_seed, np.dtype(dtype).itemsize, with_metadata)
    with (folder / "index").open("wb") as stream:
        write_index(stream, map_file(folder / f"lengths.bin{suffix}", np.dtype("<i4")), dtype)
        stream.flush()
        os.fsync(stream.fileno())
    files = {f"tokens.bin{suffix}": ".bin", "index": ".idx"}
    if with_metadata:
        files[f"metadata.jsonl{suffix}"] = ".metadata.jsonl"
    if with_errors:
        files["errors.jsonl"] = ".errors.jsonl"
    info = {
        "bin": FileInfo((folder / f"tokens.bin{suffix}").stat().st_size, bin_sha256),
        "idx": FileInfo((folder / "index").stat().st_size, sha256_file(folder / "index")),
    }
    return files, info


def _shuffle(folder: Path, seed: int, itemsize: int, with_metadata: bool) -> str:
    """Shuffle the files of a partial corpus into `*.shuffled`; returns the sha256 of the tokens."""
    lengths = map_file(folder / "lengths.bin", np.dtype("<i4"))
    content = map_file(folder / "tokens.bin", np.dtype(np.uint8))
    with ExitStack() as stack:
        tokens, new_lengths = (
            stack.enter_context((folder / f"{n}.shuffled").open("wb")) for n in ("tokens.bin", "lengths.bin")
        )
        written = [tokens, new_lengths]
        digest = shuffle_documents(content, lengths, seed, tokens, new_lengths, folder, itemsize)
        if with_metadata:
            lines = map_file(folder / "metadata.jsonl", np.dtype(np.uint8))
            written.append(stack.enter_context((folder / "metadata.jsonl.shuffled").open("wb")))
            shuffle_documents(lines, _line_lengths(lines, folder), seed, written[-1], None, folder)
        for stream in written:
            stream.flush()
            os.fsync(stream.fileno())
    return digest


def _line_lengths(lines: Any, folder: Path) -> Any:
    """(lines,) bytes of each line, its break included: in a file, as there may be many."""
    with (folder / "line_lengths").open("wb") as stream:
        begin = 0
        for start in range(0, lines.size, CHUNK):
            ends = np.flatnonzero(lines[start : start + CHUNK] == ord("\n")) + start + 1
            stream.write(np.diff(ends, prepend=begin).astype("<i8").tobytes())
            begin = int(ends[-1]) if ends.size else begin
    return map_file(folder / "line_lengths", np.dtype("<i8"))


def map_file(path: Path, dtype: np.dtype[Any]) -> Any:
    """(values,) read-only map of a file, also of an empty one."""
    size = path.stat().st_size // dtype.itemsize
    return np.memmap(path, dtype, "r", shape=(size,)).view(np.ndarray) if size else np.empty(0, dtype)


def publish(prefix: str, folder: Path, files: dict[str, str]) -> str:
    """Rename the files of a finished partial corpus to `prefix` + suffix, the manifest last; may be done again."""
    manifest = manifest_path(prefix)
    if (folder / "manifest.json").exists():
        manifest.unlink(missing_ok=True)  # no old manifest vouches for new files
    for path in outputs(prefix):
        if path not in [prefix + suffix for suffix in files.values()] and path != str(manifest):
            Path(path).unlink(missing_ok=True)  # of the corpus that is replaced
    for name, suffix in files.items():
        if (folder / name).exists():
            (folder / name).replace(prefix + suffix)
    if (folder / "manifest.json").exists():
        (folder / "manifest.json").replace(manifest)
    shutil.rmtree(folder)
    return str(manifest)
