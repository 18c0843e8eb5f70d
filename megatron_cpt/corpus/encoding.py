"""Units of input -> token ids, counts, and a sample to check them by. What a worker process does."""

from __future__ import annotations

import bisect
import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import psutil

from megatron_cpt.corpus.documents import Content, Problem, read_part
from megatron_cpt.corpus.holdout import document_records
from megatron_cpt.corpus.indexed_dataset import best_dtype
from megatron_cpt.corpus.reading import ReadOptions, Unit
from megatron_cpt.corpus.sources import Source
from megatron_cpt.tokenizer import Tokenizer
from megatron_cpt.utils.errors import InputError

Policy = Literal["none", "document"]

CACHE_BYTES = 256 << 20
"""How much a worker may grow before it is replaced: gigatoken keeps every distinct word it has met, for ever."""

BATCH_CHARACTERS = 2 << 20
SAMPLES_PER_UNIT = 8
LANGUAGE_CHARACTERS = 500  # of a document, for its language
AUDIT_CHARACTERS = 128  # of a document, for a comparison with the reference tokenizer


class Engine(Protocol):
    """What encodes: a `FastTokenizer`, or the `ReferenceEncoder`."""

    def encode_batch(self, texts: Sequence[str]) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
        """(tokens,) ids of many texts back to back, and how many each has (texts,)."""


class ReferenceEncoder:
    """A `Tokenizer` as an engine."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def encode_batch(self, texts: Sequence[str]) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
        """See `Engine`. A few megabytes at a time: `tokenizers` needs many times the memory of the text."""
        ids, lengths = [np.empty(0, np.uint32)], np.zeros(len(texts), np.int64)
        begin = characters = 0
        for i, text in enumerate(texts, start=1):
            characters += len(text)
            if characters > BATCH_CHARACTERS or i == len(texts):
                batch = self._tokenizer.encode_batch(texts[begin:i])
                lengths[begin:i] = [len(row) for row in batch]
                ids += [np.array(row, np.uint32) for row in batch]
                begin, characters = i, 0
        return np.concatenate(ids), lengths


@dataclass(frozen=True)
class TokenPolicy:
    """Which tokens go around documents, and the tokens' width. Ids None: no token there."""

    bos_id: int | None
    eos_id: int | None
    dtype: str

    @classmethod
    def of(cls, vocab_size: int, bos_id: int | None, eos_id: int, bos: Policy, eos: Policy, tokenizer: str) -> TokenPolicy:
        """From a tokenizer's ids. InputError: a beginning-of-text token is wanted and there is none."""
        if bos == "document" and bos_id is None:
            raise InputError(f"bos is 'document' but {tokenizer} has no beginning-of-text token; expected 'none'")
        before, after = (bos_id if bos == "document" else None), (eos_id if eos == "document" else None)
        return cls(before, after, str(best_dtype(vocab_size)))


class PartCounts(NamedTuple):
    """What one part gave: its lines or rows, its documents, and what could not be taken."""

    source: int
    records: int
    documents: int
    problems: list[Problem]


class EncodedUnit(NamedTuple):
    """Documents in order: ids back to back (tokens,), tokens of each (documents,) int32, and what was counted."""

    tokens: npt.NDArray[Any]
    lengths: npt.NDArray[np.int32]
    parts: list[PartCounts]
    text_bytes: int
    characters: int
    metadata: bytes
    languages: Counter[str]
    """Bytes of text by language code ("un": unknown), as a sample tells."""
    audit: list[tuple[str, npt.NDArray[Any]]]
    """A few short texts and the ids they were given; empty when the reference itself encodes."""
    read_bytes: int
    documents: bytes = b""
    """A `holdout.RECORD` for each document, when documents are to be held out."""


