"""What the figures show, and what they say is not there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.contour import ContourSet
from study_results import make_results

from megatron_cpt.study.figures import contours, draw_almr_line, draw_language_losses, ends_within, plt, spread_evenly
from megatron_cpt.study.fit import fit_study, grouped_notes
from megatron_cpt.study.frontier import Line, no_line
from megatron_cpt.study.html_report import write_html_report

LIMITS = ((1e-4, 1e-2), (0.0, 1.0))


def make_line(b: float, angle: float, refused: str | None = None) -> Line:
    """Through ALMR 0.5 and a learning rate of 1e-3; its points cover all ALMRs, but few learning rates."""
    shares = np.linspace(0, 1, 11)
    points = np.stack([shares, 10 ** (-3 + 0.02 * np.sin(shares))], axis=-1)
    return Line(0.5 + 3 * b, b, angle, (0, 1), (0, 1), (0, 1), points, refused)


def test_few_pairs_are_points_and_no_contours() -> None:
    """With their values; nine pairs have contours."""
    results = make_results(seeds=2, almrs=(0.2, 0.6), rates=(1e-4, 1e-3))
    found = fit_study(results, laws=False)
    figure = draw_language_losses(results, found, None)
    for name, ax in zip(("general", "additional"), figure.axes, strict=False):
        assert not any(isinstance(drawn, ContourSet) for drawn in ax.collections)
        (points,) = ax.collections
        assert len(points.get_offsets()) == 4  # type: ignore[arg-type]
        last = results.last(name)
        values = [row[name] for row in last if (row["lr"], row["almr"]) == (1e-4, 0.2)]
        assert f"{np.mean(values):.4g}" in [text.get_text() for text in ax.texts]
    plt.close(figure)
    results = make_results(seeds=1, rates=(1e-4, 3.162e-4, 1e-3), almrs=(0.0, 0.5, 1.0))
    figure = draw_language_losses(results, fit_study(results, laws=False), None)
    assert any(isinstance(drawn, ContourSet) for drawn in figure.axes[0].collections)
    plt.close(figure)


def test_notes_are_given_once(tmp_path: Path) -> None:
    """Those of the choice are among those of the fit; one that holds for several surfaces has their names."""
    results = make_results(seeds=1, almrs=(0.2, 0.6), rates=(1e-4, 1e-3))
    found = fit_study(results, laws=False)
    few = "4 pairs of ALMR and learning rate have finished"
    (note,) = (note for note in grouped_notes(found.notes) if few in note)
    assert note.startswith("general, additional, mixed, balanced: 4 pairs")
    assert grouped_notes(["x: y", "loss line: no", "x: y", "loss line: no", "frontier of balanced: no"]) == [
        "x: y",
        "loss line, frontier of balanced: no",
    ]
    choice = {"almr": 0.2, "lr": 1e-3, "almr_interval": None, "lr_interval": None, "reason": "why", "notes": found.notes[:2]}
    page = Path(write_html_report(str(tmp_path), "title", results, found, choice, [])).read_text()
    assert page.count(few) == 1
    assert page.count(found.notes[0]) == 1
    assert "why" in page


def test_the_last_budget_is_shown() -> None:
    assert spread_evenly(list(range(1, 9)), 5) == [1, 3, 5, 6, 8]
    assert spread_evenly([1, 2], 5) == [1, 2]


def test_a_steep_line_goes_as_far_as_its_points() -> None:
    """From ALMR 0 to 1, though its learning rates there are beyond those of the curve it was fitted to."""
    rates, shares = ends_within(make_line(-5.0, -85.0), LIMITS)
    assert sorted(shares) == pytest.approx([0.0, 1.0])
    assert sorted(np.log10(rates)) == pytest.approx([-3.1, -2.9])
    rates, _ = ends_within(make_line(0.1, 5.0), LIMITS)
    assert rates.max() / rates.min() < 1.1


def test_a_line_that_is_not_supported_says_so() -> None:
    for line, wanted in (
        (no_line("flat"), "no frontier: see the notes"),
        (make_line(-5.0, -85.0, "few"), "(not supported: see the notes)"),
    ):
        figure, ax = plt.subplots()
        ax.set_xscale("log")
        ax.set_xlim(LIMITS[0])
        draw_almr_line(ax, line, "frontier", "red")
        assert wanted in ax.get_legend_handles_labels()[1][0]
        plt.close(figure)


def test_legends_and_labels_of_a_narrow_range() -> None:
    results = make_results(seeds=1, rates=(1e-4, 3.162e-4, 1e-3))
    found = fit_study(results, laws=False)
    for figure in (draw_language_losses(results, found, None), contours(results, found, (0.5, 1e-3))):
        axes = [ax for ax in figure.axes if ax.get_xlabel() == "learning rate"]
        assert len(axes) == 2
        figure.canvas.draw()
        for ax in axes:
            legend = ax.get_legend()
            assert legend is not None
            assert legend.get_texts()[0].get_text() == "runs"
            labels = [label.get_text() for label in ax.get_xticklabels() if 1e-4 <= label.get_position()[0] <= 1.001e-3]
            assert labels == ["0.0001", "0.0002", "0.0005", "0.001"]
        plt.close(figure)
