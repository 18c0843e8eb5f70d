"""The order of the data: which sample of which corpus is the n-th of the run. Integers only, nothing is materialised.

This is the specification: a pure function of (shares, corpus sizes, seed, block size, n). It does not depend on the
number of processes, the length of the run or where it was resumed.

Two parts answer for the n-th sample:

* `SplitterTree`: which corpus. Each node splits the samples that reach it by a Bresenham rule: of the first k, the left
  child gets round(k * p / 2**64). Any prefix of the run therefore has the asked shares almost exactly.
* `KeyedPermutation`: which sample of the corpus, another shuffle for each epoch.

`SampleOrder.locate_many` answers from the compiled twin of these definitions (csrc/) where it could be built.
"""

from __future__ import annotations

import functools
import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

try:
    from megatron_cpt.data import _sampling
except ImportError:  # installed without a C++ compiler
    _sampling = None  # type: ignore[assignment]

MASK64 = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio: the step of splitmix64's counter
MIXER = 0xD6E8FEB86659FD93  # multiplier of the xmx mixer (J. Maiga)


def mix64(x: int) -> int:
    """A bijection of 64-bit integers that looks random (xorshift-multiply, twice)."""
    x ^= x >> 32
    x = x * MIXER & MASK64
    x ^= x >> 32
    x = x * MIXER & MASK64
    return x ^ (x >> 32)


def combine(*parts: int) -> int:
    """One 64-bit key from several integers; the order of the parts matters."""
    key = 0
    for part in parts:
        key = mix64((key + GOLDEN + (part & MASK64)) & MASK64)
    return key