class Encoder:
    """Unit -> EncodedUnit.

    `audited`: the engine is not the reference, so samples are wanted and its cache is watched. `keyed`: documents will be
    held out, by the hashes of their texts.
    """

    def __init__(
        self,
        engine: Engine,
        policy: TokenPolicy,
        sources: Sequence[Source],
        options: ReadOptions,
        audited: bool,
        cache_bytes: int = CACHE_BYTES,
        keyed: bool = False,
    ) -> None:
        self._engine, self._policy, self._sources, self._options = engine, policy, sources, options
        self._audited, self._cache_bytes, self._keyed = audited, cache_bytes, keyed
        self._first_size: int | None = None

    def __call__(self, unit: Unit) -> EncodedUnit:
        if self._first_size is None:
            self._first_size = psutil.Process().memory_info().rss
        contents = [read_part(part, self._sources, self._options) for part in unit.parts]
        texts = [text for content in contents for text in content.texts]
        tokens, lengths = self._with_policy(*self._engine.encode_batch(texts))
        sizes = [utf8_length(text) for text in texts]
        sample = take_sample(texts, sizes)
        return EncodedUnit(
            tokens=tokens,
            lengths=lengths,
            parts=[_counts(content) for content in contents],
            text_bytes=sum(sizes),
            characters=sum(map(len, texts)),
            metadata=b"".join(line for content in contents for line in content.metadata),
            languages=count_languages(sample, sum(sizes)),
            audit=self._audit(sample) if self._audited else [],
            read_bytes=unit.read_bytes,
            documents=document_records(texts, sizes) if self._keyed else b"",
        )

    def _with_policy(
        self, ids: npt.NDArray[np.uint32], lengths: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.int32]]:
        """The ids with the tokens that begin and end each document, and the lengths with them."""
        ends = np.cumsum(lengths)
        around = ((ends - lengths, self._policy.bos_id), (ends, self._policy.eos_id))
        wanted = [(places, token) for places, token in around if token is not None]
        if wanted:
            places = np.stack([places for places, _ in wanted], axis=1).ravel()
            ids = np.insert(ids, places, np.tile(np.array([token for _, token in wanted], np.uint32), lengths.size))
            lengths = lengths + len(wanted)
        if lengths.size and int(lengths.max()) > np.iinfo(np.int32).max:
            raise InputError(f"a document has {lengths.max()} tokens; expected fewer than 2^31, the limit of the format")
        # ids fit by construction: the width was chosen for the vocabulary
        tokens = ids.view(np.int32) if self._policy.dtype == "int32" else ids.astype(self._policy.dtype)
        return tokens, lengths.astype(np.int32)

    def _audit(self, sample: list[str]) -> list[tuple[str, npt.NDArray[Any]]]:
        half = sample[::2]  # enough: as many again would cost 3 % of the time
        pieces = [piece_around(text, len(text) // 2, AUDIT_CHARACTERS) for text in half]
        return list(zip(pieces, per_text(*self._engine.encode_batch(pieces)), strict=True))

    def is_worn_out(self) -> bool:
        """Whether this process has grown by more than its cache may hold."""
        if not self._audited or self._first_size is None:
            return False
        grown: int = psutil.Process().memory_info().rss - self._first_size
        return grown > self._cache_bytes


def per_text(ids: npt.NDArray[Any], lengths: npt.NDArray[np.int64]) -> list[npt.NDArray[Any]]:
    """The ids of each text: what `Engine.encode_batch` gives, taken apart."""
    return np.split(ids, np.cumsum(lengths)[:-1]) if lengths.size else []


def utf8_length(text: str) -> int:
    """Bytes of a text in UTF-8."""
    return len(text) if text.isascii() else len(text.encode())


def take_sample(texts: Sequence[str], sizes: Sequence[int]) -> list[str]:
    """SAMPLES_PER_UNIT pieces of text at equal distances in bytes, so that each stands for as much text as any other."""
    ends = list(itertools.accumulate(sizes))
    found = []
    for k in range(SAMPLES_PER_UNIT if texts else 0):
        position = (2 * k + 1) * ends[-1] // (2 * SAMPLES_PER_UNIT)
        document = bisect.bisect_right(ends, position)
        text, size = texts[document], sizes[document]
        place = (position - ends[document] + size) * len(text) // size
        found.append(piece_around(text, place, LANGUAGE_CHARACTERS))
    return found


def piece_around(text: str, place: int, characters: int) -> str:
    """That many characters of a text around a place in it, or all of it when it has no more."""
    start = max(0, min(place - characters // 2, len(text) - characters))
    return text[start : start + characters]


def count_languages(sample: Sequence[str], text_bytes: int) -> Counter[str]:
    """Bytes by language, as CLD2 tells them of a sample that stands for `text_bytes`. ISO 639 codes; "un": not reliable.

    Nothing without pycld2.
    """
    try:
        import pycld2
    except ImportError:
        return Counter()

    found: Counter[str] = Counter()
    for text in sample:
        try:
            reliable, _, guesses = pycld2.detect(text, bestEffort=False)
        except pycld2.error:  # control characters and the like
            reliable, guesses = False, ()
        found[guesses[0][1] if reliable else "un"] += text_bytes // len(sample)
    return found


def _counts(content: Content) -> PartCounts:
    return PartCounts(content.source, content.records, len(content.texts), content.problems)


def useful_workers(workers: int, read_bytes: int, unit_bytes: int) -> int:
    """No more workers than there are units; 0, this process alone, when there is but one."""
    units = math.ceil(read_bytes / unit_bytes)
    return min(workers, units) if units > 1 else 0
