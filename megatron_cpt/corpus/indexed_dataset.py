"""Megatron's indexed corpus: `PREFIX.bin` holds token ids back to back, `PREFIX.idx` says where each document begins.

Layout of .idx (little-endian): 9 bytes magic, uint64 version 1, uint8 dtype code, uint64 sequences, uint64 entries of
the document array (documents + 1), then int32 sequence lengths (tokens), int64 sequence pointers (bytes into .bin),
int64 document indices (sequence numbers, from 0 to the number of sequences). Multimodal corpora append int8 modes,
which are not read here.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import os
import struct
from array import array
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from megatron_cpt.utils.errors import InputError, RunError
from megatron_cpt.utils.files import atomic_file

WINDOW = 1 << 22  # tokens read at a time
MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")  # "<" also means no padding: 34 bytes
DTYPE_CODES: dict[int, np.dtype[Any]] = {
    1: np.dtype(np.uint8),
    2: np.dtype(np.int8),
    3: np.dtype(np.int16),
    4: np.dtype(np.int32),
    5: np.dtype(np.int64),
    6: np.dtype(np.float64),
    7: np.dtype(np.float32),
    8: np.dtype(np.uint16),
}

Tokens = npt.NDArray[Any]


def best_dtype(vocab_size: int) -> np.dtype[Any]:
    """uint16 for vocabularies below 65,500, else int32: Megatron's own choice."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


def write_index(idx: IO[bytes], lengths: npt.NDArray[np.int32], dtype: npt.DTypeLike) -> None:
    """Write the .idx of a corpus with one sequence per document. `lengths` (documents,) may be a memory map."""
    dtype, chunk = np.dtype(dtype), 1 << 20
    code = next(code for code, known in DTYPE_CODES.items() if known == dtype)
    idx.write(HEADER.pack(MAGIC, VERSION, code, lengths.size, lengths.size + 1))
    starts = range(0, lengths.size, chunk)
    for start in starts:
        idx.write(lengths[start : start + chunk].astype("<i4", copy=False).tobytes())
    pointer = 0
    for start in starts:
        ends = np.cumsum(lengths[start : start + chunk], dtype=np.int64) * dtype.itemsize + pointer
        idx.write(np.concatenate([np.array([pointer], np.int64), ends[:-1]]).astype("<i8", copy=False).tobytes())
        pointer = int(ends[-1])
    for start in range(0, lengths.size + 1, chunk):
        idx.write(np.arange(start, min(start + chunk, lengths.size + 1), dtype="<i8").tobytes())


class IndexedWriter:
    """Context manager that writes `PREFIX.bin` and `PREFIX.idx`, one sequence per document.

    Both appear (the .bin first) when the block ends cleanly; after an exception neither does.
    """

    def __init__(self, prefix: str, dtype: npt.DTypeLike) -> None:
        self.dtype = np.dtype(dtype)
        if self.dtype not in DTYPE_CODES.values():
            raise InputError(f"{prefix}: dtype is {self.dtype}; expected one of {[str(d) for d in DTYPE_CODES.values()]}")
        self._prefix = prefix
        self._lengths = array("i")  # 4 bytes a document: corpora have hundreds of millions
        self._digest = hashlib.sha256()
        self._files = ExitStack()

    def __enter__(self) -> IndexedWriter:
        # Leaving in reverse order renames .bin before .idx: an .idx is never without its .bin.
        self._idx = self._files.enter_context(atomic_file(Path(self._prefix + ".idx")))
        self._bin = self._files.enter_context(atomic_file(Path(self._prefix + ".bin")))
        return self

    def add_document(self, tokens: npt.ArrayLike) -> None:
        """Append one document of token ids (1-D)."""
        document = np.asarray(tokens)
        self.add_documents(document, np.array([document.size]))

    def add_documents(self, tokens: Tokens, lengths: npt.NDArray[np.integer[Any]]) -> None:
        """Append several documents: their ids back to back, (sum(lengths),), and the tokens of each, (documents,).

        InputError when an id does not fit the dtype or a document is longer than the 2^31 - 1 tokens the format allows.
        """
        if tokens.ndim != 1 or tokens.size != int(lengths.sum(dtype=np.int64)):
            raise ValueError(f"tokens of shape {tokens.shape} do not make documents of {lengths.sum()} tokens in all")
        if lengths.size and int(lengths.max()) > np.iinfo(np.int32).max:
            raise InputError(f"{self._prefix}: a document has {lengths.max()} tokens; expected fewer than 2^31")
        data = np.ascontiguousarray(self._cast(tokens)).view(np.uint8).data
        self._bin.write(data)
        self._digest.update(data)
        self._lengths.frombytes(lengths.astype(np.int32).tobytes())

    def _cast(self, tokens: Tokens) -> Tokens:
        """`tokens` in this file's dtype, refusing ids that would wrap around."""
        if tokens.dtype == self.dtype or not tokens.size or self.dtype.kind == "f":
            return tokens.astype(self.dtype, copy=False)
        limits = np.iinfo(self.dtype)
        if tokens.min() < limits.min or tokens.max() > limits.max:
            found = f"token ids from {tokens.min()} to {tokens.max()}"
            raise InputError(f"{self._prefix}: {found}; expected ids that fit {self.dtype}")
        return tokens.astype(self.dtype)

    @property
    def bin_sha256(self) -> str:
        """sha256 (hex) of all that was written to .bin so far, computed on the way."""
        return self._digest.hexdigest()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._files as files:
            if error is None:
                write_index(self._idx, np.frombuffer(self._lengths, np.int32), self.dtype)
            else:
                files.__exit__(kind, error, trace)


