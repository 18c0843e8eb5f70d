"""Figures show what was measured, where it belongs."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_cpt.evaluation import figures
from megatron_cpt.evaluation.trajectory import TrajectoryPoint

LOST = {"value": None, "stderr": None, "samples": 0, "missing": "its data cannot be had"}


def measured(score: float, bits: float, share: float) -> dict[str, Any]:
    return {
        "benchmarks": {"C-Eval": {"value": score, "stderr": 0.02, "samples": 9, "missing": None}, "Lost": LOST},
        "text": {"en": {"bits_per_byte": 1.0}, "zh": {"bits_per_byte": bits}},
        "answers": {"zh": {"script": share, "identified": None}},
    }


MODELS = {"base": measured(0.3, 2.0, 0.4), "CPT": measured(0.4, 1.5, 0.9), "SFT": {"text": {"zh": {"bits_per_byte": 1.6}}}}


def heights(ax: Any, model: str) -> list[float]:
    bars = next(container for container in ax.containers if container.get_label() == model)
    return [bar.get_height() for bar in bars]


def test_scores_have_their_errors_and_leave_out_what_is_missing() -> None:
    figure = figures.scores(MODELS)
    assert figure is not None
    (ax,) = figure.axes
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["C-Eval"]
    assert heights(ax, "CPT") == [pytest.approx(40)]
    segments = ax.collections[1].get_segments()[0]
    assert [point[1] for point in segments] == pytest.approx([38, 42])
    assert figures.scores({"SFT": MODELS["SFT"]}) is None


def test_languages() -> None:
    figure = figures.draw_languages(MODELS)
    assert figure is not None
    bits, shares = figure.axes
    assert [tick.get_text() for tick in bits.get_xticklabels()] == ["en", "zh"]
    assert heights(bits, "CPT") == [1.0, 1.5]
    assert heights(shares, "base") == [pytest.approx(40)]
    assert [tick.get_text() for tick in shares.get_xticklabels()] == ["%zh\nby script"]
    assert figures.draw_languages({"x": {"benchmarks": {"Lost": LOST}}}) is None


def test_trajectories_have_a_panel_for_each_measurement() -> None:
    points = [TrajectoryPoint(iteration, 100 * iteration, measured(iteration / 10, 2.0, 0.5)) for iteration in (0, 2, 5)]
    axes = [ax for ax in figures.trajectory(points).axes if ax.axison]
    assert [ax.get_title() for ax in axes] == ["C-Eval", "bits per byte, en", "bits per byte, zh", "%zh"]
    line = axes[0].lines[0]
    assert line.get_xdata().tolist() == [0, 200, 500]
    assert line.get_ydata().tolist() == pytest.approx([0, 20, 50])
    assert axes[0].get_xlabel() == "tokens"
    unknown = [*points, TrajectoryPoint(7, None, measured(0.2, 2.0, 0.5))]
    ax = figures.trajectory(unknown).axes[0]
    assert ax.get_xlabel() == "iteration"
    assert ax.lines[0].get_xdata().tolist() == [0, 2, 5, 7]
