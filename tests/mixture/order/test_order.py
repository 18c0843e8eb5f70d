"""Sample numbers -> places: epochs are permutations, blocks are shuffled within, and nothing but the number decides."""

from __future__ import annotations

import random
from collections import Counter
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_orders import SEEDS, Case, cases, plan

from megatron_cpt.mixture.order.order import CorpusTokens, SampleLocation, SampleOrder
from megatron_cpt.mixture.order.splitters import build_stages

SIZES = (50, 23, 31)


def make_order(seed: int = 7, block_size: int = 16, sizes: tuple[int, ...] = SIZES, block_origin: int = 0) -> SampleOrder:
    weights = [Fraction(3), Fraction(1), Fraction(1)]
    plans = [plan(Fraction(1, 5), 2, weights, 333), plan(Fraction(2, 5), 2, weights)]
    return Case(plans, list(sizes), seed, block_size, block_origin=block_origin).order()


# As first released; computed by this code, not by another.
PINNED = [
    SampleLocation(1, 0, 2, 16),
    SampleLocation(0, 0, 1847, 14776),
    SampleLocation(0, 0, 3202, 25616),
    SampleLocation(0, 0, 2827, 22616),
]
PINNED_LATER = SampleLocation(0, 0, 1043, 8344)


def test_order_is_pinned() -> None:
    """Checkpoints hold only `consumed_samples`: a new release must not order the same mixture differently."""
    order = Case([plan(Fraction(1, 3), 1, [Fraction(1)] * 2)], [5000, 7], seed=1234, block_size=4).order()
    assert [order.lookup(n) for n in range(4)] == PINNED
    assert order.lookup(311) == PINNED_LATER


def test_each_epoch_visits_each_sample_once() -> None:
    order = make_order()
    n = 1600  # 100 whole blocks
    visits: dict[tuple[int, int], list[int]] = {}
    for corpus, epoch, sample, _ in map(order.lookup, range(n)):
        visits.setdefault((corpus, epoch), []).append(sample)
    for corpus, count in enumerate(order.counts(n)):
        epochs, rest = divmod(count, SIZES[corpus])
        assert epochs >= 2
        for epoch in range(epochs):
            assert sorted(visits.pop((corpus, epoch))) == list(range(SIZES[corpus]))
        if rest:
            last = visits.pop((corpus, epochs))
            assert len(last) == len(set(last)) == rest
    assert visits == {}


