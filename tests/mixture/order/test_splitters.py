"""Shares that are exact for every prefix, whatever the weights and however stages change them."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_orders import asked_additional, group, mixtures, plan, stage, stage_plans

from megatron_cpt.mixture.order.splitters import MAX_RAMP, Group, Stage, StagePlan, build_stages

FIBONACCI = Fraction(168, 100)
"""Half the sum of the reciprocal Fibonacci numbers (3.3599): what a Huffman tree can do to a count at most. Each node rounds
by 1/2, the error shrinks with the leaf's share of each node above it, and by Huffman's rule those weigh at least 1, 2, 3, 5,
8, ... times the leaf."""


def shares(almr: Fraction, general: int, weights: list[Fraction]) -> list[Fraction]:
    """The share of each corpus in the run, by definition."""
    groups = [weights[:general], weights[general:]]
    return [group_share * w / sum(g) for group_share, g in zip((1 - almr, almr), groups, strict=True) for w in g]


def stage_of(stages: list[Stage], n: int) -> Stage:
    return [one for one in stages if one.start <= n][-1]


@settings(max_examples=100, deadline=None)
@given(mixture=mixtures(), n=st.integers(0, 700))
def test_counts_are_the_tally_of_find(mixture: tuple[Fraction, int, list[Fraction]], n: int) -> None:
    tree = stage(*mixture)
    seen: Counter[int] = Counter()
    for corpus, before in map(tree.find, range(n)):  # find also says how many samples of that corpus came before
        assert before == seen[corpus]
        seen[corpus] += 1
    assert tree.counts(n) == [seen[corpus] for corpus in range(len(mixture[2]))]


@settings(max_examples=80, deadline=None)
@given(mixture=mixtures(), n=st.one_of(st.integers(0, 5000), st.integers(0, 10**15)))
def test_every_prefix_has_the_asked_shares(mixture: tuple[Fraction, int, list[Fraction]], n: int) -> None:
    almr, general, _ = mixture
    tree, wanted = stage(*mixture), shares(*mixture)
    for prefix in {*range(min(n, 100)), n // 7, n // 2, n}:
        counts = tree.counts(prefix)
        assert sum(counts) == prefix
        rounding = prefix * Fraction(len(counts), 1 << 64)  # shares are rounded to 64 bits, at every node
        assert abs(sum(counts[general:]) - prefix * almr) <= Fraction(1, 2) + rounding
        assert all(abs(c - prefix * share) <= FIBONACCI + rounding for c, share in zip(counts, wanted, strict=True))


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 10**6), almr=st.fractions(Fraction(1, 100), Fraction(99, 100)), n=st.integers(0, 10**12))
def test_a_thousand_corpora(seed: int, almr: Fraction, n: int) -> None:
    """Weights over many orders of magnitude, as by-language crawls have them."""
    weights = [Fraction(1 + (seed + 7919 * i) % 1000, 1 + i * i % (1 + seed % 997)) for i in range(1000)]
    tree, wanted = stage(almr, 400, weights), shares(almr, 400, weights)
    for prefix in (n, n // 3, seed % 3000):
        rounding = prefix * Fraction(1000, 1 << 64)
        counts = tree.counts(prefix)
        assert all(abs(c - prefix * share) <= FIBONACCI + rounding for c, share in zip(counts, wanted, strict=True))


def test_weights_like_fibonacci_numbers_come_near_the_bound() -> None:
    """The bound is not idle: such weights make the deepest tree, and deviations well above those of a single node."""
    weights = [Fraction(1), Fraction(1)]
    while len(weights) < 20:
        weights.append(weights[-1] + weights[-2])
    tree, total = stage(Fraction(1), 0, weights), sum(weights)
    worst = max(
        abs(count - n * weight / total)
        for n in range(0, 20_000, 3)
        for count, weight in zip(tree.counts(n), weights, strict=True)
    )
    assert Fraction(9, 10) < worst <= FIBONACCI


@settings(max_examples=60, deadline=None)
@given(targets=st.lists(st.integers(1, 10**6), min_size=1, max_size=200), general=st.integers(0, 200))
def test_integer_targets_are_met_exactly(targets: list[int], general: int) -> None:
    """Weights that are counts: after as many samples as they sum to, each corpus has given its count."""
    general = min(general, len(targets))
    total = sum(targets)
    tree = stage(Fraction(sum(targets[general:]), total), general, [Fraction(target) for target in targets])
    assert tree.counts(total) == targets


@pytest.mark.parametrize(("almr", "silent"), [(Fraction(0), [2, 3]), (Fraction(1), [0, 1])])
def test_a_group_without_share_gives_nothing(almr: Fraction, silent: list[int]) -> None:
    tree = stage(almr, 2, [Fraction(3), Fraction(1), Fraction(2), Fraction(2)])
    assert [corpus for corpus, count in enumerate(tree.counts(10**6)) if count == 0] == silent
    assert {tree.find(n)[0] for n in range(500)}.isdisjoint(silent)


def test_sub_groups_share_what_they_get() -> None:
    """Half of the general text is code, of which nine tenths come from one corpus; each level may round by 1/2 more."""
    code = Group((1, 2), (Fraction(9), Fraction(1)))
    general = Group((0, code), (Fraction(1), Fraction(1)))
    (tree,) = build_stages([StagePlan(None, (Fraction(1, 4),) * 2, general, Group((3,), (Fraction(1),)))], 4)
    wanted = [Fraction(3, 8), Fraction(27, 80), Fraction(3, 80), Fraction(1, 4)]
    for n in range(3000):
        counts = tree.counts(n)
        assert abs(counts[1] + counts[2] - n * Fraction(3, 8)) <= 1
        assert all(abs(c - n * share) <= FIBONACCI + Fraction(1, 2) for c, share in zip(counts, wanted, strict=True))


def test_huge_sample_numbers() -> None:
    tree = stage(Fraction(33, 100), 2, [Fraction(1), Fraction(2), Fraction(5)])
    n = 10**15
    corpus, before = tree.find(n)
    counts = tree.counts(n)
    assert counts[2] == n * 33 // 100
    assert before == counts[corpus]
    counts[corpus] += 1
    assert tree.counts(n + 1) == counts


# --- stages ---

THREE = [
    plan(Fraction(almr), 2, [Fraction(3), Fraction(1), Fraction(2)], samples)
    for almr, samples in (("0.2", 1003), ("0.33", 2001), ("0.5", None))
]


def test_three_stages_are_accounted_for_to_the_sample() -> None:
    stages = build_stages(THREE, 3)
    assert [one.start for one in stages] == [0, 1003, 3004]
    # 1003 x 0.2 = 200.6; 2001 x 0.33 = 660.33, together 860.93; 6996 x 0.5 = 3498, together 4358.93
    additional = [stage_of(stages, n).counts(n)[2] for n in (1003, 3004, 10_000)]
    assert additional == [201, 861, 4359]
    general = stages[-1].counts(10_000)
    assert general[0] + general[1] == 10_000 - 4359
    assert abs(general[0] - Fraction(3, 4) * (10_000 - Fraction("4358.93"))) <= FIBONACCI


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_stages(data: st.DataObject) -> None:
    """ALMR within half a sample of what was asked at every prefix, and no sample of any corpus twice or left out."""
    corpora = data.draw(st.integers(1, 8))
    plans = data.draw(stage_plans(corpora, longest=400))
    stages = build_stages(plans, corpora)
    general = set().union(*(one.general.corpora() for one in plans if one.general))
    end = sum(one.samples or 500 for one in plans)
    seen, additional = [0] * corpora, 0
    for n in range(end):
        one = stage_of(stages, n)
        assert one.counts(n) == seen
        corpus, before = one.find(n)
        assert before == seen[corpus]
        seen[corpus] += 1
        additional += corpus not in general
        assert abs(additional - asked_additional(plans, n + 1)) <= Fraction(1, 2) + Fraction(1, 1000)


def test_rounding_does_not_add_up_over_many_stages() -> None:
    """A thousand stages that each ask for 0.4 samples more than they can give."""
    weights = [Fraction(1), Fraction(1)]
    plans = [plan(Fraction(2, 10) + Fraction(i % 2, 1000), 1, weights, 7) for i in range(1000)]
    stages = build_stages(plans, 2)
    for i, one in enumerate(stages):
        assert abs(one.counts(one.start)[1] - asked_additional(plans, 7 * i)) <= Fraction(1, 2)


@pytest.mark.parametrize(("first", "last"), [("0.2", "0.5"), ("0.5", "0.2"), ("0", "1"), ("1", "0"), ("0", "1e-9")])
@pytest.mark.parametrize("length", [1, 2, 1000, 10**9, MAX_RAMP])
def test_ramps(first: str, last: str, length: int) -> None:
    weights = [Fraction(1), Fraction(1)]
    asked = StagePlan(length, (Fraction(first), Fraction(last)), group([0], weights), group([1], weights))
    one, _ = build_stages([asked], 2)  # and what comes after it
    for n in {*range(min(length, 300)), *(length * i // 97 for i in range(98)), length}:
        assert abs(one.counts(n)[1] - asked.asked(n)) <= Fraction(1, 2) + Fraction(1, 1000)
        if n < length:
            corpus, before = one.find(n)
            counts = one.counts(n)
            assert before == counts[corpus]
            counts[corpus] += 1
            assert one.counts(n + 1) == counts


def test_a_group_that_does_not_change_goes_on_where_it_was() -> None:
    """Steps of ALMR alone do not disturb the shares within a group: they stay within the bound over any number of stages."""
    weights = [Fraction(5), Fraction(3), Fraction(1), Fraction(1)]
    plans = [plan(Fraction(i % 7, 10), 3, weights, 11 + i % 5) for i in range(300)]
    stages = build_stages(plans, 4)
    for one in stages:
        counts = one.counts(one.start)
        general = sum(counts[:3])
        for count, weight in zip(counts[:3], weights[:3], strict=True):
            assert abs(count - general * weight / 9) <= FIBONACCI


@example(steps=[3, 1, 2])
@given(steps=st.lists(st.integers(1, 5), min_size=1, max_size=5))
def test_an_equal_stage_after_another_changes_nothing(steps: list[int]) -> None:
    """Cutting a stage in pieces leaves its samples where they were."""
    weights = [Fraction(5), Fraction(3), Fraction(1)]
    pieces = [plan(Fraction(3, 10), 2, weights, samples) for samples in steps]
    whole, cut = stage(Fraction(3, 10), 2, weights), build_stages(pieces, 3)
    for n in range(sum(steps)):
        assert stage_of(cut, n).find(n) == whole.find(n)