class IndexedCorpus:
    """Read-only view of a corpus; `prefix` is the path without `.bin`/`.idx`. Cheap to pickle.

    A document may hold several sequences; what this program writes holds one. Methods read from the files, and raise
    RunError where these have changed. The properties `tokens`, `sequence_lengths`, `sequence_pointers` and
    `document_indices` are memory maps, for files that stay as they are: one that is cut short ends, by SIGBUS, a process
    that touches its map.

    Attributes: `files`, what reads "bin" and "idx"; `dtype`; `num_tokens`; `num_documents`.
    """

    def __init__(self, prefix: str) -> None:
        """InputError: a file missing, not an index, of unknown dtype, cut short, or .bin and .idx that disagree."""
        self.prefix = prefix
        idx, bin_ = Path(prefix + ".idx"), Path(prefix + ".bin")
        for path in (idx, bin_):
            if not path.is_file():
                raise InputError(f"{path}: no such file; expected both files of the corpus {prefix}")
        self.dtype, self._sequences, entries = _read_header(idx)
        self.num_documents, sequences = entries - 1, self._sequences
        self.files = {"bin": FileReader(bin_), "idx": FileReader(idx)}
        (first,), (last,) = self.documents(0, 1).tolist(), self.documents(entries - 1, entries).tolist()
        if (first, last) != (0, sequences):
            raise InputError(f"{idx}: document indices go from {first} to {last}; expected 0 to {sequences}")
        # Sequences lie back to back, so the last one's end is their sum: no need to read billions of lengths.
        final = slice(sequences - 1, sequences)
        pointer, length = (int(part[0]) if sequences else 0 for part in (self.pointers(final), self.lengths(final)))
        self.num_tokens = pointer // self.dtype.itemsize + length
        wanted, found = self.num_tokens * self.dtype.itemsize, bin_.stat().st_size
        if found != wanted:
            raise InputError(
                f"{bin_}: found {found} bytes; expected {wanted} ({self.num_tokens} tokens of {self.dtype}, says {idx})"
            )

    def __reduce__(self) -> tuple[type[IndexedCorpus], tuple[str]]:
        return IndexedCorpus, (self.prefix,)  # a memory map pickles as a copy of the file: map it again instead

    def __len__(self) -> int:
        """Sequences, not documents."""
        return self._sequences

    @functools.cached_property
    def tokens(self) -> Tokens:
        """(num_tokens,) all ids in file order."""
        return _map(Path(self.prefix + ".bin"), self.dtype, 0, self.num_tokens)

    @functools.cached_property
    def sequence_lengths(self) -> npt.NDArray[np.int32]:
        """(sequences,) tokens of each."""
        return _map(Path(self.prefix + ".idx"), np.int32, HEADER.size, len(self))

    @functools.cached_property
    def sequence_pointers(self) -> npt.NDArray[np.int64]:
        """(sequences,) byte of .bin where each begins."""
        return _map(Path(self.prefix + ".idx"), np.int64, HEADER.size + 4 * len(self), len(self))

    @functools.cached_property
    def document_indices(self) -> npt.NDArray[np.int64]:
        """(num_documents + 1,) sequence where each document begins."""
        return _map(Path(self.prefix + ".idx"), np.int64, HEADER.size + 12 * len(self), self.num_documents + 1)

    def lengths(self, part: slice = slice(None)) -> npt.NDArray[np.int32]:
        """Tokens of some sequences (default: of all), read from the file."""
        first, last, _ = part.indices(len(self))
        return np.frombuffer(self.files["idx"].read(HEADER.size + 4 * first, 4 * (last - first)), "<i4")

    def pointers(self, part: slice = slice(None)) -> npt.NDArray[np.int64]:
        """Byte of .bin where each of some sequences (default: all) begins, read from the file."""
        first, last, _ = part.indices(len(self))
        return Pointers(self.files["idx"], HEADER.size + 4 * len(self), len(self)).part(first, last)

    def documents(self, first: int, stop: int) -> npt.NDArray[np.int64]:
        """Sequences where documents first to stop - 1 begin, read from the file; number `num_documents`: where all end."""
        return Pointers(self.files["idx"], HEADER.size + 12 * len(self), self.num_documents + 1).part(first, stop)

    def tokens_at(self, places: npt.NDArray[np.int64]) -> Tokens:
        """Tokens at some places of the token stream, read from the file a window at a time."""
        found, order, begin = np.empty(places.size, self.dtype), np.argsort(places, kind="stable"), 0
        while begin < order.size:
            start = int(places[order[begin]])
            end = int(np.searchsorted(places, start + WINDOW, sorter=order))
            here = places[order[begin:end]] - start
            found[order[begin:end]] = self.read(start, int(here[-1]) + 1)[here]
            begin = end
        return found

    def __getitem__(self, index: int) -> Tokens:
        """Tokens of sequence `index`, in the file's dtype, read from the file."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.prefix}: sequence {index} of {len(self)}")
        number = index % len(self)
        one = slice(number, number + 1)
        start, length = int(self.pointers(one)[0]) // self.dtype.itemsize, int(self.lengths(one)[0])
        if not 0 <= start <= start + length <= self.num_tokens:
            raise InputError(
                f"{self.prefix}.idx: sequence {index} is said to be tokens {start} to {start + length}; "
                f"expected them within the {self.num_tokens} of the corpus"
            )
        return self.read(start, length)

    def sample(self, start: int, length: int) -> npt.NDArray[np.int64]:
        """(length,) int64 tokens from position `start` of the token stream, across document borders."""
        return self.read(start, length).astype(np.int64)

    def read(self, start: int, length: int) -> Tokens:
        """(length,) tokens from position `start` of the token stream, read from the file.

        RunError: the file is not what it was when it was opened, or cannot be read.
        """
        if not 0 <= start <= start + length <= self.num_tokens:
            raise IndexError(f"{self.prefix}: tokens {start} to {start + length} of {self.num_tokens}")
        return np.frombuffer(self.files["bin"].read(start * self.dtype.itemsize, length * self.dtype.itemsize), self.dtype)

    def sequences_at(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """(n,) positions after `start` and before `stop` where a sequence begins: found in the index, no token is read.

        RunError: as `read`; or the index is damaged.
        """
        pointers = Pointers(self.files["idx"], HEADER.size + 4 * len(self), len(self))
        first = bisect.bisect_right(pointers, start * self.dtype.itemsize)
        last = bisect.bisect_left(pointers, stop * self.dtype.itemsize, lo=first)
        begins = pointers.part(first, last) // self.dtype.itemsize
        if begins.size and not start < begins.min() <= begins.max() < stop:
            raise RunError(
                f"{self.prefix}.idx: sequences {first} to {last - 1} begin at tokens {begins.min()} to {begins.max()}; "
                f"expected them between {start} and {stop}: the file is damaged"
            )
        return np.unique(begins)  # a sequence without tokens begins where the next one does

    def document_at(self, position: int) -> int:
        """The document that a position of the token stream lies in."""
        pointers = Pointers(self.files["idx"], HEADER.size + 4 * len(self), len(self))
        sequence = bisect.bisect_right(pointers, position * self.dtype.itemsize) - 1
        documents = Pointers(self.files["idx"], HEADER.size + 12 * len(self), self.num_documents + 1)
        return bisect.bisect_right(documents, sequence) - 1


class FileReader:
    """Reads parts of a file that is not supposed to change. Threads may share one."""

    def __init__(self, path: Path) -> None:
        """OSError: it cannot be opened."""
        self.path = path
        # Not at the first read: two threads would both open it there, and the one whose file is dropped, and so closed,
        # would read from whatever gets its number next.
        self._file = path.open("rb", buffering=0)
        self.size = os.fstat(self._file.fileno()).st_size

    def version(self) -> list[int]:
        """Bytes, time of the last change in nanoseconds, inode: another version of the file has another. OSError: none."""
        status = os.fstat(self._file.fileno())
        return [status.st_size, status.st_mtime_ns, status.st_ino]

    def read(self, start: int, count: int) -> bytes:
        """`count` bytes from `start` on. RunError: the file has become shorter, or cannot be read."""
        parts, place = [], start
        try:
            while place < start + count:
                part = os.pread(self._file.fileno(), start + count - place, place)
                if not part:
                    break
                parts.append(part)
                place += len(part)
            found = os.fstat(self._file.fileno()).st_size
        except OSError as error:
            raise RunError(f"{self.path}: bytes {start} to {start + count} cannot be read: {error.strerror}") from error
        if place < start + count or found != self.size:
            raise RunError(
                f"{self.path}: found {found} bytes; expected {self.size}: the file has changed since it was opened"
            )
        return parts[0] if len(parts) == 1 else b"".join(parts)


class Pointers(Sequence[int]):
    """int64 numbers in a file, as a sequence that can be searched without reading it as a whole."""

    def __init__(self, file: FileReader, offset: int, count: int) -> None:
        self._file, self._offset, self._count = file, offset, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> int:  # type: ignore[override]  # no slices: `part`
        return int.from_bytes(self._file.read(self._offset + 8 * index, 8), "little", signed=True)

    def part(self, first: int, last: int) -> npt.NDArray[np.int64]:
        """Numbers first to last - 1."""
        return np.frombuffer(self._file.read(self._offset + 8 * first, 8 * (last - first)), "<i8").astype(np.int64)


def _read_header(idx: Path) -> tuple[np.dtype[Any], int, int]:
    """(dtype, sequences, entries of the document array) of an .idx file, checked against its size."""
    with idx.open("rb") as stream:
        header = stream.read(HEADER.size)
    if not header.startswith(MAGIC):
        raise InputError(f"{idx}: begins with {header[:9]!r}; expected {MAGIC!r}, the mark of a Megatron index")
    if len(header) < HEADER.size:
        raise InputError(f"{idx}: truncated: found {len(header)} bytes; expected a header of {HEADER.size}")
    _, version, code, sequences, entries = HEADER.unpack(header)
    if version != VERSION:
        raise InputError(f"{idx}: version is {version}; expected {VERSION}")
    if code not in DTYPE_CODES:
        raise InputError(f"{idx}: dtype code is {code}; expected one of {sorted(DTYPE_CODES)}")
    found, wanted = idx.stat().st_size, HEADER.size + 12 * sequences + 8 * entries
    if entries < 1 or found < wanted:
        content = f"{sequences} sequences, {entries} document indices"
        raise InputError(f"{idx}: truncated: found {found} bytes; expected {wanted} ({content})")
    return DTYPE_CODES[code], sequences, entries


def _map(path: Path, dtype: npt.DTypeLike, offset: int, count: int) -> Tokens:
    """(count,) read-only map of part of a file, as a plain array: slicing one is much cheaper than slicing a memmap."""
    if count == 0:  # an empty range cannot be mapped
        return np.empty(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(count,)).view(np.ndarray)
