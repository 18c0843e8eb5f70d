"""The order of the data: permutations, exact shares, epochs, and that nothing but the sample number decides."""

from __future__ import annotations

import random
from collections import Counter
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_cpt.data.sampling import KeyedPermutation, SampleOrder, SplitterTree, combine, mix64

KEYS = st.integers(0, (1 << 64) - 1)
WEIGHTS = st.one_of(st.fractions(Fraction(1, 10**6), 10**6), st.integers(1, 10**12).map(Fraction))
ALMRS = st.one_of(st.fractions(0, 1), st.sampled_from([Fraction(0), Fraction(1), Fraction(33, 100), Fraction(1, 10**9)]))


@st.composite
def mixtures(draw: st.DrawFn) -> tuple[Fraction, int, list[Fraction]]:
    """(ALMR, number of general corpora, weights of all corpora), with text wherever there is a share."""
    weights = draw(st.lists(WEIGHTS, min_size=1, max_size=60))
    almr = draw(ALMRS)
    general = draw(st.integers(0, len(weights)))
    if general == 0:
        almr = Fraction(1)
    if general == len(weights):
        almr = Fraction(0)
    return almr, general, weights


def make_tree(almr: Fraction, general: int, weights: list[Fraction]) -> SplitterTree:
    return SplitterTree(almr, range(general), range(general, len(weights)), weights)


def shares(almr: Fraction, general: int, weights: list[Fraction]) -> list[Fraction]:
    """The share of each corpus in the run, by definition."""
    groups = [weights[:general], weights[general:]]
    return [group_share * w / sum(g) for group_share, g in zip((1 - almr, almr), groups, strict=True) for w in g]


def tally(places: list[tuple[int, int]], corpora: int) -> list[int]:
    counts = Counter(corpus for corpus, _ in places)
    return [counts[corpus] for corpus in range(corpora)]


# As first released; computed by this code, not by another.
PINNED_SMALL = [2, 3, 0, 5, 7, 1, 6, 8, 9, 4]
PINNED_LARGE = [9500, 6731, 4197, 6954, 6328, 5507]
PINNED_ORDER = [(1, 0, 6), (0, 0, 3408), (0, 0, 3278), (0, 0, 173), (1, 0, 4), (1, 0, 3), (0, 0, 1605), (0, 0, 1955)]


def test_mix64_is_injective() -> None:
    assert mix64(0) == 0
    assert len({mix64(x) for x in range(10_000)}) == 10_000
    assert all(0 <= mix64(x) < 1 << 64 for x in ((1 << 64) - 1, 1 << 63, 12345))
    assert combine(1, 2) != combine(2, 1)
    assert combine(0) != combine(0, 0) != combine(0, 0, 0)


def test_order_is_pinned() -> None:
    """Checkpoints hold only `consumed_samples`: a new release must not order the same mixture differently."""
    assert [KeyedPermutation(10, 1)(i) for i in range(10)] == PINNED_SMALL
    assert [KeyedPermutation(10_000, 1)(i) for i in range(6)] == PINNED_LARGE
    order = SampleOrder(make_tree(Fraction(1, 3), 1, [Fraction(1), Fraction(1)]), [5000, 7], seed=1234, block_size=4)
    assert [order.locate(n) for n in range(8)] == PINNED_ORDER


@settings(max_examples=60, deadline=None)
@given(n=st.one_of(st.integers(1, 20_000), st.integers(4090, 4100), st.sampled_from([8192, 8193, 16384, 16385])), key=KEYS)
@example(n=1, key=0)
@example(n=4096, key=0)
@example(n=4097, key=0)
def test_permutation_is_a_bijection(n: int, key: int) -> None:
    permutation = KeyedPermutation(n, key)
    assert sorted(permutation(i) for i in range(n)) == list(range(n))


@settings(max_examples=20, deadline=None)
@given(key=KEYS, start=st.integers(0, 2**40))
def test_permutation_of_a_huge_range(key: int, start: int) -> None:
    n = 2**40 + 7  # the next power of two is nearly twice as much: half of all values walk on
    permutation = KeyedPermutation(n, key)
    inputs = {*range(500), *range(n - 500, n), *((start + i * 982_451_653) % n for i in range(1000))}
    outputs = {permutation(i) for i in inputs}
    assert len(outputs) == len(inputs)
    assert min(outputs) >= 0
    assert max(outputs) < n
    assert max(outputs) > n // 2 > min(outputs)


