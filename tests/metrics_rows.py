"""What a run's folder says of it, for tests that compare runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny_models import read_rows

EXACT = ("iteration", "consumed_samples", "loss", "grad_norm", "lr", "skipped", "corpus_tokens", "validation")


def clockless(folder: Path) -> list[dict[str, Any]]:
    """Every step and every evaluation in order, without what depends on the clock."""
    rows = [row for row in read_rows(folder) if "loss" in row or row.get("validation")]
    return [{key: row[key] for key in EXACT if key in row} for row in rows]


def steps_taken(folder: Path) -> int:
    """Rows of steps (not of evaluations) so far, in a file that may be written at this moment."""
    metrics = folder / "metrics.jsonl"
    return metrics.read_text().count('"grad_norm": ') if metrics.exists() else 0


def newest(folder: Path) -> int | None:
    """The step of the newest checkpoint."""
    tracker = folder / "latest_checkpointed_iteration.txt"
    return int(tracker.read_text()) if tracker.exists() else None
