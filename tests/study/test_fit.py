"""What a study says as a whole, and what it refuses to say."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from study_results import make_results, tilted_metric

from megatron_cpt.study import frontier
from megatron_cpt.study.commands import fit_table
from megatron_cpt.study.fit import Fit, chance_of_flat, fit_study, write_fit
from megatron_cpt.study.html_report import surfaces_table
from megatron_cpt.study.results import Results


@pytest.fixture(scope="module", autouse=True)
def fewer_draws() -> Iterator[None]:
    """Intervals of lines from 60 surfaces, not 300: nothing here is about their width (tests/study/test_frontier.py is)."""
    with pytest.MonkeyPatch.context() as patch:
        for line in ("loss_line", "metric_frontier"):
            patch.setattr(f"megatron_cpt.study.fit.{line}", partial(getattr(frontier, line), replicates=60))
        yield


@pytest.fixture(scope="module")
def results() -> Results:
    return make_results(tilted_metric)


@pytest.fixture(scope="module")
def fitted(results: Results) -> Fit:
    return fit_study(results)


def test_a_good_study_supports_everything(fitted: Fit, tmp_path: Path) -> None:
    assert set(fitted.surfaces) == {"general", "additional", "mixed", "balanced", "mean_metric"}
    assert all(found.refused is None and found.explained > 0.9 for found in fitted.surfaces.values())
    assert fitted.frontier is not None
    assert fitted.frontier_of == "mean_metric"
    assert fitted.frontier.refused is None
    assert fitted.frontier.b == pytest.approx(0.3, abs=0.05)
    assert fitted.line is not None
    assert fitted.line.refused is None
    written = json.loads(Path(write_fit(str(tmp_path), fitted)).read_text())
    assert written["frontier"]["of"] == "mean_metric"
    assert written["surfaces"]["general"]["runs"] == 75
    assert [law["of"] for law in written["d_cpt"]] == ["additional"] * 5  # at 5 learning rates
    assert all(law["held_out_error"] < 0.1 for law in written["d_cpt"])  # these losses follow no such law
    rising = [note for note in fitted.notes if note.startswith("D-CPT law of general at learning rate")]
    assert sum(note.split(":")[0].count(", ") + 1 for note in rising) == 5
    assert all("50% is wanted: it can only fall with them" in note for note in rising)


def test_a_flat_metric_is_refused() -> None:
    flat = fit_study(make_results(lambda almr, lr: 25.0, metric_noise=0.5), laws=False)
    assert "flat within the noise" in str(flat.surfaces["mean_metric"].refused)
    assert flat.surfaces["additional"].refused is None
    assert any(note.startswith("mean_metric: the surface is flat") for note in flat.notes)


def test_noise_between_seeds_needs_second_seeds(fitted: Fit, tmp_path: Path) -> None:
    """On screen, in the report and in fit.json, as the note says: one seed tells nothing of it."""
    one = fit_study(make_results(seeds=1), laws=False)
    for found, known in ((one, False), (fitted, True)):
        written = json.loads(Path(write_fit(str(tmp_path), found)).read_text())
        cells = [
            list(map(str, fit_table(found).columns[2].cells)),
            re.findall(r"<tr><td>\w+</td><td>\d+</td><td>(.*?)<", surfaces_table(found)),
        ]
        for name, *shown in zip(found.surfaces, *cells, strict=True):
            assert all((text != "-") == known for text in shown), (name, shown)
            assert (written["surfaces"][name]["seed_noise"] is not None) == known


def test_too_few_runs_are_refused() -> None:
    few = fit_study(make_results(almrs=(0.0, 1.0), rates=(1e-4, 1e-3)), laws=False)
    assert "4 pairs of ALMR and learning rate have finished; 9 or more" in str(few.surfaces["mixed"].refused)
    assert few.frontier is None
    assert any("they need 3 values or more of each axis" in note for note in few.notes)


def test_a_refused_surface_takes_its_lines_with_it() -> None:
    found = fit_study(make_results(lambda almr, lr: 25.0, metric_noise=0.0), laws=False)  # the same score everywhere
    assert "flat within the noise" in str(found.surfaces["mean_metric"].refused)
    assert found.frontier is not None
    assert found.frontier.refused == found.surfaces["mean_metric"].refused


def test_a_score_that_few_runs_have_does_not_stop_the_rest(results: Results) -> None:
    kept = {"almr0_lr0.0001_seed1", "almr0.5_lr0.001_seed1", "almr1_lr0.01_seed1"}
    rows = [row if row["run"] in kept else row | {"mean_metric": None, "score": None} for row in results.rows]
    found = fit_study(Results(rows, ["score"]), laws=False)
    assert "mean_metric: 3 of 75 finished runs have it" in found.notes
    assert "mean_metric" not in found.surfaces
    assert found.frontier_of == "balanced"
    assert found.surfaces["general"].refused is None


@pytest.mark.parametrize("value", [None, 0.0])
def test_a_finished_run_with_no_proper_loss(value: float | None) -> None:
    results = make_results(rates=(1e-4, 1e-3, 1e-2), seeds=1)
    name = "almr0.5_lr0.001_seed1"
    lost = {"general": value, "mixed": value, "balanced": value}
    found = fit_study(
        Results([row | lost if row["run"] == name and row["last"] else row for row in results.rows], results.scores)
    )
    assert found.surfaces["general"].surface.values.shape == (14 if value is None else 15,)
    if value is None:
        assert f"1 finished run without a number as a loss and left out: {name}" in found.notes
    else:
        assert any("a loss is 0; the law is fitted to logarithms" in note for note in found.notes)


def test_places_without_runs_that_are_predicted_badly_are_noted() -> None:
    """A cliff at one corner: without that pair nothing says that it is there."""

    def cliff(almr: float, lr: float, tokens: float) -> float:
        return 3.0 + 0.05 * almr * tokens + (4.0 * tokens if almr == 1 and lr > 5e-3 else 0.0)

    found = fit_study(make_results(general=cliff), laws=False)
    assert found.surfaces["general"].explained < 0.5
    assert any(note.startswith("general: surfaces without a pair") for note in found.notes)


def test_without_scores_the_frontier_is_that_of_the_balanced_loss() -> None:
    found = fit_study(make_results(None), laws=False)
    assert found.frontier_of == "balanced"
    assert "mean_metric" not in found.surfaces


def test_diverged_and_unfinished_runs_do_not_count(results: Results, fitted: Fit) -> None:
    bad = [dict(row, outcome="diverged", last=False, additional=99.0, run=row["run"] + "_bad") for row in results.rows[:5]]
    found = fit_study(Results([*results.rows, *bad], results.scores), laws=False)
    assert found.surfaces["additional"].surface.values.tolist() == fitted.surfaces["additional"].surface.values.tolist()
    assert found.notes[0] == "1 run diverged and left out: almr0_lr0.0001_seed1_bad"


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_test_for_flatness_errs_as_seldom_as_it_says(seeds: int) -> None:
    """p below 0.05 in 5 % of flat surfaces, nearly always on one with a slope of twice the noise."""
    random = np.random.default_rng(0)
    points = np.stack([part.ravel() for part in np.meshgrid(np.linspace(0, 1, 5), np.linspace(0, 1, 5))], axis=1)
    points = points.repeat(seeds, axis=0)
    flat = [chance_of_flat(points, random.standard_normal(len(points))) for _ in range(400)]
    assert 0.02 < np.mean([p < 0.05 for p in flat]) < 0.09
    sloped = [chance_of_flat(points, 4 * points[:, 0] + random.standard_normal(len(points))) for _ in range(100)]
    assert np.mean([p < 0.01 for p in sloped]) > 0.95


@pytest.mark.parametrize("repeated", [1, 2])
def test_a_slope_is_seen_with_hardly_any_second_seed(repeated: int) -> None:
    """Two runs say nothing about noise; the F test is then that of a quadratic surface."""
    random = np.random.default_rng(1)
    points = np.stack([part.ravel() for part in np.meshgrid(np.linspace(0, 1, 5), np.linspace(0, 1, 5))], axis=1)
    points = np.concatenate([points, points[:repeated]])
    sloped = [chance_of_flat(points, 4 * points[:, 0] + random.standard_normal(len(points))) for _ in range(100)]
    assert np.mean([p < 0.01 for p in sloped]) > 0.95
