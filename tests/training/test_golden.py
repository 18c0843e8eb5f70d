"""Training computes what it did when golden.json was written. See golden.py for how to replace it, and why to look twice."""

from __future__ import annotations

import json

from golden import PATH, TOLERANCE, compute, differences


def test_losses_are_the_golden_ones() -> None:
    golden = json.loads(PATH.read_text(encoding="utf-8"))
    found = compute()
    changed = differences(golden, found, TOLERANCE)
    in_inputs = [line for line in changed if line.startswith("inputs:")]
    assert not changed, "\n".join(
        [
            "the inputs themselves differ:" if in_inputs else "training computes something else; if that is meant:",
            "  python tests/training/golden.py --write",
            *changed,
        ]
    )


def test_a_difference_shows() -> None:
    old = {"run": {"step 1 loss": 2.0, "step 1 tokens": 3}}
    assert differences(old, {"run": {"step 1 loss": 2.0 * (1 + TOLERANCE / 2), "step 1 tokens": 3}}, TOLERANCE) == []
    (line,) = differences(old, {"run": {"step 1 loss": 2.002, "step 1 tokens": 3}}, TOLERANCE)
    assert line == "run: step 1 loss: 2.0 -> 2.002 (1.00e-03)"
    assert differences(old, {"run": {"step 1 loss": 2.0}}, TOLERANCE) == ["run: step 1 tokens: 3 -> None (inf)"]
