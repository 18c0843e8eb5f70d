"""When a run has diverged, whenever one looks."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_cpt.study.run_status import divergence


def rows(losses: list[float | None], skipped: str | None = None) -> list[dict[str, Any]]:
    """Of metrics.jsonl."""
    return [{"iteration": i, "loss": loss, "skipped": skipped} for i, loss in enumerate(losses, 1)]


def test_a_loss_that_runs_away() -> None:
    losses: list[float | None] = [4.0] * 11 + [40.0] * 3
    assert divergence(rows(losses), 1.5, 10) == "mean loss of 10 steps 7.6 at step 12, at step 1 4"
    assert divergence(rows(losses + [4.0] * 50), 1.5, 10) == divergence(rows(losses), 1.5, 10)  # looked at later
    assert divergence(rows([4.0] * 5 + [7.0] + [4.0] * 50), 1.5, 10) is None  # a spike


@pytest.mark.parametrize("steps", [2, 4, 10])
def test_short_runs_diverge_too(steps: int) -> None:
    losses: list[float | None] = [4.0] + [50.0] * (steps - 1)
    assert divergence(rows(losses), 1.5, 10, steps) is not None
    assert divergence(rows([4.0] * steps), 1.5, 10, steps) is None
    assert divergence(rows(losses), 1.5, 10, None) is None  # its length is not known: it may be a long one


def test_steps_that_are_skipped() -> None:
    bad = rows([None] * 6, "loss is nan")
    assert divergence(bad, 1.5, 6) is None
    assert divergence(bad, 1.5, 5) == "6 steps in a row were skipped up to step 6: loss is nan"
    assert divergence(bad + rows([4.0] * 9), 1.5, 5) is not None  # it went on: still


def test_a_validation_loss_that_is_no_number() -> None:
    found = [*rows([4.0] * 12), {"iteration": 12, "validation": {"zh": {"loss": None}}}]
    assert divergence(found, 1.5, 10) == "the validation loss of zh at step 12 is no number"
