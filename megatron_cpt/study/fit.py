"""What a study's runs say: surfaces, the paper's two lines, the mixture laws, and what they do not support."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from megatron_cpt.study.critical import CriticalRatio
from megatron_cpt.study.frontier import Line, loss_line, metric_frontier
from megatron_cpt.study.laws import CmrLaw, DCptLaw, HeldOut, check_follows_tokens, fit_cmr, fit_d_cpt, held_out
from megatron_cpt.study.results import MEAN_METRIC, Results
from megatron_cpt.study.settings import Axis
from megatron_cpt.study.surfaces import Array, Surface, fit_surface
from megatron_cpt.training.metrics_file import finite
from megatron_cpt.utils.console import counted
from megatron_cpt.utils.errors import InputError
from megatron_cpt.utils.files import write_json

FIT = "fit.json"
LOSSES = ("general", "additional", "mixed", "balanced")
FEWEST_POINTS = 9  # pairs of ALMR and LR
FEWEST_VALUES = 3  # of each axis
SIGNIFICANCE = 0.01
SEED_DEGREES = 5  # runs beyond the first of each pair: fewer say too little of noise
LEAST_EXPLAINED = 0.5  # below it a surface is noted to know little of places without runs
LEVEL = 20.0  # degrees: how wide the interval of a line's angle may be that contains level


@dataclass(frozen=True)
class FittedSurface:
    """A surface and how far it can be trusted.

    Attributes:
        error: root mean square of the errors on the runs of left-out pairs
        noise: of seeds, at the run in the middle if these are in order of their noise; None: there are too few second seeds
        explained: share of the runs' variance that predictions of left-out pairs explain; below 0: the mean is better
        refused: why nothing should be concluded from it
    """

    surface: Surface
    error: float
    noise: float | None
    explained: float
    refused: str | None


@dataclass(frozen=True)
class FittedLaw:
    """The D-CPT law of one language at one learning rate.

    Attributes:
        points: evaluations that it was fitted to
        held_out: how well it predicts ratios that were left out
    """

    quantity: str
    lr: float
    law: DCptLaw
    points: int
    held_out: HeldOut


@dataclass(frozen=True)
class Fit:
    """Attributes:
    surfaces: of each quantity that the runs have
    frontier: of mean_metric, or, without scores, of -balanced; frontier_of says which
    line: of the mixed loss
    d_cpt, cmr: at each learning rate that has enough; cmr's keys are learning rates
    notes: what could not be fitted or should not be believed, and why
    critical: critical mixture ratios of the token budget that was asked for
    """

    surfaces: dict[str, FittedSurface]
    frontier: Line | None
    frontier_of: str
    line: Line | None
    d_cpt: list[FittedLaw]
    cmr: dict[float, CmrLaw]
    notes: list[str]
    critical: list[CriticalRatio] = dataclasses.field(default_factory=list)


def fit_study(results: Results, axis: Axis = "almr", tolerance: float = 0.01, laws: bool = True) -> Fit:
    """Everything that the runs that have finished support.

    Args:
        axis: along which the frontier's peaks are looked for
        tolerance: relative rise of the general loss, for critical mixture ratios
        laws: whether to fit the mixture laws, which takes longest

    Raises:
        InputError: fewer than four runs have finished, or they do not vary
    """
    notes = outcome_notes(results)
    names = (*LOSSES, *([MEAN_METRIC] if results.last(MEAN_METRIC) else []))
    surfaces = fitted_surfaces(results, names, notes)
    if (seeds := seed_note(results)) is not None:
        notes.append(seeds)
    notes += [f"{name}: {text}" for name, found in surfaces.items() for text in surface_notes(found)]
    frontier_of = MEAN_METRIC if MEAN_METRIC in surfaces else "balanced"
    frontier = line = None
    if len(np.unique(results.column("almr"))) < FEWEST_VALUES or len(np.unique(results.column("lr"))) < FEWEST_VALUES:
        notes.append(f"no frontier, no loss line: they need {FEWEST_VALUES} values or more of each axis")
    else:
        if (wanted := surfaces.get(frontier_of)) is not None:
            sign = 1.0 if frontier_of == MEAN_METRIC else -1.0
            frontier = metric_frontier(wanted.surface, axis, sign, refused=wanted.refused)
            frontier = frontier if seeds is None else without_intervals(frontier)
            notes += line_notes(f"frontier of {frontier_of}", frontier)
        line = loss_line(surfaces["mixed"].surface, refused=surfaces["mixed"].refused)
        line = line if seeds is None else without_intervals(line)
        notes += line_notes("loss line", line)
    d_cpt, cmr = fit_laws(results, tolerance, notes) if laws else ([], {})
    return Fit(surfaces, frontier, frontier_of, line, d_cpt, cmr, notes)


def fit_for_choice(results: Results, goal: str | None) -> Fit:
    """The surfaces of `fit_study` that a choice looks at: of the general loss, and of the goal (None: of both it could be).

    Raises:
        InputError: as `fit_study`
    """
    notes: list[str] = []
    goals = [goal] if goal else ["additional", MEAN_METRIC]
    names = ["general", *(name for name in goals if results.last(name))]
    surfaces = fitted_surfaces(results, names, notes)
    notes += [f"{name}: {text}" for name, found in surfaces.items() for text in surface_notes(found)]
    return Fit(surfaces, None, "", None, [], {}, notes)


def fitted_surfaces(results: Results, names: Sequence[str], notes: list[str]) -> dict[str, FittedSurface]:
    """The surfaces of these quantities by name; adds to `notes` what is missing.

    Raises:
        InputError: general, additional or mixed has no surface
    """
    surfaces: dict[str, FittedSurface] = {}
    runs = len(results.last("general"))
    for name in names:
        having = len(results.last(name))
        if having < runs:
            notes.append(f"{name}: {having} of {runs} finished runs have it")
        try:
            surfaces[name] = fitted_surface(results, name)
        except InputError as error:
            if name in ("general", "additional", "mixed"):
                raise
            notes.append(f"{name}: {error}")
    return surfaces


def without_intervals(line: Line) -> Line:
    """Of runs that say nothing about noise."""
    none = (-math.inf, math.inf)
    return dataclasses.replace(line, a_interval=none, b_interval=none, angle_interval=none)


def outcome_notes(results: Results) -> list[str]:
    """Which runs are left out, and why."""
    notes = []
    for outcome, words in (("diverged", "diverged"), ("unfinished", "not finished")):
        names = sorted({row["run"] for row in results.rows if row["outcome"] == outcome})
        if names:
            notes.append(f"{counted(len(names), 'run')} {words} and left out: {', '.join(names)}")
    broken = sorted({row["run"] for row in results.rows if row["last"] and row.get("mixed") is None})
    if broken:
        notes.append(f"{counted(len(broken), 'finished run')} without a number as a loss and left out: {', '.join(broken)}")
    return notes


def seed_note(results: Results) -> str | None:
    """What too few seeds leave unknown."""
    runs, pairs = len(results.last("general")), len({(row["almr"], row["lr"]) for row in results.last("general")})
    if runs - pairs >= SEED_DEGREES:
        return None
    having = "every pair was run with one seed" if runs == pairs else f"{runs} runs of {pairs} pairs"
    return f"{having}: that says too little about noise for intervals; two or three seeds each say more"


def surface_notes(found: FittedSurface) -> list[str]:
    """Why a surface is refused, or what it does not know."""
    if found.refused:
        return [found.refused]
    if found.explained < LEAST_EXPLAINED:
        return [
            f"surfaces without a pair explain {found.explained:.0%} of what its runs show: little is known between and "
            "beside the pairs; more pairs there, or a narrower range, would tell more"
        ]
    return []


def line_notes(name: str, line: Line) -> list[str]:
    """Why a line is refused, or what its interval leaves open."""
    if line.refused:
        return [f"{name}: {line.refused}"]
    low, high = line.angle_interval
    if math.isinf(low):
        return []  # the note on seeds says why
    if low < -90 or high > 90:
        return [f"{name}: it may be upright, so a and b have no interval"]
    if low < 0 < high and high - low > LEVEL:
        return [f"{name}: the interval of b contains 0, so the runs do not say in which direction it goes"]
    return []


def fitted_surface(results: Results, quantity: str) -> FittedSurface:
    """The surface of one quantity, with its checks."""
    rows = results.last(quantity)
    almr, lr, values = (np.array([row[name] for row in rows], dtype=np.float64) for name in ("almr", "lr", quantity))
    surface = fit_surface(almr, lr, values, loss=quantity != MEAN_METRIC)
    errors = surface.left_out_errors()
    explained = 1 - float((errors**2).sum() / max(((values - values.mean()) ** 2).sum(), 1e-300))
    noise = float(np.median(surface.noise(surface.points))) if seed_note(results) is None else None
    return FittedSurface(surface, float(np.sqrt((errors**2).mean())), noise, explained, refusal(surface, explained))


def refusal(surface: Surface, explained: float) -> str | None:
    """Why the runs do not support this surface: too few of them, it is flat, or it predicts nothing."""
    pairs = np.unique(surface.points, axis=0)
    if len(pairs) < FEWEST_POINTS:
        return f"{len(pairs)} pairs of ALMR and learning rate have finished; {FEWEST_POINTS} or more support a surface"
    chance = chance_of_flat(surface.points, surface.inner(surface.values))
    if chance > SIGNIFICANCE:
        return f"the surface is flat within the noise (F test, p = {chance:.2g}): more seeds, longer runs or wider ranges"
    if explained <= 0:
        return "surfaces without a pair tell no more of its runs than their mean does: more pairs"
    return None


def chance_of_flat(points: Array, values: Array) -> float:
    """p of an F test: of the differences between pairs against those between seeds; with hardly any second seeds, of a
    quadratic surface against a plain mean."""
    if np.ptp(values) <= 1e-9 * np.abs(values).max():
        return 1.0  # the same numbers, but for rounding
    pairs, which = np.unique(points, axis=0, return_inverse=True)
    groups = [values[which == number] for number in range(len(pairs))]
    if len(values) - len(groups) >= SEED_DEGREES:
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
    """D-CPT of both languages (from the runs that read it) and CMR at each learning rate, from all evaluations after the
    start of finished runs.
    """
    rows = [row for row in results.rows if row["outcome"] == "finished" and row["mixed"] is not None]
    laws: list[FittedLaw] = []
    cmr: dict[float, CmrLaw] = {}
    reasons: dict[tuple[str, str], list[str]] = {}  # law, why not -> learning rates
    for lr in sorted({row["lr"] for row in rows}):
        here = [row for row in rows if row["lr"] == lr and row["iteration"] > 0]
        start = next((row["general"] for row in rows if row["iteration"] == 0), math.nan)
        tokens, almr = (np.array([row[name] for row in here], dtype=np.float64) for name in ("tokens", "almr"))
        for quantity, ratio in (("general", 1 - almr), ("additional", almr)):
            losses = np.array([row[quantity] for row in here], dtype=np.float64)
            read = ratio > 0  # of a language that a run does not read, the law knows nothing
            seen = tokens[read], ratio[read], losses[read]
            try:
                law = fit_d_cpt(*seen)
                check_follows_tokens(law, *seen)
                fitted = FittedLaw(quantity, lr, law, len(seen[0]), held_out(*seen))
                laws.append(fitted)
                if (weak := held_out_reason(fitted.held_out)) is not None:
                    reasons.setdefault((f"D-CPT law of {quantity}", weak), []).append(f"{lr:g}")
            except InputError as error:
                reasons.setdefault((f"D-CPT law of {quantity}", str(error)), []).append(f"{lr:g}")
        general = np.array([row["general"] for row in here], dtype=np.float64)
        try:
            cmr[lr] = fit_cmr(tokens, almr, general, start, tolerance)
        except InputError as error:
            reasons.setdefault(("CMR law", str(error)), []).append(f"{lr:g}")
    notes += [f"{law} at learning rate {', '.join(rates)}: {why}" for (law, why), rates in reasons.items()]
    return laws, cmr


def held_out_reason(found: HeldOut) -> str | None:
    """What to tell people of a D-CPT law that knows little of a ratio that was left out; None: it knows enough."""
    if found.explained >= LEAST_EXPLAINED:
        return None
    return (
        f"on ratios that are left out it is {found.nats:.2g} nats off and explains {max(found.explained, 0.0):.0%} of what "
        "they differ by from the others: the curves miss their points"
    )


def grouped_notes(notes: Iterable[str]) -> list[str]:
    """Each once; what holds for several surfaces and lines is one note with their names."""
    subjects: dict[str, list[str]] = {}
    for note in dict.fromkeys(notes):
        name, colon, text = note.partition(": ")
        known = colon and (name in (*LOSSES, MEAN_METRIC, "loss line") or name.startswith("frontier of "))
        subjects.setdefault(text if known else note, []).extend([name] if known else [])
    return [f"{', '.join(names)}: {text}" if names else text for text, names in subjects.items()]


def write_fit(folder: str, found: Fit) -> str:
    """Replace fit.json; returns its path."""
    path = os.path.join(folder, FIT)
    write_json(path, finite(fit_json(found)))
    return path


def fit_json(found: Fit) -> dict[str, Any]:
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
            {"of": fitted.quantity, "lr": fitted.lr, "points": fitted.points, "held_out_error": fitted.held_out.error}
            | {"held_out_nats": fitted.held_out.nats, "held_out_explained": fitted.held_out.explained}
            | dataclasses.asdict(fitted.law)
            for fitted in found.d_cpt
        ],
        "cmr": [
            {"lr": lr, "b0": law.b0, "b1": law.b1, "s": law.s, "held_out_error": law.error}
            | {"tokens": law.tokens.tolist(), "ratios": law.ratios.tolist()}
            for lr, law in found.cmr.items()
        ],
        "critical_ratios": [dataclasses.asdict(critical) for critical in found.critical],
        "notes": found.notes,
    }


def line_json(line: Line | None, of: str) -> dict[str, Any] | None:
    """ALMR = a + b log10 LR."""
    if line is None:
        return None
    fields = {"of": of, "a": line.a, "b": line.b, "a_interval": line.a_interval, "b_interval": line.b_interval}
    fields |= {"angle": line.angle, "angle_interval": line.angle_interval}
    return fields | {"points": line.points.tolist(), "refused": line.refused}


def equation(line: Line) -> str:
    """In words."""
    b = line.b if abs(line.angle) > 1e-6 else 0.0  # not a rounding error
    return f"ALMR = {line.a:.3g} {'+' if b >= 0 else '-'} {abs(b):.3g} log10 LR"