class KeyedPermutation:
    """A permutation of range(n) chosen by a 64-bit key: `permutation(i)` is in range(n), each value once.

    Large n: a Feistel network of 8 half-rounds on the next power of two, walked until it lands below n. Up to 4096
    values: a Fisher-Yates table, because Feistel networks on tiny domains are not uniform.
    """

    TABLE_LIMIT = 4096

    def __init__(self, n: int, key: int) -> None:
        self.n = n
        if n <= self.TABLE_LIMIT:
            self.table = list(range(n))
            for i in range(n - 1, 0, -1):
                j = mix64((key + i * GOLDEN) & MASK64) % (i + 1)
                self.table[i], self.table[j] = self.table[j], self.table[i]
            return
        bits = (n - 1).bit_length()
        self.left_mask = (1 << bits // 2) - 1
        self.right_bits = bits - bits // 2
        self.right_mask = (1 << self.right_bits) - 1
        self.round_keys = [mix64((key + i * GOLDEN) & MASK64) for i in range(1, 9)]

    def __call__(self, i: int) -> int:
        if self.n <= self.TABLE_LIMIT:
            return self.table[i]
        while True:
            left, right = i >> self.right_bits, i & self.right_mask
            for even, odd in zip(self.round_keys[::2], self.round_keys[1::2], strict=True):
                left ^= mix64(right ^ even) & self.left_mask
                right ^= mix64(left ^ odd) & self.right_mask
            i = left << self.right_bits | right
            if i < self.n:
                return i


@dataclass(frozen=True)
class Leaf:
    """A corpus, by its position in the mixture."""

    corpus: int


@dataclass(frozen=True)
class Split:
    """Of the first k samples that reach this node, `left` gets round(k * left_share / 2**64)."""

    left_share: int
    left: Leaf | Split
    right: Leaf | Split

    def left_count(self, k: int) -> int:
        return (k * self.left_share + (1 << 63)) >> 64


def build_split(left: Leaf | Split, left_weight: Fraction, right: Leaf | Split, right_weight: Fraction) -> Leaf | Split:
    """The node that shares its samples by these weights; a branch without weight is dropped."""
    if not left_weight:
        return right
    if not right_weight:
        return left
    return Split(round(left_weight * (1 << 64) / (left_weight + right_weight)), left, right)


def build_huffman(corpora: Sequence[int], weights: Sequence[Fraction]) -> Leaf | Split:
    """A tree over the corpora with the heaviest near the root, which keeps the deviation of every count small."""
    heap: list[tuple[Fraction, int, Leaf | Split]] = [
        (weight, order, Leaf(corpus)) for order, (corpus, weight) in enumerate(zip(corpora, weights, strict=True))
    ]
    heapq.heapify(heap)
    order = len(heap)
    while len(heap) > 1:
        light, heavy = heapq.heappop(heap), heapq.heappop(heap)
        heapq.heappush(heap, (light[0] + heavy[0], order, build_split(heavy[2], heavy[0], light[2], light[0])))
        order += 1
    return heap[0][2]


class SplitterTree:
    """Which corpus sample n comes from. The root splits general from additional text, so ALMR is exact to half a sample.

    Args:
        almr: share of the additional group, in [0, 1]
        general, additional: corpus positions of the two groups
        weights: weight of each corpus within its group (any positive scale)
    """

    def __init__(
        self, almr: Fraction, general: Sequence[int], additional: Sequence[int], weights: Sequence[Fraction]
    ) -> None:
        groups = [build_huffman(group, [weights[i] for i in group]) if group else None for group in (additional, general)]
        if groups[0] is None or groups[1] is None:
            root = groups[0] or groups[1]
        else:
            root = build_split(groups[0], almr, groups[1], 1 - almr)
        assert root is not None, "a mixture has at least one corpus"
        self.root = root
        self.num_corpora = len(weights)

    def locate(self, n: int) -> tuple[int, int]:
        """Sample n of the run -> (corpus, how many samples of that corpus came before it)."""
        node = self.root
        while isinstance(node, Split):
            before = node.left_count(n)
            if node.left_count(n + 1) > before:
                node, n = node.left, before
            else:
                node, n = node.right, n - before
        return node.corpus, n

    def counts(self, n: int) -> list[int]:
        """How many of the first n samples each corpus gives."""
        counts = [0] * self.num_corpora
        stack: list[tuple[Leaf | Split, int]] = [(self.root, n)]
        while stack:
            node, k = stack.pop()
            if isinstance(node, Leaf):
                counts[node.corpus] = k
            else:
                left = node.left_count(k)
                stack += [(node.left, left), (node.right, k - left)]
        return counts

    def node_table(self) -> tuple[list[tuple[int, int, int]], int]:
        """The tree as a flat table for the compiled twin.

        Returns:
            nodes (left_share, left, right), children before parents, and the root; a child is an index or ~corpus
        """
        nodes: list[tuple[int, int, int]] = []

        def add(node: Leaf | Split) -> int:
            if isinstance(node, Leaf):
                return ~node.corpus
            if node.left_share == 1 << 64:  # a right branch too light for 64 bits never gets a sample
                return add(node.left)
            nodes.append((node.left_share, add(node.left), add(node.right)))
            return len(nodes) - 1

        root = add(self.root)
        return nodes, root


class SampleOrder:
    """The n-th sample of a run -> (corpus, epoch, sample of the corpus).

    Args:
        tree: which corpus
        samples_per_epoch: samples in one pass over each corpus
        seed: of every permutation
        block_size: samples are shuffled within blocks of this size (the global batch), because the tree's choices are
            periodic and a data-parallel rank could otherwise see one corpus only
    """

    def __init__(self, tree: SplitterTree, samples_per_epoch: Sequence[int], seed: int, block_size: int) -> None:
        self.tree = tree
        self.samples_per_epoch = samples_per_epoch
        self.seed = seed
        self.block_size = block_size
        self._permutation = functools.lru_cache(maxsize=4 * len(samples_per_epoch) + 4)(self._build_permutation)
        self._native: _sampling.SampleOrder | None = None
        if _sampling:
            self._native = _sampling.SampleOrder(*tree.node_table(), list(samples_per_epoch), seed & MASK64, block_size)

    def _build_permutation(self, n: int, *key: int) -> KeyedPermutation:
        return KeyedPermutation(n, combine(self.seed, *key))

    def locate(self, n: int) -> tuple[int, int, int]:
        """Sample n of the run -> (corpus, epoch, sample of the corpus)."""
        block, place = divmod(n, self.block_size)
        n = block * self.block_size + self._permutation(self.block_size, 0, block)(place)
        corpus, used = self.tree.locate(n)
        epoch, i = divmod(used, self.samples_per_epoch[corpus])
        return corpus, epoch, self._permutation(self.samples_per_epoch[corpus], 1, corpus, epoch)(i)

    def locate_many(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Samples first to first + count - 1 of the run -> (int32 corpus, int64 epoch, int64 sample of the corpus)."""
        if first < 0 or count < 0:
            raise ValueError(f"{count} samples from {first} were asked for; use numbers from 0 on")
        if self._native:
            return self._native.locate(first, count)
        places = np.array([self.locate(n) for n in range(first, first + count)], np.int64).reshape(count, 3)
        corpus, epoch, sample = places.T.copy()
        return corpus.astype(np.int32), epoch, sample