@settings(max_examples=40, deadline=None)
@given(case=cases(most=6), first=st.integers(0, 2000))
def test_no_place_comes_twice(case: Case, first: int) -> None:
    """Whatever the stages: over whole blocks each corpus gives its samples one after the other."""
    order = case.order()
    begin = case.block_origin + first // case.block_size * case.block_size
    count = -(-600 // case.block_size) * case.block_size
    places = order.lookup_many(begin, count)
    triples = set(zip(places.corpus.tolist(), places.epoch.tolist(), places.sample.tolist(), strict=True))
    assert len(triples) == count
    given_here = np.bincount(places.corpus, minlength=len(case.sizes)).tolist()
    assert given_here == [b - a for a, b in zip(order.counts(begin), order.counts(begin + count), strict=True)]


def test_epochs_and_corpora_have_their_own_orders() -> None:
    order = make_order(block_size=1, sizes=(40, 40, 40))
    orders: dict[tuple[int, int], list[int]] = {}
    for corpus, epoch, sample, _ in map(order.lookup, range(1000)):
        orders.setdefault((corpus, epoch), []).append(sample)
    whole = [tuple(samples) for samples in orders.values() if len(samples) == 40]
    assert len(whole) > 10
    assert len(set(whole)) == len(whole)


def test_each_epoch_cuts_the_text_at_other_places() -> None:
    """The first epoch from the first token on; the others from a phase below seq_length, so that packing differs."""
    order = make_order(block_size=1)
    phases: dict[tuple[int, int], set[int]] = {}
    for corpus, epoch, sample, begin in map(order.lookup, range(2000)):
        phases.setdefault((corpus, epoch), set()).add(begin - 8 * sample)
    assert all(len(found) == 1 for found in phases.values())
    assert all(found == {0} for (_, epoch), found in phases.items() if epoch == 0)
    later = [found.pop() for (_, epoch), found in phases.items() if epoch]
    assert len(later) > 40
    assert set(later) == set(range(8))


@settings(max_examples=60, deadline=None)
@given(case=cases(most=5), n=st.integers(0, 10**6))
def test_no_token_is_a_target_twice_in_an_epoch(case: Case, n: int) -> None:
    """Samples of an epoch follow one another without overlap, going around the end of the corpus at most once."""
    order = case.order()
    corpus = n % len(case.sizes)
    tokens, samples = case.corpora()[corpus].tokens, case.sizes[corpus]
    phase = order.token_phase(corpus, n)
    assert 0 <= phase < case.seq_length
    assert phase + (samples - 1) * case.seq_length < tokens  # where a sample begins is never beyond the end
    assert samples * case.seq_length <= tokens - 1


@settings(max_examples=30, deadline=None)
@given(start=st.integers(0, 3000), seed=SEEDS)
def test_order_is_a_function_of_the_sample_number(start: int, seed: int) -> None:
    """Any subset of the run, asked in any order by another process, comes out the same."""
    numbers = [start + i for i in range(40)]
    straight = {n: make_order(seed).lookup(n) for n in [*range(0, start, 97), *numbers]}
    random.Random(start).shuffle(numbers)
    order = make_order(seed)
    assert {n: order.lookup(n) for n in numbers} == {n: straight[n] for n in numbers}


def test_another_seed_is_another_order_of_the_same_mixture() -> None:
    first, second = ([make_order(seed).lookup(n) for n in range(320)] for seed in (1, 2))
    assert first != second
    assert Counter(place.corpus for place in first) == Counter(place.corpus for place in second)


def test_the_name_of_a_corpus_decides_its_order_not_its_place() -> None:
    """A corpus that is added to a mixture leaves the others' orders as they are."""
    weights = [Fraction(1)] * 3
    names = ["b", "c", "a"]
    corpora = {name: CorpusTokens(name, 4001) for name in names}
    two = SampleOrder(build_stages([plan(Fraction(0), 2, weights[:2])], 2), [corpora["b"], corpora["c"]], 8, 5, 1)
    three = SampleOrder(
        build_stages([plan(Fraction(0), 3, weights)], 3), [corpora[name] for name in ("a", "b", "c")], 8, 5, 1
    )
    orders = [
        [place[1:] for place in map(order.lookup, range(900)) if place.corpus == position][:250]
        for order, position in ((two, 0), (three, 1))
    ]
    assert orders[0] == orders[1]


@settings(max_examples=30, deadline=None)
@given(block_size=st.integers(1, 60), block=st.integers(0, 10**9), seed=SEEDS, origin=st.integers(0, 1000))
def test_blocks_are_only_shuffled_within(block_size: int, block: int, seed: int, origin: int) -> None:
    """A global batch holds the same samples, whether it is shuffled or not, also after another batch size."""
    start = origin + block * block_size
    shuffled = make_order(seed, block_size, block_origin=origin)
    unshuffled = make_order(seed, block_size=1)
    numbers = range(start, start + block_size)
    assert Counter(map(shuffled.lookup, numbers)) == Counter(map(unshuffled.lookup, numbers))


def test_blocks_are_shuffled() -> None:
    """Without it, a data-parallel rank could get one corpus only: with ALMR 1/2, every other sample."""
    order = Case([plan(Fraction(1, 2), 1, [Fraction(1)] * 2)], [100_000, 100_000], seed=3, block_size=64).order()
    rank_0 = [order.lookup(n).corpus for n in range(0, 6400, 2)]
    assert 1400 < sum(rank_0) < 1800
    blocks = [[order.lookup(block * 64 + i).corpus for i in range(64)] for block in range(10)]
    assert all(sum(block) == 32 for block in blocks)
    assert all(a != b for a, b in pairwise(blocks))


@pytest.mark.parametrize(("first", "count"), [(-1, 5), (5, -1), (2**62, 1), (2**62 + 1, 0)])
@pytest.mark.parametrize("native", [True, False])
def test_sample_numbers_are_checked(first: int, count: int, native: bool) -> None:
    order = make_order()
    if not native:
        order._native = None
    with pytest.raises(ValueError, match=str(first)):
        order.lookup_many(first, count)


def test_samples_before_the_first_block_cannot_be_asked_for() -> None:
    with pytest.raises(ValueError, match="use numbers from 100"):
        make_order(block_origin=100).lookup_many(99, 1)


@settings(max_examples=60, deadline=None)
@given(case=cases(most=4), data=st.data())
def test_all_samples_that_read_some_tokens_are_found(case: Case, data: st.DataObject) -> None:
    order, first = case.order(), case.block_origin
    stop = first + data.draw(st.integers(1, 150))
    one = order.lookup(data.draw(st.integers(first, stop - 1)))
    tokens = order.corpora[one.corpus].tokens
    begin = (one.begin + data.draw(st.integers(0, case.seq_length))) % tokens
    end = min(begin + data.draw(st.integers(1, 3 * case.seq_length)), tokens)

    def reads(place: SampleLocation) -> bool:
        spans = [(place.begin, place.begin + case.seq_length + 1)]
        spans.append((0, spans[0][1] - tokens))  # a sample goes on at the corpus's beginning
        return place.corpus == one.corpus and any(a < end and begin < min(b, tokens) for a, b in spans)

    wanted = [n for n in range(first, stop) if reads(order.lookup(n))]
    assert wanted
    assert order.find_tokens(one.corpus, begin, end, stop) == wanted
    for start in (1, stop // 2, stop - 1):
        assert order.find_tokens(one.corpus, begin, end, stop, start) == [n for n in wanted if n >= start]


def test_tokens_are_found_in_a_run_of_a_trillion_samples() -> None:
    order = Case([plan(Fraction(1, 3), 1, [Fraction(1)] * 2)], [2**40, 2**33], seed=3, block_size=1024).order()
    for n in (0, 12_345, 10**11, 10**12 - 1):
        place = order.lookup(n)
        token = place.begin + 3
        found = order.find_tokens(place.corpus, token, token + 1, 10**12)
        assert n in found
        others = [order.lookup(m) for m in found]
        assert all(other.corpus == place.corpus and 0 <= token - other.begin <= order.seq_length for other in others)
    assert order.find(0, 10**13, 10**12) is None
