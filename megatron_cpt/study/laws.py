"""Mixture laws from the literature, fitted to the losses of a study's runs: D-CPT and CMR.

D-CPT (Que et al., "D-CPT Law: Domain-specific Continual Pre-Training Scaling Law for Large Language Models", 2024), for one
size of model, so that E holds their E + A / N^alpha:

    L(D, r) = E + B r^eta / D^beta + C / (r + epsilon)^gamma

D tokens of the run, r the share of the domain in its mixture. CMR (Gu et al., "CMR Scaling Law: Predicting Critical Mixture
Ratios for Continual Pre-training of Language Models", 2024): the critical mixture ratio is the largest additional share at
which the general loss stays within a tolerance of its start; along the tokens T of a run it follows R = b0 + b1 T^s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize

from megatron_cpt.study.surfaces import Array
from megatron_cpt.utils.errors import InputError

HUBER_DELTA = 1e-3  # on the logarithm of the loss, as in the D-CPT paper
STARTS = 16
STARTS_LEFT_OUT = 6
LEAST_ALONG_TOKENS = 0.5  # share of the losses' variance about the mean of each ratio that the law explains
LEAST_BUDGETS = 4  # with a critical mixture ratio, for the CMR law
TOKENS_UNIT = 1e6  # D is counted in these, so that B is a usual number


@dataclass(frozen=True)
class DCptLaw:
    """A fitted law; `tokens` in units of a million tokens where it enters B."""

    E: float
    B: float
    eta: float
    beta: float
    C: float
    epsilon: float
    gamma: float

    def loss(self, tokens: Array, ratio: Array) -> Array:
        """Nats per token."""
        return predict(np.array([self.E, self.B, self.eta, self.beta, self.C, self.epsilon, self.gamma]), tokens, ratio)


def predict(parameters: Array, tokens: Array, ratio: Array) -> Array:
    """D-CPT's loss."""
    return slopes(parameters, tokens, ratio)[0]


def slopes(parameters: Array, tokens: Array, ratio: Array) -> tuple[Array, Array]:
    """D-CPT's loss, [n], and its derivatives by the logarithm of each parameter, [7, n]."""
    E, B, eta, beta, C, epsilon, gamma = parameters
    amount = np.maximum(np.asarray(tokens, dtype=np.float64) / TOKENS_UNIT, 1e-12)
    share = np.maximum(np.asarray(ratio, dtype=np.float64), 1e-12)
    gain, shift = B * share**eta / amount**beta, C / (share + epsilon) ** gamma
    derivatives = (
        np.full_like(gain, E),
        gain,
        eta * gain * np.log(share),
        -beta * gain * np.log(amount),
        shift,
        -gamma * epsilon * shift / (share + epsilon),
        -gamma * shift * np.log(share + epsilon),
    )
    return E + gain + shift, np.stack(derivatives)


def fit_d_cpt(tokens: Array, ratio: Array, losses: Array, seed: int = 0, starts: int = STARTS) -> DCptLaw:
    """Huber loss on the logarithm, L-BFGS from many starts, all parameters above zero.

    Args:
        tokens: [n] of the run so far
        ratio: [n] of the domain that the losses are of: the ALMR for the additional language, 1 - ALMR for the general
        losses: [n] nats per token

    Raises:
        InputError: fewer points than parameters, fewer than four ratios (one is left out to see what the law predicts),
            fewer than three numbers of tokens, or a loss that is not above zero
    """
    for name, values, wanted in (("points", losses, 8), ("ratios", np.unique(ratio), 4), ("budgets", np.unique(tokens), 3)):
        if len(values) < wanted:
            raise InputError(f"the D-CPT law has 7 parameters: {len(values)} {name} are too few, {wanted} are needed")

    if losses.min() <= 0:
        raise InputError(f"a loss is {losses.min():g}; the law is fitted to logarithms of losses, above 0")
    return minimized(tokens, ratio, losses, seed, starts)


