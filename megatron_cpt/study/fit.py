"""What a study's runs say: surfaces, the paper's two lines, the mixture laws, and what they do not support."""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from megatron_cpt.checkpoint.layout import write_json
from megatron_cpt.errors import InputError
from megatron_cpt.study.frontier import Axis, Line, loss_line, metric_frontier
from megatron_cpt.study.laws import CmrLaw, DCptLaw, fit_cmr, fit_d_cpt, held_out_error
from megatron_cpt.study.results import MEAN_METRIC, Results
from megatron_cpt.study.surfaces import Array, Surface, fit_surface
from megatron_cpt.training.metrics_file import finite

FIT = "fit.json"
LOSSES = ("general", "additional", "mixed", "balanced")
FEWEST_POINTS = 9  # pairs of ALMR and LR
FEWEST_VALUES = 3  # of each axis
SIGNIFICANCE = 0.01


@dataclass(frozen=True)
class FittedSurface:
    """A surface and how far it can be trusted.

    Attributes:
        error: root mean square of left-out runs' errors
        noise: of seeds, at the run in the middle if these are in order of their noise
        explained: share of the runs' variance that left-out runs' predictions explain; below 0: the mean is better
        refused: why nothing should be concluded from it
    """

    surface: Surface
    error: float
    noise: float
    explained: float
    refused: str | None


@dataclass(frozen=True)
class FittedLaw:
    """The D-CPT law of one language at one learning rate.

    Attributes:
        points: evaluations that it was fitted to
        held_out: mean relative error on ratios that were left out
    """

    quantity: str
    lr: float
    law: DCptLaw
    points: int
    held_out: float


@dataclass(frozen=True)
class Fit:
    """Attributes:
    surfaces: of each quantity that the runs have
    frontier: of mean_metric, or, without scores, of -balanced; frontier_of says which
    line: of the mixed loss
    d_cpt, cmr: at each learning rate that has enough; cmr's keys are learning rates
    notes: what could not be fitted or should not be believed, and why
    """

    surfaces: dict[str, FittedSurface]
    frontier: Line | None
    frontier_of: str
    line: Line | None
    d_cpt: list[FittedLaw]
    cmr: dict[float, CmrLaw]
    notes: list[str]


def fit(results: Results, axis: Axis = "almr", tolerance: float = 0.01, laws: bool = True) -> Fit:
    """Everything that the runs that have finished support.

    Args:
        axis: along which the frontier's peaks are looked for
        tolerance: relative rise of the general loss, for critical mixture ratios
        laws: whether to fit the mixture laws, which takes longest

    Raises:
        InputError: fewer than four runs have finished, or they do not vary
    """
    notes = []
    diverged = {row["run"] for row in results.rows if row["outcome"] == "diverged"}
    unfinished = {row["run"] for row in results.rows if row["outcome"] == "unfinished"}
    for kind, names in (("diverged", diverged), ("are not finished", unfinished)):
        if names:
            notes.append(f"{len(names)} runs {kind} and are left out: {', '.join(sorted(names))}")
    quantities = [*LOSSES, *([MEAN_METRIC] if results.last(MEAN_METRIC) else [])]
    surfaces = {name: fitted_surface(results, name) for name in quantities}
    pairs = {(row["almr"], row["lr"]) for row in results.last("general")}
    if len(pairs) == len(results.last("general")):
        notes.append("every pair was run with one seed: what is said of noise, and so the intervals, may be too small")
    for name, found in surfaces.items():
        if found.refused:
            notes.append(f"{name}: {found.refused}")
    frontier_of = MEAN_METRIC if MEAN_METRIC in surfaces else "balanced"
    frontier = line = None
    if len(np.unique(results.column("almr"))) >= FEWEST_VALUES and len(np.unique(results.column("lr"))) >= FEWEST_VALUES:
        sign = 1.0 if frontier_of == MEAN_METRIC else -1.0
        frontier = metric_frontier(surfaces[frontier_of].surface, axis, sign)
        line = loss_line(surfaces["mixed"].surface)
        notes += [f"frontier of {frontier_of}: {frontier.refused}"] if frontier.refused else []
        notes += [f"loss line: {line.refused}"] if line.refused else []
        if frontier.b_interval[0] < 0 < frontier.b_interval[1]:
            notes.append("frontier: the interval of b contains 0, so the runs do not say in which direction it goes")
    else:
        notes.append(f"no frontier, no loss line: they need {FEWEST_VALUES} values or more of each axis")
    d_cpt, cmr = fit_laws(results, tolerance, notes) if laws else ([], {})
    return Fit(surfaces, frontier, frontier_of, line, d_cpt, cmr, notes)


def fitted_surface(results: Results, quantity: str) -> FittedSurface:
    """The surface of one quantity, with its checks."""
    rows = results.last(quantity)
    almr, lr, values = (np.array([row[name] for row in rows], dtype=np.float64) for name in ("almr", "lr", quantity))
    surface = fit_surface(almr, lr, values, loss=quantity != MEAN_METRIC)
    errors = surface.left_out_errors()
    explained = 1 - float((errors**2).sum() / max(((values - values.mean()) ** 2).sum(), 1e-300))
    noise = float(np.median(surface.noise(surface.points)))
    return FittedSurface(surface, float(np.sqrt((errors**2).mean())), noise, explained, refusal(surface))


