"""Validation figures with what has changed since the first step: what was gained, what was forgotten."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_cpt.data.ledger import Ledger
from megatron_cpt.training.validation import ValidationResult

UNCHANGED = 0.0005  # of bits per byte, relative: what the table would show as 0.0 %
TITLES = {"loss_change": "change", "bits_per_byte_change": "change", "verdict": ""}  # of columns that step 0 does not have
FORGETTING, GAIN, WORSE, SAME = "forgetting", "gain", "worse", "same"


def new_languages(ledger: Ledger) -> frozenset[str]:
    """Languages of additional corpora only; what gets worse in any other is forgotten."""
    general = {row.language for row in ledger.rows if row.group == "general"}
    return frozenset(row.language for row in ledger.rows) - general


def figures(
    iteration: int, results: Sequence[ValidationResult], baseline: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """{set: its fields, perplexity, loss_change, bits_per_byte_change} as they stand in metrics.jsonl.

    The changes are relative to `baseline` (those of step 0): -0.1 is 10 % lower. They are 0 at step 0 and None for a set
    that was not evaluated there.
    """
    sets = {}
    for result in results:
        before = baseline.get(result.name) or (dataclasses.asdict(result) if iteration == 0 else {})
        sets[result.name] = dataclasses.asdict(result) | {
            "perplexity": perplexity(result.loss),
            "loss_change": change(result.loss, before.get("loss")),
            "bits_per_byte_change": change(result.bits_per_byte, before.get("bits_per_byte")),
        }
    return sets


def perplexity(loss: float | None) -> float:
    """exp(loss), infinite where that is no float any more."""
    if loss is None:
        return math.nan
    return math.exp(loss) if loss < 700 else math.inf


def change(value: float | None, before: float | None) -> float | None:
    """Relative change, None if one of the two is unknown or nothing can be said of it."""
    if not value or not before or not math.isfinite(value) or not math.isfinite(before):
        return None
    return value / before - 1.0


def verdict(bits_per_byte_change: float | None, general: bool) -> str:
    """The change in a word: lower is better."""
    if bits_per_byte_change is None:
        return ""
    if abs(bits_per_byte_change) < UNCHANGED:
        return SAME
    if bits_per_byte_change < 0:
        return GAIN
    return FORGETTING if general else WORSE


def percent(value: float | None) -> str:
    """A relative change, always with its sign."""
    return "" if value is None else f"{100 * value:+.1f} %"


def validation_lines(
    iteration: int, sets: Mapping[str, Mapping[str, Any]], new: frozenset[str], width: int | None = None
) -> list[str]:
    """The table for the terminal, one line per set; the changes are left out at step 0.

    Where it is wider than `width`, columns go that can best be missed.
    """
    rows = sets.values()
    columns = {
        "set": list(sets),
        "language": [row["language"] for row in rows],
        "loss": [f"{row['loss']:.4f}" for row in rows],
        "loss_change": [percent(row["loss_change"]) for row in rows],
        "perplexity": [f"{row['perplexity']:,.2f}" for row in rows],
        "bits/byte": [f"{row['bits_per_byte']:.4f}" for row in rows],
        "bits_per_byte_change": [percent(row["bits_per_byte_change"]) for row in rows],
        "verdict": [verdict(row["bits_per_byte_change"], row["language"] not in new) for row in rows],
    }
    if not iteration:
        columns = {name: texts for name, texts in columns.items() if name not in TITLES}
    lines = aligned(columns)
    for dispensable in ("language", "loss_change", "perplexity"):
        if width is not None and max(map(len, lines)) > width:
            columns = {name: texts for name, texts in columns.items() if name != dispensable}
            lines = aligned(columns)
    return [f"validation at step {iteration:,}" + (", and the change since step 0" if iteration else ""), *lines]


def aligned(columns: Mapping[str, Sequence[str]]) -> list[str]:
    """Header and rows; text to the left, figures to the right."""
    cells = []
    for name, texts in columns.items():
        title = TITLES.get(name, name)
        width = max(map(len, [title, *texts]))
        to_left = name in ("set", "language", "verdict")
        cells.append([text.ljust(width) if to_left else text.rjust(width) for text in [title, *texts]])
    return ["  " + "  ".join(row).rstrip() for row in zip(*cells, strict=True)]
