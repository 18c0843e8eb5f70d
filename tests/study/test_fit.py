"""What a study says as a whole, and what it refuses to say; the choice."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from study_results import START, additional_loss, general_loss, make_results

from megatron_cpt.errors import InputError
from megatron_cpt.study.choose import choose
from megatron_cpt.study.fit import Fit, chance_of_flat, fit, write_fit
from megatron_cpt.study.results import Results


def metric(almr: float, lr: float) -> float:
    """Best at ALMR 0.5 and a learning rate of 1e-3."""
    return float(50 - 8 * (almr - 0.5 - 0.3 * (np.log10(lr) + 3)) ** 2 - 1.5 * (np.log10(lr) + 3) ** 2)


@pytest.fixture(scope="module")
def results() -> Results:
    return make_results(metric)


@pytest.fixture(scope="module")
def fitted(results: Results) -> Fit:
    return fit(results)


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
    flat = fit(make_results(lambda almr, lr: 25.0, metric_noise=0.5), laws=False)
    assert "flat within the noise" in str(flat.surfaces["mean_metric"].refused)
    assert flat.surfaces["additional"].refused is None
    assert any(note.startswith("mean_metric: the surface is flat") for note in flat.notes)


def test_too_few_runs_are_refused() -> None:
    few = fit(make_results(almrs=(0.0, 1.0), rates=(1e-4, 1e-3)), laws=False)
    assert "4 pairs of ALMR and learning rate have finished; 9 or more" in str(few.surfaces["mixed"].refused)
    assert few.frontier is None
    assert any("they need 3 values or more of each axis" in note for note in few.notes)


def test_a_refused_surface_takes_its_lines_with_it() -> None:
    found = fit(make_results(lambda almr, lr: 25.0, metric_noise=0.0), laws=False)  # the same score everywhere
    assert "flat within the noise" in str(found.surfaces["mean_metric"].refused)
    assert found.frontier is not None
    assert found.frontier.refused == found.surfaces["mean_metric"].refused


def test_a_score_that_few_runs_have_does_not_stop_the_rest(results: Results) -> None:
    kept = {"almr0_lr0.0001_seed1", "almr0.5_lr0.001_seed1", "almr1_lr0.01_seed1"}
    rows = [row if row["run"] in kept else row | {"mean_metric": None, "score": None} for row in results.rows]
    found = fit(Results(rows, ["score"]), laws=False)
    assert "mean_metric: 3 of 75 finished runs have it" in found.notes
    assert "mean_metric" not in found.surfaces
    assert found.frontier_of == "balanced"
    assert found.surfaces["general"].refused is None


@pytest.mark.parametrize("value", [None, 0.0])
def test_a_finished_run_with_no_proper_loss(results: Results, value: float | None) -> None:
    name = "almr0.5_lr0.001_seed1"
    lost = {"general": value, "mixed": value, "balanced": value}
    found = fit(Results([row | lost if row["run"] == name and row["last"] else row for row in results.rows], results.scores))
    assert found.surfaces["general"].surface.values.shape == (74 if value is None else 75,)
    if value is None:
        assert f"1 finished runs have no number as a loss and are left out: {name}" in found.notes
    else:
        assert any("a loss is 0; the law is fitted to logarithms" in note for note in found.notes)


def test_places_without_runs_that_are_predicted_badly_are_noted() -> None:
    """A cliff at one corner: without that pair nothing says that it is there."""

    def cliff(almr: float, lr: float, tokens: float) -> float:
        return 3.0 + 0.05 * almr * tokens + (4.0 * tokens if almr == 1 and lr > 5e-3 else 0.0)

    found = fit(make_results(general=cliff), laws=False)
    assert found.surfaces["general"].explained < 0.5
    assert any(note.startswith("general: surfaces without a pair") for note in found.notes)


def test_without_scores_the_frontier_is_that_of_the_balanced_loss() -> None:
    found = fit(make_results(None), laws=False)
    assert found.frontier_of == "balanced"
    assert "mean_metric" not in found.surfaces


def test_diverged_and_unfinished_runs_do_not_count(results: Results, fitted: Fit) -> None:
    bad = [dict(row, outcome="diverged", last=False, additional=99.0, run=row["run"] + "_bad") for row in results.rows[:5]]
    found = fit(Results([*results.rows, *bad], results.scores), laws=False)
    assert found.surfaces["additional"].surface.values.tolist() == fitted.surfaces["additional"].surface.values.tolist()
    assert found.notes[0] == "1 runs diverged and are left out: almr0_lr0.0001_seed1_bad"


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


def diverged_at(results: Results, almr: float, lr: float) -> Results:
    """Without the pairs from these values on."""
    gone = {row["run"] for row in results.rows if row["almr"] >= almr and row["lr"] >= lr}
    rows = [row | {"outcome": "diverged", "last": False} if row["run"] in gone else row for row in results.rows]
    return Results(rows, results.scores)


def test_nothing_is_chosen_where_runs_have_diverged() -> None:
    """The metric rises towards them, so that a surface promises most there."""
    whole = make_results(lambda almr, lr: float(30 + 4 * almr + 2 * np.log10(lr)))
    results = diverged_at(whole, 0.75, 3e-3)
    choice = choose(results, fit(results, laws=False), max_general_rise=0.5, confidence=0.9, goal=None)
    assert choice.almr < 0.65 or choice.lr < 2e-3
    assert choice.almr_interval is not None
    assert any(note.startswith("4 pairs have diverged or have not finished; places nearest") for note in choice.notes)
    # So with those that have not begun
    rows = [row for row in whole.rows if not (row["almr"] >= 0.75 and row["lr"] >= 3e-3)]
    missing = Results(rows, whole.scores, sorted({(row["almr"], row["lr"]) for row in whole.rows}))
    assert choose(missing, fit(missing, laws=False), 0.5, 0.9, None).almr == choice.almr


@pytest.mark.parametrize("seed", range(4))
def test_one_seed_is_not_asked_for_a_probability(seed: int) -> None:
    results = make_results(metric, seeds=1, seed=seed, noise=0.01)
    choice = choose(results, fit(results, laws=False), max_general_rise=0.02, confidence=0.9, goal="additional")
    assert choice.chance is None
    assert choice.almr_interval is None
    assert any("every pair was run with one seed" in note for note in choice.notes)
    assert (choice.almr, choice.lr) in {(row["almr"], row["lr"]) for row in results.rows}


def test_a_pair_with_a_diverged_seed_is_no_measured_choice() -> None:
    results = make_results(metric, seeds=2, almrs=(0.0, 0.5), rates=(1e-4, 1e-3))
    best = choose(results, fit(results, laws=False), 0.5, 0.9, "additional")
    name = f"almr{best.almr:g}_lr{best.lr:g}_seed2"
    rows = [row | {"outcome": "diverged", "last": False} if row["run"] == name else row for row in results.rows]
    other = Results(rows, results.scores)
    again = choose(other, fit(other, laws=False), 0.5, 0.9, "additional")
    assert (again.almr, again.lr) != (best.almr, best.lr)


@pytest.mark.parametrize("seed", range(5))
def test_the_choice_is_in_its_intervals(seed: int) -> None:
    results = make_results(metric, seed=seed, noise=0.01)
    choice = choose(results, fit(results, laws=False), max_general_rise=0.01, confidence=0.95, goal="additional")
    assert choice.almr_interval is not None
    assert choice.lr_interval is not None
    assert choice.almr_interval[0] <= choice.almr <= choice.almr_interval[1]
    assert choice.lr_interval[0] <= choice.lr <= choice.lr_interval[1]
    assert choice.almr_interval[0] < choice.almr_interval[1]


def test_the_choice_keeps_the_limit(results: Results, fitted: Fit) -> None:
    choice = choose(results, fitted, max_general_rise=0.01, confidence=0.9, goal="additional")
    assert general_loss(choice.almr, choice.lr, 1.0) / START["general"] - 1 < 0.0125
    assert choice.chance is not None
    assert choice.chance >= 0.9
    assert "The limit binds" in choice.reason
    # No pair of a fine grid that keeps the limit is much better
    pairs = [(almr, lr) for almr in np.linspace(0, 1, 41) for lr in np.geomspace(1e-4, 1e-2, 41)]
    kept = [pair for pair in pairs if general_loss(*pair, 1.0) <= START["general"] * 1.01]
    assert additional_loss(choice.almr, choice.lr, 1.0) < min(additional_loss(*pair, 1.0) for pair in kept) + 0.1
    assert choice.almr_interval is not None
    assert choice.almr_interval[0] <= choice.almr <= choice.almr_interval[1]


def test_a_limit_that_does_not_bind(results: Results, fitted: Fit) -> None:
    choice = choose(results, fitted, max_general_rise=0.5, confidence=0.9, goal=None)
    assert choice.goal == "mean_metric"
    assert "The limit does not bind" in choice.reason
    assert choice.almr == pytest.approx(0.5, abs=0.08)
    assert np.log10(choice.lr) == pytest.approx(-3, abs=0.2)
    assert choice.almr_interval is not None
    assert choice.lr_interval is not None
    assert choice.almr_interval[0] <= 0.5 <= choice.almr_interval[1]
    assert choice.lr_interval[0] <= 1e-3 <= choice.lr_interval[1]


def test_a_limit_that_nothing_keeps(results: Results, fitted: Fit) -> None:
    with pytest.raises(InputError, match=r"no pair keeps the general loss below 2\.7 .* with a rise of up to"):
        choose(results, fitted, max_general_rise=-0.1, confidence=0.9, goal=None)


def test_few_runs_are_compared_as_they_are() -> None:
    few = make_results(almrs=(0.0, 0.5, 1.0), rates=(1e-4, 1e-3))
    choice = choose(few, fit(few, laws=False), max_general_rise=0.02, confidence=0.9, goal=None)
    assert (choice.almr, choice.lr) == (1.0, 1e-4)  # 0.5 and 1.0 at 1e-3 forget 3 and 7 %
    assert choice.almr_interval is None
    assert any("Only measured pairs were compared" in note for note in choice.notes)
    assert any("learning rate is on the border" in note for note in choice.notes)
    with pytest.raises(InputError, match="no run kept the general loss below"):
        choose(few, fit(few, laws=False), max_general_rise=-0.2, confidence=0.9, goal=None)
    with pytest.raises(InputError, match="goal is mean_metric, which the runs do not have"):
        choose(few, fit(few, laws=False), max_general_rise=0.1, confidence=0.9, goal="mean_metric")
