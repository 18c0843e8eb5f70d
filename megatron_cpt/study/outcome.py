"""How a run of a study ended, and whether it has diverged."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from megatron_cpt.checkpoint.layout import write_json
from megatron_cpt.errors import InputError

OUTCOME = "outcome.json"
STEPS_OF_MEAN = 10


@dataclass(frozen=True)
class Outcome:
    """Attributes:
    kind: it has read all its tokens, or it was stopped because its loss ran away
    reason: of the latter
    seconds: of training, without start and evaluations
    """

    kind: Literal["finished", "diverged"]
    reason: str | None
    seconds: float


def read_outcome(folder: str) -> Outcome | None:
    """Of the run in a folder; None: it is not over."""
    path = os.path.join(folder, OUTCOME)
    try:
        with open(path, encoding="utf-8") as file:
            return Outcome(**json.load(file))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} is not the outcome of a run: {error}; remove it to look at the run again") from error


def write_outcome(folder: str, outcome: Outcome) -> None:
    """Record it."""
    write_json(os.path.join(folder, OUTCOME), asdict(outcome))


def divergence(rows: Sequence[dict[str, Any]], factor: float, max_skipped_steps: int) -> str | None:
    """Why the run with these training steps (of metrics.jsonl) has diverged; None: it has not.

    Args:
        factor: how many times the loss of the first step is too much, as a mean of ten steps
        max_skipped_steps: in a row that are too few to say so
    """
    skipped = 0
    for row in reversed(rows):
        if not row.get("skipped"):
            break
        skipped += 1
    if skipped > max_skipped_steps:
        return f"{skipped} steps in a row were skipped up to step {rows[-1]['iteration']}: {rows[-1]['skipped']}"
    losses = [row["loss"] for row in rows if row["loss"] is not None and math.isfinite(row["loss"])]
    if len(losses) <= STEPS_OF_MEAN:
        return None
    mean = sum(losses[-STEPS_OF_MEAN:]) / STEPS_OF_MEAN
    if mean <= factor * losses[0]:
        return None
    return f"mean loss of {STEPS_OF_MEAN} steps {mean:.4g} at step {rows[-1]['iteration']}, at step 1 {losses[0]:.4g}"
