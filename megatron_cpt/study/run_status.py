"""How a run of a study ended, and whether it has diverged."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from megatron_cpt.study.records import checked_number, described, number_or_none, of_kind, read_record_file
from megatron_cpt.utils.errors import InputError
from megatron_cpt.utils.files import write_json

OUTCOME = "outcome.json"
STEPS_OF_MEAN = 10


class StoppedError(Exception):
    """The study is asked to stop: its runs were told to save, and have ended."""


@dataclass(frozen=True)
class RunOutcome:
    """Attributes:
    kind: it has read all its tokens, or it was stopped because its loss ran away
    reason: of the latter
    seconds: of training, without start and evaluations
    wall_seconds: of all that the run took, with its start, its evaluations and its scores; None: it was stopped and went on,
        or was killed while its scores were measured, or an older study did not record it
    """

    kind: Literal["finished", "diverged"]
    reason: str | None
    seconds: float
    wall_seconds: float | None = None


def read_outcome(folder: str) -> RunOutcome | None:
    """Of the run in a folder; None: it is not over."""
    path = os.path.join(folder, OUTCOME)
    if not os.path.exists(path):
        return None
    found = read_record_file(path, dict, "the outcome of a run; remove the file to look at the run again")
    if set(found) - {entry.name for entry in fields(RunOutcome)}:
        raise InputError(
            f"{path} has fields {', '.join(found)}; expected those of an outcome: kind, reason, seconds, wall_seconds"
        )
    if found.get("kind") not in ("finished", "diverged"):
        raise InputError(f"{path}: kind is {described(found.get('kind'))}; expected finished or diverged")
    if found.get("reason") is not None:
        of_kind(found["reason"], str, f"{path}: reason", "a text or null")
    seconds, wall_seconds = checked_number(found.get("seconds"), f"{path}: seconds"), found.get("wall_seconds")
    return RunOutcome(found["kind"], found.get("reason"), seconds, number_or_none(wall_seconds, f"{path}: wall_seconds"))


def write_outcome(folder: str, outcome: RunOutcome) -> None:
    """Record it."""
    write_json(os.path.join(folder, OUTCOME), asdict(outcome))


def divergence(
    rows: Sequence[dict[str, Any]], factor: float, max_skipped_steps: int, train_iters: int | None = None
) -> str | None:
    """Why the run with these rows of metrics.jsonl has diverged; None: it has not.

    All of the run is looked at, so that it does not matter when.

    Args:
        factor: how many times the loss of the first step is too much, as a mean of ten steps, or of half of a run that is
            shorter than twenty
        max_skipped_steps: in a row that are too few to say so
        train_iters: steps of the whole run; None: not known yet
    """
    steps = [row for row in rows if "loss" in row]
    skipped = 0
    for row in steps:
        skipped = skipped + 1 if row.get("skipped") else 0
        if skipped > max_skipped_steps:
            return f"{skipped} steps in a row were skipped up to step {row['iteration']}: {row['skipped']}"
    for row in rows:
        for name, figures in row.get("validation", {}).items():
            if figures["loss"] is None or not math.isfinite(figures["loss"]):
                return f"the validation loss of {name} at step {row['iteration']} is no number"
    known = [row for row in steps if row["loss"] is not None and math.isfinite(row["loss"])]
    losses = [row["loss"] for row in known]
    window = STEPS_OF_MEAN if train_iters is None else max(1, min(STEPS_OF_MEAN, train_iters // 2))
    for end in range(window + 1, len(losses) + 1):
        mean = sum(losses[end - window : end]) / window
        if mean > factor * losses[0]:
            at = known[end - 1]["iteration"]
            return f"mean loss of {window} steps {mean:.4g} at step {at}, at step 1 {losses[0]:.4g}"
    return None