def refusal(surface: Surface) -> str | None:
    """Why the runs do not support this surface: too few of them, or it is flat."""
    pairs = np.unique(surface.points, axis=0)
    if len(pairs) < FEWEST_POINTS:
        return f"{len(pairs)} pairs of ALMR and learning rate have finished; {FEWEST_POINTS} or more support a surface"
    chance = chance_of_flat(surface.points, surface.inner(surface.values))
    if chance > SIGNIFICANCE:
        return f"the surface is flat within the noise (F test, p = {chance:.2g}): more seeds, longer runs or wider ranges"
    return None


def chance_of_flat(points: Array, values: Array) -> float:
    """p of an F test: of the differences between pairs against those between seeds; with one seed each, of a quadratic
    surface against a plain mean."""
    pairs, which = np.unique(points, axis=0, return_inverse=True)
    groups = [values[which == number] for number in range(len(pairs))]
    if max(map(len, groups)) > 1:
        between = sum(len(group) * (group.mean() - values.mean()) ** 2 for group in groups)
        within = sum(float(((group - group.mean()) ** 2).sum()) for group in groups)
        degrees = len(groups) - 1, len(values) - len(groups)
    else:
        u, v = points.T
        design = np.stack([np.ones_like(u), u, v, u * u, u * v, v * v], axis=1)
        within = float(((values - design @ np.linalg.lstsq(design, values, rcond=None)[0]) ** 2).sum())
        between = float(((values - values.mean()) ** 2).sum()) - within
        degrees = 5, len(values) - 6
    if degrees[1] < 1:
        return 1.0
    if within <= 0:
        return 0.0 if between > 0 else 1.0
    return float(stats.f.sf(between / degrees[0] / (within / degrees[1]), *degrees))


def fit_laws(results: Results, tolerance: float, notes: list[str]) -> tuple[list[FittedLaw], dict[float, CmrLaw]]:
    """D-CPT of both languages and CMR at each learning rate, from all evaluations after the start of finished runs."""
    rows = [row for row in results.rows if row["outcome"] == "finished"]
    laws, cmr, reasons = [], {}, []
    for lr in sorted({row["lr"] for row in rows}):
        here = [row for row in rows if row["lr"] == lr and row["iteration"] > 0]
        start = next((row["general"] for row in rows if row["iteration"] == 0), math.nan)
        tokens, almr = (np.array([row[name] for row in here], dtype=np.float64) for name in ("tokens", "almr"))
        for quantity, ratio in (("general", 1 - almr), ("additional", almr)):
            losses = np.array([row[quantity] for row in here], dtype=np.float64)
            try:
                law = fit_d_cpt(tokens, ratio, losses)
                laws.append(FittedLaw(quantity, lr, law, len(losses), held_out_error(tokens, ratio, losses)))
            except InputError as error:
                reasons.append(f"D-CPT law of {quantity} at learning rate {lr:g}: {error}")
        general = np.array([row["general"] for row in here], dtype=np.float64)
        try:
            cmr[lr] = fit_cmr(tokens, almr, general, start, tolerance)
        except InputError as error:
            reasons.append(f"CMR law at learning rate {lr:g}: {error}")
    notes += reasons
    return laws, cmr


def write_fit(folder: str, found: Fit) -> str:
    """Replace fit.json; returns its path."""
    path = os.path.join(folder, FIT)
    write_json(path, finite(to_json(found)))
    return path


def to_json(found: Fit) -> dict[str, Any]:
    """All numbers by name."""
    return {
        "surfaces": {
            name: {
                "runs": len(fitted.surface.values),
                "left_out_rmse": fitted.error,
                "left_out_explained": fitted.explained,
                "seed_noise": fitted.noise,
                "warp": fitted.surface.warp and dataclasses.asdict(fitted.surface.warp),
                "refused": fitted.refused,
            }
            for name, fitted in found.surfaces.items()
        },
        "frontier": line_json(found.frontier, found.frontier_of),
        "loss_line": line_json(found.line, "mixed"),
        "d_cpt": [
            {"of": fitted.quantity, "lr": fitted.lr, "points": fitted.points, "held_out_error": fitted.held_out}
            | dataclasses.asdict(fitted.law)
            for fitted in found.d_cpt
        ],
        "cmr": [
            {"lr": lr, "b0": law.b0, "b1": law.b1, "s": law.s, "held_out_error": law.error}
            | {"tokens": law.tokens.tolist(), "ratios": law.ratios.tolist()}
            for lr, law in found.cmr.items()
        ],
        "notes": found.notes,
    }


def line_json(line: Line | None, of: str) -> dict[str, Any] | None:
    """ALMR = a + b log10 LR."""
    if line is None:
        return None
    fields = {"of": of, "a": line.a, "b": line.b, "a_interval": line.a_interval, "b_interval": line.b_interval}
    return fields | {"points": line.points.tolist(), "refused": line.refused}


def equation(line: Line) -> str:
    """In words."""
    return f"ALMR = {line.a:.3g} {'+' if line.b >= 0 else '-'} {abs(line.b):.3g} log10 LR"
