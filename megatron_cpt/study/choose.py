"""The ALMR and the learning rate to use: the best pair that leaves the general language as it may be left."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import yaml

from megatron_cpt.study.fit import Fit, outcome_notes, seed_note
from megatron_cpt.study.grid import absolute, check_no_stages, parse_run_config, read_fields
from megatron_cpt.study.records import checked_number, is_number, of_kind, read_record_file
from megatron_cpt.study.results import MEAN_METRIC, Results
from megatron_cpt.study.surfaces import INTERVAL, Array, Surface, bound_between_pairs, pairs_around, unit_grid
from megatron_cpt.utils.errors import InputError
from megatron_cpt.utils.files import write_json, write_text
from megatron_cpt.utils.input_files import load_yaml, plain_number

CHOICE, CONFIG, MIXTURE = "choice.json", "chosen.yaml", "chosen.mixture.yaml"
GRID, SAMPLES = 51, 400
TRANSFER = (
    "taken over unchanged, as the ALMR paper does from 8B to 70B: that the best pair does not move with the size of the "
    "model, the number of tokens and the batch is an assumption, and nothing here measures it"
)


@dataclass(frozen=True)
class Choice:
    """The pair to use.

    Attributes:
        almr_interval, lr_interval: 5 % to 95 % of what would be chosen on other surfaces that fit the runs; None: measured
            pairs only were compared
        value: of the goal there
        general_rise: of the general loss there since the start, relative
        chance: that the rise is within the limit
        reason: in sentences
        notes: what should not be forgotten
    """

    almr: float
    lr: float
    almr_interval: tuple[float, float] | None
    lr_interval: tuple[float, float] | None
    goal: str
    value: float
    general_rise: float
    chance: float | None
    reason: str
    notes: list[str]


def choose(results: Results, fit: Fit, max_general_rise: float, confidence: float, goal: str | None) -> Choice:
    """The highest mean metric, or the lowest additional loss, among the pairs that keep the limit.

    Args:
        max_general_rise: of the general loss (so of its bits per byte), relative to its start
        confidence: probability with which the limit must be kept, where surfaces give one
        goal: mean_metric or additional; None: the former if there are scores

    Raises:
        InputError: no pair keeps the limit, or the goal was not measured
    """
    goal = goal or (MEAN_METRIC if MEAN_METRIC in fit.surfaces else "additional")
    if goal not in fit.surfaces:
        raise InputError(f"goal is {goal}, which the runs do not have; they have {', '.join(fit.surfaces)}")
    start = float(np.mean([row["general"] for row in results.rows if row["iteration"] == 0]))
    highest = start * (1 + max_general_rise)
    refused = [f"{name}: {why}" for name in ("general", goal) if (why := fit.surfaces[name].refused)]
    if (seeds := seed_note(results)) is not None:
        refused.append(seeds)
    places, place_notes = places_to_choose_from(results, fit.surfaces["general"].surface)
    if not refused and len(places) == 0:
        refused.append("the finished pairs surround no place to choose")
    if refused:
        choice = choose_measured(results, goal, start, highest)
        notes = [*choice.notes, f"Only measured pairs were compared, as they are: {'; '.join(refused)}."]
    else:
        choice = choose_on_surfaces(
            fit.surfaces["general"].surface, fit.surfaces[goal].surface, places, goal, start, highest, confidence
        )
        notes = [*place_notes, *choice.notes]
    notes += border_notes(choice, fit.surfaces[goal].surface)
    notes += outcome_notes(results)
    notes += [note for note in fit.notes if note.startswith(("general: ", f"{goal}: ")) and note not in refused]
    return dataclasses.replace(choice, notes=notes)


def sign_of(goal: str) -> float:
    """1 where higher is better."""
    return 1.0 if goal == MEAN_METRIC else -1.0


def places_to_choose_from(results: Results, general: Surface) -> tuple[Array, list[str]]:
    """A grid between the outermost finished pairs, without what is nearest to one that has diverged or has not finished: a
    surface that has seen nothing there would promise what it likes. And notes that say so.
    """
    grid = unit_grid(GRID)
    at = grid[~np.isnan(bound_between_pairs(general, grid, 0.5))]
    notes = []
    if len(at) < len(grid):
        notes.append(
            f"Places that no finished pairs surround, {1 - len(at) / len(grid):.0%} of the ranges, were not considered."
        )
    finished = {(row["almr"], row["lr"]) for row in results.last("general")}
    bad = {(row["almr"], row["lr"]) for row in results.rows if row["outcome"] != "finished"}
    bad |= set(results.planned) - finished
    if not bad:
        return at, notes
    good = sorted(finished - bad)
    distances = [
        np.linalg.norm(at[:, None] - general.scale.unit(*np.array(pairs).T)[None], axis=-1).min(axis=1)
        for pairs in (good, sorted(bad))
    ]
    places = at[distances[0] < distances[1]]
    which = f"{len(bad)} pairs have diverged or have not finished; "
    if len(places) == len(at):
        return places, [*notes, which + "none of the places that were considered is nearest to one of them."]
    share = (len(at) - len(places)) / len(grid)
    return places, [*notes, f"{which}places nearest to these, {share:.1%} of the ranges, were not considered."]


def choose_on_surfaces(
    general: Surface, wanted: Surface, at: Array, goal: str, start: float, highest: float, confidence: float
) -> Choice:
    """Among places `at` of the studied ranges.

    The general loss is taken to be nowhere below what the measured pairs around a place say: beside a cliff its surface may
    be.
    """
    least = bound_between_pairs(general, at, confidence)
    bound = np.maximum(general.bound(at, confidence), least)
    heights = sign_of(goal) * wanted.mean(at)
    best = best_within(heights, bound, highest)
    if best is None:
        surest = int(bound.argmin())
        raise InputError(
            f"no pair keeps the general loss below {highest:.4g} with a probability of {confidence:.0%}; the surest is ALMR "
            f"{wanted.scale.share(at[surest, 1]):.3g}, learning rate {wanted.scale.lr(at[surest, 0]):.3g} with a rise of "
            f"up to {bound[surest] / start - 1:+.2%}: allow more, or study lower learning rates and ALMRs"
        )
    free = int(heights.argmax())
    rise = float(general.mean(at[best : best + 1])[0]) / start - 1
    chance = float(general.chance_below(at[best : best + 1], highest)[0])
    almr, lr = float(wanted.scale.share(at[best, 1])), float(wanted.scale.lr(at[best, 0]))
    value, deviation = float(sign_of(goal) * heights[best]), float(wanted.std(at[best : best + 1])[0])
    reason = (
        f"{best_words(goal)} ({value:.4g}, +- {deviation:.2g}) of all pairs that keep the general loss within "
        f"{highest / start - 1:+.2%} of its start with a probability of {confidence:.0%} or more; there it changes by "
        f"{rise:+.2%}. "
    )
    if best == free:
        reason += "The limit does not bind: without it the pair would be the same."
    else:
        reason += (
            f"The limit binds: without it ALMR {wanted.scale.share(at[free, 1]):.3g} and learning rate "
            f"{wanted.scale.lr(at[free, 0]):.3g} would be best ({sign_of(goal) * heights[free]:.4g})."
        )
    chosen = chosen_again(general, wanted, at, least, goal, highest, confidence)
    notes = beside_a_limit(general, at[best], start, highest)
    if len(chosen) < SAMPLES:
        notes.append(f"On {1 - len(chosen) / SAMPLES:.0%} of other surfaces that fit the runs no pair keeps the limit.")
    ends = np.percentile(np.concatenate([chosen, at[best : best + 1]]), INTERVAL, axis=0)
    low, high = np.minimum(ends[0], at[best]), np.maximum(ends[1], at[best])
    shares, rates = wanted.scale.share(np.array([low[1], high[1]])), wanted.scale.lr(np.array([low[0], high[0]]))
    almr_interval, lr_interval = (float(shares[0]), float(shares[1])), (float(rates[0]), float(rates[1]))
    return Choice(almr, lr, almr_interval, lr_interval, goal, value, rise, chance, reason, notes)


def beside_a_limit(general: Surface, place: Array, start: float, highest: float) -> list[str]:
    """A note where pairs around the chosen place have broken the limit: no run says where between them the loss rises."""
    around = pairs_around(general, place)
    means = [float(general.values[(general.points == pair).all(axis=1)].mean()) for pair in around]
    broken = [
        f"ALMR {general.scale.share(v):.3g} and learning rate {general.scale.lr(u):.3g} ({mean / start - 1:+.2%})"
        for (u, v), mean in zip(around, means, strict=True)
        if mean > highest
    ]
    if not broken:
        return []
    return [
        f"Of the {len(around)} measured pairs around it, {len(broken)} broke the limit: {', '.join(broken)}. The "
        "probability takes the loss to rise evenly towards them; if it jumps before the chosen pair, the limit is broken. A "
        "run of the chosen pair would tell."
    ]


def best_within(heights: Array, general: Array, highest: float) -> int | None:
    """Where the goal is best among places whose general loss is not above `highest`."""
    allowed = general <= highest
    return int(np.where(allowed, heights, -np.inf).argmax()) if allowed.any() else None


def chosen_again(
    general: Surface, wanted: Surface, at: Array, least: Array, goal: str, highest: float, confidence: float
) -> Array:
    """[n, 2] what is chosen, with the same confidence, on surfaces drawn from both processes; without those on which no pair
    keeps the limit.
    """
    bounds = np.maximum(general.samples(at, SAMPLES, 1, confidence), least)
    draws = zip(wanted.samples(at, SAMPLES, 0), bounds, strict=True)
    found = [best_within(sign_of(goal) * height, bound, highest) for height, bound in draws]
    return at[[place for place in found if place is not None]]


def choose_measured(results: Results, goal: str, start: float, highest: float) -> Choice:
    """Of the pairs that were run, by the means over their seeds."""
    rows = [row for row in results.last(goal) if row["general"] is not None]
    unsafe = {(row["almr"], row["lr"]) for row in results.rows if row["outcome"] == "diverged"}  # with another seed
    pairs = sorted({(row["almr"], row["lr"]) for row in rows} - unsafe)
    means = {
        pair: {
            name: float(np.mean([row[name] for row in rows if (row["almr"], row["lr"]) == pair]))
            for name in ("general", goal)
        }
        for pair in pairs
    }
    allowed = [pair for pair in pairs if means[pair]["general"] <= highest]
    if not allowed:
        least = min(pairs, key=lambda pair: means[pair]["general"])
        raise InputError(
            f"no run kept the general loss below {highest:.4g}; the least rise is "
            f"{means[least]['general'] / start - 1:+.2%} with ALMR {least[0]:g} and learning rate {least[1]:g}: allow more, "
            "or study lower learning rates and ALMRs"
        )
    best = max(allowed, key=lambda pair: sign_of(goal) * means[pair][goal])
    rise = means[best]["general"] / start - 1
    reason = (
        f"{best_words(goal)} ({means[best][goal]:.4g}) of the {len(allowed)} measured pairs, of {len(pairs)}, that keep the "
        f"general loss within {highest / start - 1:+.2%} of its start; there it changes by {rise:+.2%}."
    )
    return Choice(*best, None, None, goal, means[best][goal], rise, None, reason, [])


def best_words(goal: str) -> str:
    """What was looked for."""
    return "The highest mean metric" if goal == MEAN_METRIC else "The lowest additional loss"


def border_notes(choice: Choice, surface: Surface) -> list[str]:
    """Where the pair lies on the border of what was studied, so that the best may be beyond."""
    notes = []
    at = surface.scale.unit(np.array([choice.almr]), np.array([choice.lr]))[0]
    for name, place in (("learning rate", at[0]), ("ALMR", at[1])):
        if min(place, 1 - place) < 1e-6 and not (name == "ALMR" and choice.almr in (0.0, 1.0)):
            notes.append(f"The {name} is on the border of the studied range: the best may be beyond it.")
    return notes


def write_choice(folder: str, choice: Choice, target: str, max_general_rise: float) -> str:
    """Write choice.json and the configuration of the CPT run to start: `target` with the chosen pair; returns its path."""
    fields = read_fields(target)
    config = parse_run_config(fields, target)
    mixture_fields = load_yaml(config.mixture, "mixture file", plain_number)
    check_no_stages(config.mixture, mixture_fields)
    mixture = absolute(mixture_fields, os.path.dirname(os.path.abspath(config.mixture))) | {"almr": round(choice.almr, 4)}
    lr = float(f"{choice.lr:.3g}")
    ratio = config.optimizer.min_lr / config.optimizer.lr
    mixture_path, path = (os.path.join(folder, name) for name in (MIXTURE, CONFIG))
    chosen = fields | {
        "mixture": mixture_path,
        "optimizer": fields.get("optimizer", {}) | {"lr": lr, "min_lr": float(f"{lr * ratio:.3g}")},
    }
    comment = f"# ALMR and learning rate of the study in {folder}, {TRANSFER}.\n# {choice.reason}\n"
    write_text(mixture_path, yaml.safe_dump(mixture, sort_keys=False, allow_unicode=True))
    write_text(path, comment + yaml.safe_dump(chosen, sort_keys=False, allow_unicode=True))
    facts = {"max_general_rise": max_general_rise, "target": target, "assumption": TRANSFER}
    write_json(os.path.join(folder, CHOICE), dataclasses.asdict(choice) | facts)
    return path


def read_choice(folder: str) -> dict[str, Any] | None:
    """choice.json; None: nothing was chosen yet."""
    path = os.path.join(folder, CHOICE)
    if not os.path.exists(path):
        return None
    choice: dict[str, Any] = read_record_file(path, dict, "a choice; remove the file, or use choose again")
    for name in ("almr", "lr", "max_general_rise"):
        checked_number(choice.get(name), f"{path}: {name}")
    of_kind(choice.get("reason"), str, f"{path}: reason", "a text")
    for note in of_kind(choice.get("notes"), list, f"{path}: notes", "a list of texts"):
        of_kind(note, str, f"{path}: notes", "a list of texts")
    for name in ("almr_interval", "lr_interval"):
        if choice.get(name) is not None:
            ends = of_kind(choice[name], list, f"{path}: {name}", "two numbers, or null")
            if len(ends) != 2 or not all(map(is_number, ends)):
                raise InputError(f"{path}: {name} is {ends}; expected two numbers, or null")
    return choice