def minimized(tokens: Array, ratio: Array, losses: Array, seed: int, starts: int) -> DCptLaw:
    """The law of the least Huber loss."""

    def distance(logarithms: Array) -> tuple[float, Array]:
        expected, derivatives = slopes(np.exp(logarithms), tokens, ratio)
        value, slope = huber(np.log(expected) - np.log(losses))
        return value, derivatives @ (slope / expected)

    least = float(losses.min())
    random = np.random.default_rng(seed)
    low = np.log([least * 0.3, 1e-3, 0.05, 0.05, 1e-3, 0.01, 0.05])
    high = np.log([least * 0.999, 5.0, 2.0, 1.5, 5.0, 1.0, 3.0])
    bounds = [(np.log(least * 1e-2), np.log(least)), (-12, 6), (-5, 2), (-5, 1.5), (-12, 6), (-7, 1), (-5, 2)]
    best = best_of_starts(distance, random.uniform(low, high, (starts, 7)), bounds)
    return DCptLaw(*np.exp(best).tolist())


def check_follows_tokens(law: DCptLaw, tokens: Array, ratio: Array, losses: Array) -> None:
    """Raise InputError where the law follows the losses along the tokens hardly better than a mean of each ratio does.

    D-CPT's loss can only fall with the tokens, and the loss of a language that is being forgotten rises.
    """
    means = np.array([losses[ratio == own].mean() for own in ratio])
    explained = 1 - ((losses - law.loss(tokens, ratio)) ** 2).sum() / max(((losses - means) ** 2).sum(), 1e-300)
    if explained < LEAST_ALONG_TOKENS:
        raise InputError(
            f"it explains {max(explained, 0.0):.0%} of how the losses change along the tokens, {LEAST_ALONG_TOKENS:.0%} is "
            "wanted: it can only fall with them"
        )


def huber(errors: Array) -> tuple[float, Array]:
    """Mean Huber loss, quadratic up to `HUBER_DELTA`, and its derivatives; scaled, so that its size does not stop the
    optimizer early.
    """
    size = np.abs(errors)
    each = np.where(size <= HUBER_DELTA, 0.5 * size**2, HUBER_DELTA * (size - 0.5 * HUBER_DELTA))
    return 1e6 * float(each.mean()), 1e6 / len(errors) * np.clip(errors, -HUBER_DELTA, HUBER_DELTA)


def best_of_starts(
    distance: Callable[[Array], tuple[float, Array]], starts: Array, bounds: Sequence[tuple[float, float]]
) -> Array:
    """The parameters of the smallest distance that L-BFGS finds from any start."""
    best, least = starts[0], np.inf
    for start in starts:
        found = minimize(
            distance, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 3000, "maxfun": 6000}
        )
        if found.fun < least:
            best, least = found.x, found.fun
    return np.asarray(best)


@dataclass(frozen=True)
class HeldOut:
    """How well the law of some ratios predicts the losses of another.

    Attributes:
        error: mean absolute difference, relative to the loss
        nats: mean absolute difference, nats per token
        explained: share of the squared differences from the mean of the other ratios, at the same tokens, that it explains.
            An error that is small beside the loss may be as large as all that the ratios differ by: then it explains nothing
    """

    error: float
    nats: float
    explained: float


def held_out(tokens: Array, ratio: Array, losses: Array, seed: int = 0) -> HeldOut:
    """The D-CPT law on each ratio inside the range, by the law of all others.

    The lowest and the highest ratio are not left out: no law of this form is meant to guess beyond them.
    """
    errors, differences, left = [], [], []
    for left_out in np.unique(ratio)[1:-1]:
        seen = ratio != left_out
        law = minimized(tokens[seen], ratio[seen], losses[seen], seed, STARTS_LEFT_OUT)
        errors.append(law.loss(tokens[~seen], ratio[~seen]) - losses[~seen])
        others = [losses[seen & (tokens == t)] for t in tokens[~seen]]
        means = np.array([values.mean() if len(values) else losses[seen].mean() for values in others])
        differences.append(means - losses[~seen])
        left.append(losses[~seen])
    error, difference, loss = (np.concatenate(parts) for parts in (errors, differences, left))
    explained = 1 - float((error**2).sum() / max((difference**2).sum(), 1e-300))
    return HeldOut(float(np.abs(error / loss).mean()), float(np.abs(error).mean()), explained)


