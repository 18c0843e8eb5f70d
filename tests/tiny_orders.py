"""Orders of data to test with: random mixtures, stages and corpora, and the shares asked of them."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from hypothesis import strategies as st

from megatron_cpt.mixture.order.order import CorpusTokens, SampleOrder
from megatron_cpt.mixture.order.splitters import Group, Stage, StagePlan, build_stages

WEIGHTS = st.one_of(
    st.fractions(Fraction(1, 10**6), 10**6), st.integers(1, 10**12).map(Fraction), st.sampled_from([Fraction(10**40)])
)
ALMRS = st.one_of(st.fractions(0, 1), st.sampled_from([Fraction(0), Fraction(1), Fraction(33, 100), Fraction(1, 10**30)]))
SIZES = st.one_of(st.integers(1, 40), st.integers(4090, 4100), st.integers(1, 10**7), st.integers(2**40 - 3, 2**40 + 3))
BLOCK_SIZES = st.one_of(st.integers(1, 5000), st.integers(4095, 4097))
SEEDS = st.integers(0, 2**64 - 1)


def group(corpora: range | list[int], weights: list[Fraction]) -> Group | None:
    """A group of these corpora; `weights` are those of all corpora."""
    return Group(tuple(corpora), tuple(weights[corpus] for corpus in corpora)) if len(corpora) else None


def plan(almr: Fraction, general: int, weights: list[Fraction], samples: int | None = None) -> StagePlan:
    """A stage of constant ALMR; the first `general` corpora are the general group."""
    corpora = range(len(weights))
    return StagePlan(samples, (almr, almr), group(corpora[:general], weights), group(corpora[general:], weights))


def stage(almr: Fraction, general: int, weights: list[Fraction]) -> Stage:
    """A run of one endless stage."""
    (only,) = build_stages([plan(almr, general, weights)], len(weights))
    return only


@st.composite
def mixtures(draw: st.DrawFn, most: int = 60) -> tuple[Fraction, int, list[Fraction]]:
    """(ALMR, number of general corpora, weights of all corpora), with text wherever there is a share."""
    weights = draw(st.lists(WEIGHTS, min_size=1, max_size=most))
    general = draw(st.integers(0, len(weights)))
    almr = draw(ALMRS) if 0 < general < len(weights) else Fraction(general == 0)
    return almr, general, weights


@st.composite
def stage_plans(draw: st.DrawFn, corpora: int, longest: int = 3000) -> list[StagePlan]:
    """Up to six stages with constant and changing ALMR, other weights, other corpora, and groups that come back."""
    general = draw(st.integers(0, corpora))
    plans: list[StagePlan] = []
    for _ in range(draw(st.integers(1, 6))):
        if plans and draw(st.booleans()):
            groups = plans[-1].general, plans[-1].additional
        else:
            weights = draw(st.lists(WEIGHTS, min_size=corpora, max_size=corpora))
            used = [
                draw(st.lists(st.sampled_from(part), min_size=1, unique=True)) if part else []
                for part in (range(general), range(general, corpora))
            ]
            groups = group(used[0], weights), group(used[1], weights)
        first, last = draw(ALMRS), draw(ALMRS)
        if draw(st.booleans()):
            last = first
        if None in groups:
            first = last = Fraction(groups[0] is None)
        plans.append(StagePlan(draw(st.integers(1, longest)), (first, last), *groups))
    if draw(st.booleans()) and plans[-1].almr[0] == plans[-1].almr[1]:
        plans[-1] = StagePlan(None, plans[-1].almr, plans[-1].general, plans[-1].additional)
    return plans


def asked_additional(plans: list[StagePlan], n: int) -> Fraction:
    """Additional samples among the first n, as asked of the stages."""
    asked = Fraction(0)
    for one in plans:
        part = n if one.samples is None else min(n, one.samples)
        asked += one.asked(part)
        n -= part
    return asked


@dataclass(frozen=True)
class Case:
    """What makes a SampleOrder; `sizes`: samples in an epoch of each corpus."""

    plans: list[StagePlan]
    sizes: list[int]
    seed: int
    block_size: int
    seq_length: int = 8
    block_origin: int = 0

    def corpora(self) -> list[CorpusTokens]:
        # from the least to the most tokens that make so many samples
        return [
            CorpusTokens(f"corpus {i}", size * self.seq_length + 1 + i % self.seq_length)
            for i, size in enumerate(self.sizes)
        ]

    def order(self) -> SampleOrder:
        stages = build_stages(self.plans, len(self.sizes))
        return SampleOrder(stages, self.corpora(), self.seq_length, self.seed, self.block_size, self.block_origin)


@st.composite
def cases(draw: st.DrawFn, most: int = 30) -> Case:
    """Any order."""
    sizes = draw(st.lists(SIZES, min_size=1, max_size=most))
    plans = draw(stage_plans(len(sizes)))
    origin = draw(st.one_of(st.just(0), st.integers(0, 5000)))
    seq_length = draw(st.one_of(st.just(2048), st.integers(1, 64)))
    return Case(plans, sizes, draw(SEEDS), draw(BLOCK_SIZES), seq_length, origin)
