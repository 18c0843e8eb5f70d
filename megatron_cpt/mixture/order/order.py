"""Sample n of a run -> which tokens of which corpus. The specification in Python, and its compiled twin (csrc/).

A pure function of (stages, corpora, seed, block size, n): it does not depend on the number of processes, the length of the
run or where it was resumed.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_cpt.mixture.order.permutation import MASK64, KeyedPermutation, combine
from megatron_cpt.mixture.order.splitters import Leaf, Stage, Tree

try:
    from megatron_cpt.mixture.order import _sampling
except ImportError:  # installed without a C++ compiler
    _sampling = None  # type: ignore[assignment]

BLOCK, EPOCH, PHASE = 0, 1, 2  # what a key is for
NO_TREE = -(1 << 31)
MAX_SAMPLES = 1 << 62

NODE = np.dtype([("left_share", "<u8"), ("left", "<i4"), ("right", "<i4")])
STAGE = np.dtype(
    [
        ("start", "<i8"),
        ("share", "<u8"),
        ("phase", "<u8"),
        ("ramp", "<u8"),
        ("length", "<u8"),
        ("left_before", "<i8"),
        ("right_before", "<i8"),
        ("left", "<i4"),
        ("right", "<i4"),
    ]
)
CORPUS = np.dtype([("tokens", "<i8"), ("samples", "<i8"), ("key", "<u8")])


class CorpusTokens(NamedTuple):
    """What the order has to know of a corpus. Its name, not its place in the mixture, decides how it is shuffled."""

    name: str
    tokens: int

    def samples(self, seq_length: int) -> int:
        """Whole samples in one epoch: seq_length inputs each, and one more token for the last target."""
        return (self.tokens - 1) // seq_length

    def key(self) -> int:
        """64 bits of the name's sha256."""
        return int.from_bytes(hashlib.sha256(self.name.encode("utf-8", "surrogatepass")).digest()[:8], "little")


class SampleLocation(NamedTuple):
    """Where a sample lies: `begin` is its first token in the corpus, whose end is followed by its beginning.

    `begin` itself is always below the corpus's tokens: it is less than seq_length + (samples - 1) * seq_length.
    """

    corpus: int
    epoch: int
    sample: int
    begin: int


class SampleLocations(NamedTuple):
    """Places of many samples: int32 corpus, and int64 epoch, sample and begin, each (samples,)."""

    corpus: npt.NDArray[np.int32]
    epoch: npt.NDArray[np.int64]
    sample: npt.NDArray[np.int64]
    begin: npt.NDArray[np.int64]


@dataclass(frozen=True)
class OrderTables:
    """A SampleOrder as flat arrays for the compiled twins. Children come before their parents in `nodes`."""

    nodes: npt.NDArray[np.void]
    stages: npt.NDArray[np.void]
    base: npt.NDArray[np.int64]
    """(stages, corpora)"""
    corpora: npt.NDArray[np.void]
    seed: int
    seq_length: int
    block_size: int
    block_origin: int


