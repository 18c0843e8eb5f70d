"""Validation figures with what has changed since the set was first measured so: what was gained, what was forgotten."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_cpt.mixture.ledger import Ledger
from megatron_cpt.training.baseline import Baseline, Measurement, find_baseline
from megatron_cpt.training.validation_result import ValidationResult

UNCHANGED = 0.0005  # of bits per byte, relative: what the table would show as 0.0 %
TITLES = {"loss_change": "change", "bits_per_byte_change": "change", "verdict": ""}  # of columns that step 0 does not have
FORGETTING, GAIN, WORSE, SAME = "forgetting", "gain", "worse", "same"


def new_languages(ledger: Ledger) -> frozenset[str]:
    """Languages of additional corpora only; what gets worse in any other is forgotten."""
    general = {row.language for row in ledger.rows if row.group == "general"}
    return frozenset(row.language for row in ledger.rows) - general


def figures(
    results: Sequence[ValidationResult], measured: Sequence[Measurement], baselines: Sequence[Baseline]
) -> dict[str, dict[str, Any]]:
    """{set: its fields, perplexity, loss_change, bits_per_byte_change, baseline, measurement}, as in metrics.jsonl.

    The changes are relative to the set's `baseline`, the first measurement of this kind: -0.1 is 10 % lower. They are 0
    where that is this one.

    Args:
        measured: how each result was measured
        baselines: with those of these results (`baseline.extend_baselines`)
    """
    sets = {}
    for result, how in zip(results, measured, strict=True):
        before = find_baseline(baselines, how)
        assert before is not None, f"no baseline of {how}"
        sets[result.name] = dataclasses.asdict(result) | {
            "perplexity": perplexity(result.loss),
            "loss_change": change(result.loss, before.loss),
            "bits_per_byte_change": change(result.bits_per_byte, before.bits_per_byte),
            "baseline": {"iteration": before.iteration, "loss": before.loss, "bits_per_byte": before.bits_per_byte},
            "measurement": dataclasses.asdict(how),
        }
    return sets


def baseline_of(evaluations: Sequence[Mapping[str, Any]], name: str) -> dict[str, Any] | None:
    """iteration, loss and bits_per_byte that a set's last evaluation is compared with; None: nothing is known.

    Rows of older runs do not say: then the first evaluation is, if it counted as many tokens and bytes.
    """
    now = evaluations[-1]["validation"][name]
    if "baseline" in now:
        return dict(now["baseline"])
    first = evaluations[0]["validation"].get(name)
    if first is None or any(first.get(count) != now.get(count) for count in ("tokens", "text_bytes")):
        return None
    return {"iteration": evaluations[0]["iteration"]} | {key: first[key] for key in ("loss", "bits_per_byte")}


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
    """The table for the terminal, one line per set; the changes are left out where all baselines are this evaluation.

    Where it is wider than `width`, columns go that can best be missed.
    """
    rows = sets.values()
    since = [row["baseline"]["iteration"] for row in rows]
    columns = {
        "set": list(sets),
        "language": [row["language"] for row in rows],
        "loss": [f"{row['loss']:.4f}" for row in rows],
        "loss_change": [changed_since(row, row["loss_change"], iteration) for row in rows],
        "perplexity": [f"{row['perplexity']:,.2f}" for row in rows],
        "bits/byte": [f"{row['bits_per_byte']:.4f}" for row in rows],
        "bits_per_byte_change": [changed_since(row, row["bits_per_byte_change"], iteration) for row in rows],
        "since step": [f"{step:,}" for step in since],
        "verdict": [
            ""
            if row["baseline"]["iteration"] == iteration
            else verdict(row["bits_per_byte_change"], row["language"] not in new)
            for row in rows
        ],
    }
    if len(set(since)) == 1:  # the title says it
        columns.pop("since step")
    if set(since) == {iteration}:
        columns = {name: texts for name, texts in columns.items() if name not in TITLES}
    lines = aligned(columns)
    for dispensable in ("language", "loss_change", "perplexity"):
        if width is not None and max(map(len, lines)) > width:
            columns = {name: texts for name, texts in columns.items() if name != dispensable}
            lines = aligned(columns)
    return [f"validation at step {iteration:,}{compared(since, iteration)}", *lines]


def compared(since: Sequence[int], iteration: int) -> str:
    """With what the figures of step `iteration` are, whose baselines are of these steps."""
    if set(since) == {iteration}:
        return ""
    return f", and the change since step {since[0]:,}" if len(set(since)) == 1 else ", and the change"


def changed_since(row: Mapping[str, Any], value: float | None, iteration: int) -> str:
    """A change in per cent; nothing where the baseline is this evaluation."""
    return "" if row["baseline"]["iteration"] == iteration else percent(value)


def aligned(columns: Mapping[str, Sequence[str]]) -> list[str]:
    """Header and rows; text to the left, figures to the right."""
    cells = []
    for name, texts in columns.items():
        title = TITLES.get(name, name)
        width = max(map(len, [title, *texts]))
        to_left = name in ("set", "language", "verdict")
        cells.append([text.ljust(width) if to_left else text.rjust(width) for text in [title, *texts]])
    return ["  " + "  ".join(row).rstrip() for row in zip(*cells, strict=True)]