@dataclass(frozen=True)
class CmrLaw:
    """R = b0 + b1 T^s, T in units of a million tokens.

    Attributes:
        tokens, ratios: the critical mixture ratios that it was fitted to
        error: mean absolute difference of the last quarter of them (at least one) from the law of those before
    """

    b0: float
    b1: float
    s: float
    tokens: Array
    ratios: Array
    error: float

    def ratio(self, tokens: float) -> float:
        """Of a budget; between 0 and 1."""
        return power_law(self.b0, self.b1, self.s, tokens)


def power_law(b0: float, b1: float, s: float, tokens: float) -> float:
    """R, between 0 and 1."""
    return float(np.clip(b0 + b1 * (tokens / TOKENS_UNIT) ** s, 0.0, 1.0))


def critical_ratio(ratio: Array, losses: Array, highest: float) -> float | None:
    """The largest additional share whose general loss is at most `highest`, between the runs by straight lines.

    None: the loss of no share is, or that of every share is, so that it is not within the studied range.
    """
    order = np.argsort(ratio)
    x, y = ratio[order], losses[order]
    within = y <= highest
    if within.all() or not within.any():
        return None
    last = int(np.flatnonzero(within)[-1])
    if last == len(x) - 1:
        return None  # the highest share is within, a lower one is not: noise
    slope = (highest - y[last]) / (y[last + 1] - y[last])
    return float(x[last] + slope * (x[last + 1] - x[last]))


def fit_cmr(tokens: Array, ratio: Array, losses: Array, start: float, tolerance: float, seed: int = 0) -> CmrLaw:
    """Critical mixture ratios at every budget that all ratios were evaluated at, and their power law.

    Args:
        tokens, ratio, losses: [n] of the general language, along the runs
        start: its loss before the first step
        tolerance: by which it may rise, relative

    Raises:
        InputError: fewer than four budgets have a critical ratio within the studied range
    """
    budgets = np.array([t for t in np.unique(tokens) if t > 0 and set(ratio[tokens == t]) == set(ratio)])
    shares = np.unique(ratio)
    means = np.array([[losses[(tokens == t) & (ratio == share)].mean() for t in budgets] for share in shares])
    x, y = critical_ratios(budgets, shares, means, start * (1 + tolerance))
    if len(x) < LEAST_BUDGETS:
        raise InputError(
            f"{len(x)} of {len(budgets)} budgets have a critical mixture ratio within the studied range at a tolerance "
            f"of {tolerance:.1%}; {LEAST_BUDGETS} are needed: change the tolerance or the range"
        )
    random = np.random.default_rng(seed)
    starts = random.uniform([-1.0, -1.0, -1.5], [2.0, 1.0, 1.5], (STARTS, 3))
    parameters = fit_power(x, y, starts)
    before = max(3, len(x) - max(1, len(x) // 4))
    b0, b1, s = fit_power(x[:before], y[:before], starts)
    error = np.abs(b0 + b1 * (x[before:] / TOKENS_UNIT) ** s - y[before:]).mean()
    return CmrLaw(*parameters, x, y, float(error))


def critical_ratios(budgets: Array, shares: Array, means: Array, highest: float) -> tuple[Array, Array]:
    """The budgets that have a critical ratio, and these ratios.

    Args:
        budgets: [b] numbers of tokens
        shares: [s] of the additional language
        means: [s, b] general loss, over the seeds
        highest: that it may be
    """
    found = [critical_ratio(shares, column, highest) for column in means.T]
    having = np.array([critical is not None for critical in found], dtype=bool)
    return budgets[having], np.array([critical for critical in found if critical is not None], dtype=np.float64)


def fit_power(tokens: Array, ratios: Array, starts: Array) -> tuple[float, float, float]:
    """b0, b1, s by Huber loss and L-BFGS from `starts`, [n, 3]."""
    amount = tokens / TOKENS_UNIT

    def distance(parameters: Array) -> tuple[float, Array]:
        b0, b1, s = parameters
        power = amount**s
        value, slope = huber(b0 + b1 * power - ratios)
        return value, np.array([slope.sum(), slope @ power, slope @ (b1 * power * np.log(amount))])

    b0, b1, s = best_of_starts(distance, starts, [(-5, 5), (-5, 5), (-3, 3)])
    return float(b0), float(b1), float(s)
