"""A hold-out: some documents of a corpus, exactly as many as were asked for, in a corpus of their own for validation.

Which ones depends on their texts alone, not on files, workers, partitions or the tokenizer: those whose texts, white space
aside, have the smallest hashes. They lie all over the input, and copies of a text are never on both sides.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import floor
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from megatron_cpt.corpus.shuffle import COPY_BYTES
from megatron_cpt.utils.errors import InputError
from megatron_cpt.utils.input_files import amount, number, shown

SUFFIX = "_holdout"
"""Of the prefix of the corpus that is held out."""

RECORD = np.dtype([("key", "<u8"), ("text_bytes", "<u8"), ("characters", "<u8")])
"""What is kept of each document for choosing, in documents.bin."""

Holdout = int | float | str


@dataclass(frozen=True)
class Side:
    """One of the two corpora: its name ("train" or "holdout"), its documents (numbers in the whole), and what they hold."""

    name: str
    split: str
    """Tells splits apart: the same for both sides, another for other documents."""
    documents: npt.NDArray[np.int64]
    tokens: int
    text_bytes: int
    characters: int
    bin_sha256: str


def parse_holdout(written: Holdout | None) -> int | Fraction | None:
    """200 or 10K -> so many documents; 0.005 or "0.5%" -> that share. InputError: neither."""
    if written is None:
        return None
    text = str(written).strip()
    value = number(text.removesuffix("%")) if "/" not in text else None
    share = value / 100 if value is not None and text.endswith("%") else value
    if share is not None and 0 < share < 1:
        return share
    count = amount(text) if re.fullmatch(r"[\d_]+|[\d_.]+ *[kmb]", text, re.ASCII | re.IGNORECASE) else None
    if not count:
        raise InputError(
            f"holdout is {shown(written)}; expected a number of documents, as in 200 or 10K, or a share, as in 0.5%"
        )
    return count


def number_held_out(written: Holdout, documents: int) -> int:
    """How many of so many documents are held out. InputError: none, or all."""
    asked = parse_holdout(written)
    count = asked if isinstance(asked, int) else floor((asked or 0) * documents + Fraction(1, 2))
    if not 0 < count < documents:
        raise InputError(f"holdout is {written}, {count:,} of {documents:,} documents; expected at least one, and not all")
    return count


def document_records(texts: Sequence[str], sizes: Sequence[int]) -> bytes:
    """A RECORD for each text; `sizes`: their bytes in UTF-8."""
    records = np.empty(len(texts), RECORD)
    digests = (hashlib.blake2b(" ".join(text.split()).encode(), digest_size=8).digest() for text in texts)
    records["key"] = np.frombuffer(b"".join(digests), "<u8")
    records["text_bytes"] = sizes
    records["characters"] = [len(text) for text in texts]
    return records.tobytes()


def choose_documents(keys: npt.NDArray[np.uint64], count: int) -> npt.NDArray[np.int64]:
    """(count,) numbers of the documents to hold out, by key, copies by place.

    A text with more copies than there is room left for stays where it is. InputError: so many cannot be found.
    """
    distinct, copies = np.unique(keys, return_counts=True)
    taken, left = [], count
    for key, size in zip(distinct.tolist(), copies.tolist(), strict=True):
        if size <= left:
            taken.append(key)
            left -= size
            if not left:
                break
    if left:
        raise InputError(f"holdout is {count:,}: only {count - left:,} documents can be held out with all of their copies")
    chosen = np.flatnonzero(np.isin(keys, np.array(taken, np.uint64)))
    return chosen[np.argsort(keys[chosen], kind="stable")]


def split_corpus(folder: Path, written: Holdout, dtype: str, metadata_lengths: npt.NDArray[Any] | None) -> tuple[Side, Side]:
    """Divide tokens.bin, lengths.bin and metadata.jsonl of `folder` into `*.train` and `*.holdout`; returns both sides.

    `metadata_lengths` (documents,): bytes of each line of metadata.jsonl; None: there is no metadata.
    """
    lengths = map_file(folder / "lengths.bin", np.dtype("<i4"))
    records = map_file(folder / "documents.bin", RECORD)
    if records.size != lengths.size:
        raise InputError(f"{folder}/documents.bin: found {records.size:,} documents; expected {lengths.size:,}")
    keys = np.ascontiguousarray(records["key"])
    chosen = choose_documents(keys, number_held_out(written, lengths.size))
    split = hashlib.sha256(np.sort(keys[chosen]).tobytes() + str(lengths.size).encode()).hexdigest()[:16]
    kept = np.delete(np.arange(lengths.size), chosen)
    sides = []
    for name, documents in (("train", kept), ("holdout", chosen)):
        sizes = lengths.astype(np.int64) * np.dtype(dtype).itemsize
        digest = _gather(folder, "tokens.bin", name, sizes, documents)
        _gather(folder, "lengths.bin", name, np.full(lengths.size, lengths.itemsize, np.int64), documents)
        if metadata_lengths is not None:
            _gather(folder, "metadata.jsonl", name, metadata_lengths, documents)
        tokens, text_bytes, characters = (
            int(column[documents].sum()) for column in (lengths, records["text_bytes"], records["characters"])
        )
        sides.append(Side(name, split, documents, tokens, text_bytes, characters, digest))
    return sides[0], sides[1]


def _gather(folder: Path, file: str, name: str, sizes: npt.NDArray[np.int64], documents: npt.NDArray[np.int64]) -> str:
    """Write `documents` of `folder/file`, whose bytes are `sizes` in all, to `file.name`; returns the sha256."""
    content = map_file(folder / file, np.dtype(np.uint8))
    ends = np.cumsum(sizes)
    digest = hashlib.sha256()
    with (folder / f"{file}.{name}").open("wb") as output:
        # what lies together is copied together
        breaks = np.flatnonzero(np.diff(documents) != 1) + 1
        for run in np.split(documents, breaks) if documents.size else []:
            _copy(content, int(ends[run[0]] - sizes[run[0]]), int(ends[run[-1]]), output, digest)
        output.flush()
        os.fsync(output.fileno())
    return digest.hexdigest()


def _copy(content: npt.NDArray[np.uint8], begin: int, end: int, output: IO[bytes], digest: Any) -> None:
    for start in range(begin, end, COPY_BYTES):
        piece = content[start : min(start + COPY_BYTES, end)].data
        output.write(piece)
        digest.update(piece)


def documents_per_source(counts: Sequence[int], documents: npt.NDArray[np.int64]) -> list[int]:
    """How many of `documents` come from each source; `counts`: documents of each source, which lie one after the other."""
    ends = np.searchsorted(np.sort(documents), np.cumsum(counts))
    return [int(n) for n in np.diff(ends, prepend=0)]


def are_apart(ours: str | None, theirs: str | None) -> bool:
    """Whether two manifests' `holdout` say that they are the two sides of one split."""
    sides = dict(side.split(":", 1) for side in (ours, theirs) if side)
    return sides.keys() == {"train", "holdout"} and set(sides["holdout"].split(",")) <= set(sides["train"].split(","))


def map_file(path: Path, dtype: np.dtype[Any]) -> Any:
    """(values,) read-only map of a file, also of an empty one."""
    size = path.stat().st_size // dtype.itemsize
    return np.memmap(path, dtype, "r", shape=(size,)).view(np.ndarray) if size else np.empty(0, dtype)
