"""A mixture's stages: budgets in tokens or fractions of a run, and what they are in samples of one run."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from megatron_cpt.mixture.config import StageConfig
from megatron_cpt.mixture.order.megatron import MegatronOrder
from megatron_cpt.mixture.order.splitters import (
    MAX_RAMP,
    Group,
    Position,
    Stage,
    StagePlan,
    beginning,
    build_stages,
    position_at,
    rest_of,
)
from megatron_cpt.utils.errors import InputError


@dataclass(frozen=True)
class Schedule:
    """A mixture's stages in samples of a run. One stage of the file may be several plans (ALMR in steps).

    With `megatron`, samples are counted as Megatron-LM's order gives them. With `begin` the run has read other mixtures
    before that sample, and what it owes is carried over. `moved`: by corpus, samples it has given more (or fewer) than the
    plans say, of runs that changed their mixture before debts were carried over.
    """

    plans: tuple[StagePlan, ...]
    num_corpora: int
    starts: tuple[int, ...]
    """For each stage of the file, its first sample."""
    megatron: MegatronOrder | None = None
    begin: Position | None = None
    moved: tuple[int, ...] = ()

    @functools.cached_property
    def stages(self) -> list[Stage]:
        """What computes the order, from `begin` on."""
        if self.begin is not None:
            return build_stages(rest_of(self.plans, self.begin.start), self.num_corpora, self.begin)
        stages = build_stages(self.plans, self.num_corpora)
        return [stage.moved(self.moved) for stage in stages] if self.moved else stages

    def position(self, n: int) -> Position:
        """Where the counting is at sample n, not before `begin`."""
        begin = self.begin or beginning(self.num_corpora)
        return position_at(rest_of(self.plans, begin.start), begin, n)

    def counts(self, n: int) -> list[int]:
        """Samples that each corpus gives among the first n of the run, n not before `begin`."""
        if self.megatron is not None:
            return self.megatron.counts(n)
        return [stage for stage in self.stages if stage.start <= n][-1].counts(n)

    def asked(self, n: int) -> Fraction:
        """Additional samples among the first n, as asked: not a whole number."""
        total = Fraction(0)
        for plan in self.plans:
            part = n if plan.samples is None else min(n, plan.samples)
            total += plan.asked(part)
            n -= part
        return total + self.plans[-1].almr[1] * n

    def describe(self) -> list[dict[str, Any]]:
        """Lengths and ALMR in plain values: with the fingerprint, all that decides the order."""
        if self.megatron is not None:
            return describe_megatron(self.megatron.num_samples)
        return [{"samples": plan.samples, "almr": [str(almr) for almr in plan.almr]} for plan in self.plans]


def describe_megatron(run_samples: int) -> list[dict[str, Any]]:
    """As `Schedule.describe`, of Megatron-LM's order, which depends on the length of the run."""
    return [{"order": "megatron", "run_samples": run_samples}]


def corpus_shares(plan: StagePlan) -> dict[int, Fraction]:
    """The share of each corpus (by position) in a stage of constant ALMR; those without one are left out."""
    found: dict[int, Fraction] = {}

    def add(group: Group, share: Fraction) -> None:
        for member, weight in zip(group.members, group.weights, strict=True):
            part = share * weight / sum(group.weights)
            if isinstance(member, Group):
                add(member, part)
            else:
                found[member] = part

    for group, share in ((plan.general, 1 - plan.almr[0]), (plan.additional, plan.almr[0])):
        if group is not None and share:
            add(group, share)
    return found


def whole(samples: Fraction) -> int:
    """The nearest whole number, halves upwards: a stage of exactly k samples has k wherever it begins."""
    return math.floor(samples + Fraction(1, 2))


def plan_run(
    path: str,
    stages: Sequence[StageConfig],
    groups: Sequence[tuple[Group | None, Group | None]],
    num_corpora: int,
    seq_length: int,
    run_samples: int,
) -> Schedule:
    """The stages of the mixture at `path` in a run of so many samples.

    Args:
        groups: the general and the additional group of each stage

    Raises:
        InputError: they do not fill it, a part of one is shorter than a sample, or a ramp is too long
    """
    run_tokens = run_samples * seq_length
    plans: list[StagePlan] = []
    begin: Fraction | None = Fraction(0)
    starts: list[int] = []
    for stage, (general, additional), end in zip(stages, groups, _stage_ends(stages, run_tokens), strict=True):
        assert begin is not None, "only the last stage has no budget"
        starts.append(whole(begin / seq_length))
        borders = [begin + part.begin_tokens for part in stage.almr_parts]
        for part, first, last in zip(stage.almr_parts, borders, [*borders[1:], end], strict=True):
            is_ramp = part.first != part.last
            if last is None and is_ramp and first < run_tokens:
                last = Fraction(run_tokens)  # a ramp over what is left of the run
            samples = None if last is None else whole(last / seq_length) - whole(first / seq_length)
            if samples is not None and samples <= 0:
                raise InputError(
                    f"{path}: stage {stage.name}: in a run of {run_samples:,} samples a part of it is shorter than one "
                    f"sample of {seq_length} tokens; give it more, or leave it out"
                )
            if is_ramp and samples is not None and samples > MAX_RAMP:
                raise InputError(f"{path}: stage {stage.name}: almr changes over {samples} samples; expected at most 2**46")
            almr = (part.first, part.last if samples is not None else part.first)
            plans.append(StagePlan(samples, almr, general, additional))
        begin = end
    total = sum(plan.samples or 0 for plan in plans)
    if plans[-1].samples is not None and run_samples > total:
        raise InputError(
            f"{path}: the stages have {total:,} samples ({total * seq_length:,} tokens) but the run takes {run_samples:,}; "
            f"give them more tokens, or leave out the last stage's budget, or train less"
        )
    return Schedule(tuple(plans), num_corpora, tuple(starts))


def _stage_ends(stages: Sequence[StageConfig], run_tokens: int) -> list[Fraction | None]:
    """Where each stage ends, in tokens from the beginning of the run; None: never."""
    ends: list[Fraction | None] = []
    end = Fraction(0)
    for stage in stages:
        if stage.tokens is None and stage.fraction is None:
            ends.append(None)
            continue
        end += stage.tokens if stage.tokens is not None else (stage.fraction or 0) * run_tokens
        ends.append(end)
    return ends
