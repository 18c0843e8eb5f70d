"""The critical mixture ratio of a token budget: what the CMR law says of it, and how sure that is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_cpt.study.laws import LEAST_BUDGETS, CmrLaw, critical_ratios, fit_power, power_law
from megatron_cpt.study.results import Results
from megatron_cpt.study.surfaces import INTERVAL, Array

REPLICATES = 200
LEAST_REPLICATES = 0.8  # that must have a law
LEAST_DEGREES = 5  # runs beyond the first of each ALMR: fewer say too little of noise


@dataclass(frozen=True)
class CriticalRatio:
    """Of one learning rate.

    Attributes:
        tolerance: of the general loss
        tokens: the budget
        measured: the least and the most tokens that the law was fitted to
        ratio: the largest ALMR within the tolerance, by the law, from 0 to 1
        interval: 5 % to 95 % of the bootstrap; None: `notes` says why
        notes: what should be known of it
    """

    lr: float
    tolerance: float
    tokens: int
    measured: tuple[float, float]
    ratio: float
    interval: tuple[float, float] | None
    notes: list[str]


def predict_critical_ratios(
    results: Results, laws: Mapping[float, CmrLaw], tolerance: float, tokens: int, replicates: int = REPLICATES
) -> list[CriticalRatio]:
    """Of a budget, at each learning rate that has a law.

    Its interval is that of a parametric bootstrap: in each repetition the mean losses of each ALMR's n runs along the tokens
    are drawn anew, from a t distribution with n - 1 degrees of freedom and the covariance of the runs over n (what a run has
    too much hangs together along the tokens), and all is done again. What it does not hold: that the law may not go on as it
    does where nothing was measured.
    """
    return [predict_one(results, lr, law, tolerance, tokens, replicates) for lr, law in laws.items()]


def predict_one(results: Results, lr: float, law: CmrLaw, tolerance: float, tokens: int, replicates: int) -> CriticalRatio:
    """At one learning rate."""
    rows = [row for row in results.rows if row["lr"] == lr and row["outcome"] == "finished" and row["mixed"] is not None]
    runs = {row["run"]: row["almr"] for row in rows}
    least, most = float(law.tokens.min()), float(law.tokens.max())
    ratio, interval, notes = law.ratio(tokens), None, []
    if tokens > most:
        notes.append(f"extrapolated: {tokens / most:.3g} times the most tokens measured, {most:,.0f}")
    elif tokens < least:
        notes.append(
            f"extrapolated: {least / tokens:.3g} times below the fewest tokens that have a critical ratio, {least:,.0f}"
        )
    studied = min(runs.values()), max(runs.values())
    if not studied[0] <= ratio <= studied[1] or ratio in (0.0, 1.0):
        notes.append(f"on the border of the studied ALMRs, {studied[0]:g} to {studied[1]:g}, or beyond")
    if len(runs) - len(set(runs.values())) < LEAST_DEGREES:
        notes.append("no interval: too few seeds to say how far runs differ")
    else:
        start = next(row["general"] for row in rows if row["iteration"] == 0)
        highest = start * (1 + tolerance)
        found = [again for again in repetitions(rows, law, highest, tokens, replicates) if again is not None]
        if len(found) < LEAST_REPLICATES * replicates:
            notes.append(f"no interval: {replicates - len(found)} of {replicates} repetitions of the runs have no law")
        else:
            low, high = np.percentile([*found, ratio], INTERVAL)
            interval = float(min(low, ratio)), float(max(high, ratio))
    return CriticalRatio(lr, tolerance, tokens, (least, most), ratio, interval, notes)


def repetitions(
    rows: list[dict[str, Any]], law: CmrLaw, highest: float, tokens: int, replicates: int
) -> Iterator[float | None]:
    """The critical ratio of the budget when every run is measured again; None: there is no law then."""
    random = np.random.default_rng(0)
    budgets = np.unique([row["tokens"] for row in rows if row["iteration"]]).astype(np.float64)
    shares = np.unique([row["almr"] for row in rows]).astype(np.float64)
    trajectories = [along_tokens(rows, share, budgets) for share in shares]
    near = np.array([law.b0, law.b1, law.s])
    starts = near + np.array([[0.0, 0.0, 0.0], [0.0, 0.0, 0.3], [0.0, 0.0, -0.3]])
    for _ in range(replicates):
        means = np.array([mean_again(losses, random) for losses in trajectories])
        whole = ~np.isnan(means).any(axis=0)  # evaluated at every ALMR
        x, y = critical_ratios(budgets[whole], shares, means[:, whole], highest)
        yield None if len(x) < LEAST_BUDGETS else power_law(*fit_power(x, y, starts), tokens)


def along_tokens(rows: list[dict[str, Any]], share: float, budgets: Array) -> Array:
    """[runs, budgets] general loss of the runs of one ALMR; NaN: not evaluated there."""
    here = [row for row in rows if row["almr"] == share and row["iteration"]]
    runs = sorted({str(row["run"]) for row in here})
    losses = np.full((len(runs), len(budgets)), np.nan)
    for row in here:
        losses[runs.index(str(row["run"])), np.searchsorted(budgets, row["tokens"])] = row["general"]
    return losses


def mean_again(losses: Array, random: np.random.Generator) -> Array:
    """[budgets] the mean over the runs, as it may have come out too; that of one run is itself."""
    number = len(losses)
    mean: Array = losses.mean(axis=0)
    if number == 1:
        return mean
    drawn = random.standard_normal(number) @ (losses - mean) / np.sqrt(number * random.chisquare(number - 1))
    return np.asarray(mean + drawn)
