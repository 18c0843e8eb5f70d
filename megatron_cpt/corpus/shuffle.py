"""Documents in a pseudo-random order that depends on the seed alone, in bounded memory.

Document k gets the key mix(k + mix(seed)); sorting by key is the order. Mixing is a bijection of 64-bit numbers
(splitmix64's finalizer, Steele et al. 2014), so keys never tie, and the number of documents need not be known. Corpora
larger than a bucket are dealt out to buckets by the leading bits of the keys, then each bucket is sorted: two passes.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

BUCKET_BYTES = 64 << 20
MAX_BUCKETS = 256  # each has three files open at once
COPY_BYTES = 8 << 20

Bytes = npt.NDArray[np.uint8]
Keys = npt.NDArray[np.uint64]


def document_keys(first: int, count: int, seed: int) -> Keys:
    """(count,) keys of documents first, first + 1, ...: the smaller, the earlier in the shuffled corpus."""
    with np.errstate(over="ignore"):
        return _mix(np.arange(first, first + count, dtype=np.uint64) + _mix(np.array([seed], np.uint64)))


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def shuffle_documents(
    content: Bytes,
    lengths: npt.NDArray[Any],
    seed: int,
    output: IO[bytes],
    output_lengths: IO[bytes] | None,
    scratch: Path,
    itemsize: int = 1,
) -> str:
    """Write documents in shuffled order; returns the sha256 (hex) of what `output` got.

    `content` (bytes,): documents back to back, `lengths` (documents,): items of `itemsize` bytes in each; both may be
    memory maps. `output_lengths` gets the lengths in the new order, in their dtype. `scratch`: a folder for buckets, as
    large as `content` in all.
    """
    digest = hashlib.sha256()
    for part, part_lengths, keys in _buckets(content, lengths, seed, scratch, itemsize):
        order = np.argsort(keys)
        part_sizes = part_lengths.astype(np.int64) * itemsize
        starts = np.cumsum(part_sizes) - part_sizes
        for piece in _gather(part, starts[order], part_sizes[order]):
            digest.update(piece.data)
            output.write(piece.data)
        if output_lengths is not None:
            output_lengths.write(part_lengths[order].tobytes())
    return digest.hexdigest()


def _gather(content: Bytes, starts: npt.NDArray[np.int64], sizes: npt.NDArray[Any]) -> Iterator[Bytes]:
    """The documents at `starts`, one after the other, some megabytes at a time."""
    pieces: list[Bytes] = []
    held = 0
    for start, size in zip(starts.tolist(), sizes.tolist(), strict=True):
        pieces.append(content[start : start + size])
        held += size
        if held >= COPY_BYTES:
            yield np.concatenate(pieces)
            pieces, held = [], 0
    if pieces:
        yield np.concatenate(pieces)


def _buckets(
    content: Bytes, lengths: npt.NDArray[Any], seed: int, scratch: Path, itemsize: int
) -> Iterator[tuple[Bytes, npt.NDArray[Any], Keys]]:
    """(content, lengths, keys) of each bucket, in the order of their keys."""
    bits = min((content.size - 1) // BUCKET_BYTES, MAX_BUCKETS - 1).bit_length() if content.size else 0
    if bits == 0:
        yield content, lengths, document_keys(0, lengths.size, seed)
        return
    with tempfile.TemporaryDirectory(dir=scratch, prefix="buckets.") as folder, ExitStack() as stack:
        buckets = [_Bucket(Path(folder) / f"{number:03d}") for number in range(2**bits)]
        streams = [[stack.enter_context(path.open("wb")) for path in bucket.paths] for bucket in buckets]
        _deal_out(content, lengths, seed, bits, streams, itemsize)
        stack.close()
        for bucket in buckets:
            yield bucket.read(lengths.dtype)
            for path in bucket.paths:
                path.unlink()


class _Bucket:
    """Three files: content, lengths and keys of some of the documents."""

    def __init__(self, path: Path) -> None:
        self.paths = [path.with_suffix(suffix) for suffix in (".content", ".lengths", ".keys")]

    def read(self, dtype: np.dtype[Any]) -> tuple[Bytes, npt.NDArray[Any], Keys]:
        """What is in the files; the content is mapped, not read."""
        content, lengths, keys = self.paths
        empty = content.stat().st_size == 0
        mapped = np.empty(0, np.uint8) if empty else np.memmap(content, np.uint8, "r").view(np.ndarray)
        return mapped, np.fromfile(lengths, dtype), np.fromfile(keys, np.uint64)


def _deal_out(
    content: Bytes, lengths: npt.NDArray[Any], seed: int, bits: int, streams: Sequence[Sequence[IO[bytes]]], itemsize: int
) -> None:
    """Append each document to the bucket that the leading bits of its key name."""
    position = 0
    chunk = max(1, int(lengths.size * COPY_BYTES // content.size))  # documents that make about COPY_BYTES
    for first in range(0, lengths.size, chunk):
        some = lengths[first : first + chunk]
        sizes = some.astype(np.int64) * itemsize
        keys = document_keys(first, some.size, seed)
        starts = np.cumsum(sizes) - sizes + position
        position += int(sizes.sum())
        bucket_of = keys >> np.uint64(64 - bits)
        for bucket in np.unique(bucket_of).tolist():
            inside = np.flatnonzero(bucket_of == bucket)
            into, into_lengths, into_keys = streams[bucket]
            for piece in _gather(content, starts[inside], sizes[inside]):
                into.write(piece.data)
            into_lengths.write(some[inside].tobytes())
            into_keys.write(keys[inside].tobytes())