class SampleOrder:
    """The places of the samples of a run.

    Args:
        stages: from sample 0 on, see `splitters.build_stages`
        corpora: in the order of their positions in the stages
        seq_length: inputs of a sample; it reads one token more
        seed: of every permutation
        block_size: samples are shuffled within blocks of this size (the global batch), because the splitters' choices are
            periodic and a data-parallel rank could otherwise see one corpus only
        block_origin: where the first block begins; no sample before it can be asked for
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        corpora: Sequence[CorpusTokens],
        seq_length: int,
        seed: int,
        block_size: int,
        block_origin: int = 0,
    ) -> None:
        self.stages, self.corpora = stages, corpora
        self.seq_length, self.seed, self.block_size, self.block_origin = seq_length, seed, block_size, block_origin
        self._starts = [stage.start for stage in stages]
        self._sizes = [corpus.samples(seq_length) for corpus in corpora]
        self._keys = [corpus.key() for corpus in corpora]
        self._permutation = functools.lru_cache(maxsize=4 * len(corpora) + 4)(self._build_permutation)
        self._native = _sampling.SampleOrder(*vars(self.tables()).values()) if _sampling else None

    def _build_permutation(self, n: int, *key: int) -> KeyedPermutation:
        return KeyedPermutation(n, combine(self.seed, *key))

    def _stage(self, n: int) -> Stage:
        return self.stages[bisect.bisect_right(self._starts, n) - 1]

    def counts(self, n: int) -> list[int]:
        """How many of the first n samples of the run each corpus gives (whole blocks; within one the order is random)."""
        return self._stage(n).counts(n)

    def lookup(self, n: int) -> SampleLocation:
        """Where sample n of the run lies."""
        block, place = divmod(n - self.block_origin, self.block_size)
        first = self.block_origin + block * self.block_size
        n = first + self._permutation(self.block_size, BLOCK, first)(place)
        corpus, used = self._stage(n).find(n)
        epoch, i = divmod(used, self._sizes[corpus])
        sample = self._permutation(self._sizes[corpus], EPOCH, self._keys[corpus], epoch)(i)
        return SampleLocation(corpus, epoch, sample, self.token_phase(corpus, epoch) + sample * self.seq_length)

    def find(self, corpus: int, used: int, stop: int) -> int | None:
        """The sample of the run that is a corpus's number `used`, counted over all epochs: what `lookup` gives it for.

        None: no sample from the first block to that before `stop` is.
        """
        end = self.block_origin + -(-(stop - self.block_origin) // self.block_size) * self.block_size
        if not self.counts(self.block_origin)[corpus] <= used < self.counts(end)[corpus]:
            return None
        before_shuffling = range(self.block_origin, end)
        n = self.block_origin + bisect.bisect_right(before_shuffling, used, key=lambda k: self.counts(k)[corpus]) - 1
        block, place = divmod(n - self.block_origin, self.block_size)
        first = self.block_origin + block * self.block_size
        found = first + self._permutation(self.block_size, BLOCK, first).inverse(place)
        return found if found < stop else None

    def find_tokens(self, corpus: int, begin: int, end: int, stop: int, start: int = 0) -> list[int]:
        """All samples from `start` to `stop` - 1 that read any of a corpus's tokens `begin` to `end` - 1, in their order.

        A sample reads seq_length + 1 tokens, the last of them as a target only, so two may read the same token in one epoch.
        """
        size, tokens, length = self._sizes[corpus], self.corpora[corpus].tokens, self.seq_length
        whole_blocks = max(start - self.block_origin, 0) // self.block_size * self.block_size
        first, last = (self.counts(n)[corpus] for n in (self.block_origin + whole_blocks, stop + self.block_size))
        found = set[int]()
        for epoch in range(first // size, -(-last // size)):
            phase = self.token_phase(corpus, epoch)
            permutation = self._permutation(size, EPOCH, self._keys[corpus], epoch)
            for turn in (0, tokens):  # a sample goes on at the corpus's beginning
                least = max(-(-(begin + turn - phase - length) // length), 0)
                most = min((end - 1 + turn - phase) // length, size - 1)
                for sample in range(least, most + 1):
                    n = self.find(corpus, epoch * size + permutation.inverse(sample), stop)
                    found |= {n} if n is not None and n >= start else set()
        return sorted(found)

    def token_phase(self, corpus: int, epoch: int) -> int:
        """First token of the first sample of an epoch: each but the first cuts the corpus at other places."""
        return combine(self.seed, PHASE, self._keys[corpus], epoch) % self.seq_length if epoch else 0

    def lookup_many(self, first: int, count: int, threads: int = 1) -> SampleLocations:
        """Samples first to first + count - 1 of the run. `threads` matters to the compiled twin only."""
        if first < self.block_origin or count < 0 or first + count > MAX_SAMPLES:
            raise ValueError(f"{count} samples from {first}: use numbers from {self.block_origin} to 2**62")
        if self._native:
            return SampleLocations(*self._native.locate(first, count, threads))
        places = np.array([self.lookup(n) for n in range(first, first + count)], np.int64).reshape(count, 4)
        corpus, epoch, sample, begin = places.T.copy()
        return SampleLocations(corpus.astype(np.int32), epoch, sample, begin)

    def token_ranges(self, first: int, count: int) -> list[tuple[int, list[tuple[int, int]]]]:
        """Of samples first to first + count - 1: the corpus, and (first token, number of tokens) of the sample's parts.

        seq_length + 1 tokens together; two parts when it goes on at the corpus's beginning.
        """
        places, token_ranges = self.lookup_many(first, count), []
        for corpus, begin in zip(places.corpus.tolist(), places.begin.tolist(), strict=True):
            here = min(self.seq_length + 1, self.corpora[corpus].tokens - begin)
            rest = self.seq_length + 1 - here
            token_ranges.append((corpus, [(begin, here), (0, rest)] if rest else [(begin, here)]))
        return token_ranges

    def tables(self) -> OrderTables:
        """Everything `lookup` needs, as arrays."""
        nodes: list[tuple[int, int, int]] = []
        places: dict[int, int] = {}  # trees that stages share are written once

        def add(tree: Tree) -> int:
            if isinstance(tree, Leaf):
                return ~tree.corpus
            if id(tree) not in places:
                nodes.append((tree.left_share, add(tree.left), add(tree.right)))
                places[id(tree)] = len(nodes) - 1
            return places[id(tree)]

        stages = [
            (
                *(stage.start, stage.share, stage.phase, stage.ramp, stage.length),
                *(stage.left_before, stage.right_before),
                *(add(stage.left), NO_TREE if stage.right is None else add(stage.right)),
            )
            for stage in self.stages
        ]
        corpora = [
            (corpus.tokens, size, key) for corpus, size, key in zip(self.corpora, self._sizes, self._keys, strict=True)
        ]
        return OrderTables(
            nodes=np.array(nodes, NODE),
            stages=np.array(stages, STAGE),
            base=np.array([stage.base for stage in self.stages], np.int64).reshape(len(stages), len(corpora)),
            corpora=np.array(corpora, CORPUS),
            seed=self.seed & MASK64,
            seq_length=self.seq_length,
            block_size=self.block_size,
            block_origin=self.block_origin,
        )
