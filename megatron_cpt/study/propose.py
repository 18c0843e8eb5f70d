"""The next points of a study, where they tell most: Optuna's Gaussian-process sampler."""

from __future__ import annotations

import warnings

import numpy as np
import optuna
from optuna.distributions import FloatDistribution
from optuna.samplers import GPSampler, QMCSampler
from optuna.trial import create_trial

from megatron_cpt.study.config import StudyConfig
from megatron_cpt.study.grid import GridPoint, grid_points
from megatron_cpt.study.results import MEAN_METRIC, Results
from megatron_cpt.study.surfaces import fit_surface
from megatron_cpt.utils.errors import InputError

MOST_DRAWS = 1000  # in search of a pair that is not there yet
FEWEST = 4  # pairs with results: below, points are spread over the ranges


def propose(study: StudyConfig, results: Results, number: int, seed: int = 0) -> list[tuple[float, float]]:
    """(ALMR, LR) pairs within the studied ranges that are not there yet, as runs or as what is to be run.

    What is looked for is the highest mean metric or, without scores, the lowest balanced loss, as for the frontier. Each
    proposal is taken to come out as the surface says before the next one is made, so that they do not crowd in one place; so
    are pairs that are to be run, as when a study was stopped before it had run what was proposed last.

    Raises:
        InputError: an axis has no range, or no pair is left in it
    """
    for name, values in (("almr", study.almr), ("lr", study.rates)):
        if min(values) == max(values):
            raise InputError(f"{name} has the one value {values[0]:g}; proposals need a range of two values or more")
    space = {
        "almr": FloatDistribution(min(study.almr), max(study.almr)),
        "lr": FloatDistribution(min(study.rates), max(study.rates), log=True),
    }
    quantity = MEAN_METRIC if results.last(MEAN_METRIC) else "balanced"
    rows = results.last(quantity)
    pairs = sorted({pair for row in rows if study.covers(pair := (row["almr"], row["lr"]))})
    surface = None
    if len(pairs) >= FEWEST:
        almrs, rates, values = ([row[name] for row in rows] for name in ("almr", "lr", quantity))
        surface = fit_surface(almrs, rates, values, loss=quantity != MEAN_METRIC)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = GPSampler(seed=seed, n_startup_trials=FEWEST, independent_sampler=QMCSampler(seed=seed, scramble=True))
        search = optuna.create_study(direction="maximize" if quantity == MEAN_METRIC else "minimize", sampler=sampler)
    for almr, lr in pairs:
        values = [row[quantity] for row in rows if (row["almr"], row["lr"]) == (almr, lr)]
        search.add_trial(create_trial(params={"almr": almr, "lr": lr}, distributions=space, value=float(np.mean(values))))
    found: list[tuple[float, float]] = []
    known = {(point.almr, point.lr) for point in grid_points(study)}

    usual = float(np.mean([row[quantity] for row in rows])) if rows else 0.0

    def expected(almr: float, lr: float) -> float:
        return usual if surface is None else float(surface.mean(surface.scale.unit(np.array([almr]), np.array([lr])))[0])

    for almr, lr in sorted(known - {(row["almr"], row["lr"]) for row in results.rows}):
        search.add_trial(create_trial(params={"almr": almr, "lr": lr}, distributions=space, value=expected(almr, lr)))
    while len(found) < number:
        trial = search.ask(space)
        almr, lr = rounded(study, trial.params["almr"], trial.params["lr"])
        search.tell(trial, expected(almr, lr))
        found.append(new_pair(study, almr, lr, known | set(found), seed))
    return found


def new_pair(study: StudyConfig, almr: float, lr: float, taken: set[tuple[float, float]], seed: int) -> tuple[float, float]:
    """This pair or, if its runs are there already (the sampler would like it measured again), another one nearby: farther
    away each time that what was drawn is taken, too.

    Raises:
        InputError: the ranges have no other pair, in three digits
    """
    names, random = {GridPoint(0, *pair).name for pair in taken}, np.random.default_rng([seed, len(taken)])
    low, high = min(study.almr), max(study.almr)
    width = np.log(max(study.rates) / min(study.rates))
    pair = almr, lr
    for attempt in range(MOST_DRAWS):
        if GridPoint(0, *pair).name not in names:
            return pair
        reach = min(1.0, 0.05 * 1.1**attempt)  # of the ranges
        share, factor = reach * random.uniform(-1, 1), reach * random.uniform(-1, 1)
        pair = rounded(study, almr + (high - low) * share, lr * np.exp(width * factor))
    raise InputError(
        f"almr from {low:g} to {high:g} and lr from {min(study.rates):g} to {max(study.rates):g} have {len(taken)} pairs "
        "already and hardly another one that differs in three digits; use fewer than that, or wider ranges"
    )


def rounded(study: StudyConfig, almr: float, lr: float) -> tuple[float, float]:
    """To three digits, within the studied ranges."""
    almr, lr = round(almr, 3) + 0.0, float(f"{lr:.3g}")  # -0.0 would be another name of 0
    return float(np.clip(almr, min(study.almr), max(study.almr))), float(np.clip(lr, min(study.rates), max(study.rates)))