@pytest.mark.parametrize("n", [50, 4096, 4097, 20_000])
def test_other_keys_are_other_orders(n: int) -> None:
    permutations = [KeyedPermutation(n, key) for key in range(100)]
    assert len({tuple(map(permutation, range(50))) for permutation in permutations}) == 100


@pytest.mark.parametrize("n", [2000, 5000])
def test_permutations_look_random(n: int) -> None:
    """Over many keys, the place of one value is uniform and neighbours land apart as often as chance has it."""
    bins, ascents, keys = Counter(), 0, 600
    for key in range(keys):
        permutation = KeyedPermutation(n, combine(key))
        bins[permutation(7) * 10 // n] += 1
        ascents += permutation(8) > permutation(7)
    chi_square = sum((bins[b] - keys / 10) ** 2 / (keys / 10) for b in range(10))
    assert chi_square < 33.7  # 9 degrees of freedom, one in 10,000
    assert abs(ascents - keys / 2) < 4 * (keys / 4) ** 0.5


@settings(max_examples=100, deadline=None)
@given(mixture=mixtures(), n=st.integers(0, 700))
def test_counts_are_the_tally_of_locate(mixture: tuple[Fraction, int, list[Fraction]], n: int) -> None:
    tree = make_tree(*mixture)
    places = [tree.locate(i) for i in range(n)]
    counts = tree.counts(n)
    assert sum(counts) == n
    assert counts == tally(places, len(mixture[2]))
    seen: Counter[int] = Counter()
    for corpus, before in places:  # locate also says how many samples of that corpus came before
        assert before == seen[corpus]
        seen[corpus] += 1


@settings(max_examples=100, deadline=None)
@given(mixture=mixtures(), n=st.one_of(st.integers(0, 5000), st.integers(0, 10**15)))
def test_every_prefix_has_the_asked_shares(mixture: tuple[Fraction, int, list[Fraction]], n: int) -> None:
    almr, general, _ = mixture
    tree, wanted = make_tree(*mixture), shares(*mixture)
    for prefix in {*range(min(n, 100)), n // 7, n // 2, n}:
        counts = tree.counts(prefix)
        assert sum(counts) == prefix
        rounding = prefix * Fraction(len(counts), 1 << 64)  # shares are rounded to 64 bits, at every node
        assert abs(sum(counts[general:]) - prefix * almr) <= Fraction(1, 2) + rounding
        for count, share in zip(counts, wanted, strict=True):
            # In a Huffman tree two steps down at least halve the weight, so errors of 1/2 at each node add up to 2.
            assert abs(count - prefix * share) <= 2 + rounding


def test_hundreds_of_skewed_corpora() -> None:
    """Zipf's weights, as by-language crawls have them: the bound holds whatever the number of corpora."""
    weights = [Fraction(1, rank) for rank in range(1, 301)]
    mixture = (Fraction(27, 100), 100, weights)
    tree = make_tree(*mixture)
    wanted = shares(*mixture)
    for n in (*range(0, 2000, 37), *range(10**6, 10**6 + 2000, 97)):
        assert all(abs(count - n * share) <= 2.001 for count, share in zip(tree.counts(n), wanted, strict=True))


@pytest.mark.parametrize(("almr", "silent"), [(Fraction(0), [2, 3]), (Fraction(1), [0, 1])])
def test_a_group_without_share_gives_nothing(almr: Fraction, silent: list[int]) -> None:
    tree = make_tree(almr, 2, [Fraction(3), Fraction(1), Fraction(2), Fraction(2)])
    assert [corpus for corpus, count in enumerate(tree.counts(10**6)) if count == 0] == silent
    assert {tree.locate(n)[0] for n in range(500)}.isdisjoint(silent)


def test_huge_sample_numbers() -> None:
    tree = make_tree(Fraction(33, 100), 2, [Fraction(1), Fraction(2), Fraction(5)])
    n = 10**15
    corpus, before = tree.locate(n)
    counts = tree.counts(n)
    assert counts[2] == n * 33 // 100
    assert before == counts[corpus]
    counts[corpus] += 1
    assert tree.counts(n + 1) == counts


def make_order(seed: int = 7, block_size: int = 16, sizes: tuple[int, ...] = (50, 23, 31)) -> SampleOrder:
    tree = make_tree(Fraction(2, 5), 2, [Fraction(3), Fraction(1), Fraction(1)])
    return SampleOrder(tree, sizes, seed, block_size)


def test_each_epoch_visits_each_sample_once() -> None:
    order, sizes = make_order(), (50, 23, 31)
    n = 1600  # 100 whole blocks: corpus 0 gets 720 samples, corpus 1 240, corpus 2 640
    visits: dict[tuple[int, int], list[int]] = {}
    for corpus, epoch, sample in map(order.locate, range(n)):
        visits.setdefault((corpus, epoch), []).append(sample)
    for corpus, count in enumerate(order.tree.counts(n)):
        epochs, rest = divmod(count, sizes[corpus])
        assert epochs >= 2
        for epoch in range(epochs):
            assert sorted(visits.pop((corpus, epoch))) == list(range(sizes[corpus]))
        if rest:
            last = visits.pop((corpus, epochs))
            assert len(last) == len(set(last)) == rest
    assert visits == {}


def test_epochs_and_corpora_have_their_own_orders() -> None:
    order = make_order(block_size=1, sizes=(40, 40, 40))
    orders: dict[tuple[int, int], list[int]] = {}
    for corpus, epoch, sample in map(order.locate, range(1000)):
        orders.setdefault((corpus, epoch), []).append(sample)
    whole = [tuple(samples) for samples in orders.values() if len(samples) == 40]
    assert len(whole) > 10
    assert len(set(whole)) == len(whole)


@settings(max_examples=30, deadline=None)
@given(start=st.integers(0, 3000), seed=st.integers(0, 2**63))
def test_order_is_a_function_of_the_sample_number(start: int, seed: int) -> None:
    """Any subset of the run, asked in any order by another process, comes out the same."""
    numbers = [start + i for i in range(40)]
    straight = {n: make_order(seed).locate(n) for n in [*range(0, start, 97), *numbers]}
    random.Random(start).shuffle(numbers)
    order = make_order(seed)
    assert {n: order.locate(n) for n in numbers} == {n: straight[n] for n in numbers}


def test_another_seed_is_another_order_of_the_same_mixture() -> None:
    first, second = ([make_order(seed).locate(n) for n in range(320)] for seed in (1, 2))
    assert first != second
    assert Counter(corpus for corpus, *_ in first) == Counter(corpus for corpus, *_ in second)


@settings(max_examples=30, deadline=None)
@given(block_size=st.integers(1, 60), block=st.integers(0, 10**9), seed=st.integers(0, 2**63))
def test_blocks_are_only_shuffled_within(block_size: int, block: int, seed: int) -> None:
    """A global batch holds the same samples, whether it is shuffled or not."""
    start = block * block_size
    shuffled = make_order(seed, block_size)
    unshuffled = make_order(seed, block_size=1)
    numbers = range(start, start + block_size)
    assert Counter(map(shuffled.locate, numbers)) == Counter(map(unshuffled.locate, numbers))


def test_blocks_are_shuffled() -> None:
    """Without it, a data-parallel rank could get one corpus only: with ALMR 1/2, every other sample."""
    tree = make_tree(Fraction(1, 2), 1, [Fraction(1), Fraction(1)])
    order = SampleOrder(tree, [100_000, 100_000], seed=3, block_size=64)
    rank_0 = [order.locate(n)[0] for n in range(0, 6400, 2)]
    assert 1400 < sum(rank_0) < 1800
    blocks = [[order.locate(block * 64 + i)[0] for i in range(64)] for block in range(10)]
    assert all(sum(block) == 32 for block in blocks)
    assert all(a != b for a, b in pairwise(blocks))
