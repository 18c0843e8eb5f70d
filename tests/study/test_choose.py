"""What is chosen keeps its limit, also where the loss jumps between two pairs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from study_results import START, additional_loss, general_loss, make_results, tilted_metric

from megatron_cpt.study.choose import choose
from megatron_cpt.study.fit import Fit, fit_for_choice
from megatron_cpt.study.results import Results
from megatron_cpt.utils.errors import InputError


@pytest.fixture(scope="module")
def results() -> Results:
    return make_results(tilted_metric)


@pytest.fixture(scope="module")
def fitted(results: Results) -> Fit:
    return fit_for_choice(results, None)


def cliff(almr: float, lr: float, tokens: float) -> float:
    """A general loss that rises little up to ALMR 0.85 and jumps before 1."""
    return 3 + tokens * (0.02 * almr + 0.05 * max(0.0, np.log10(lr) + 3) + 6 / (1 + np.exp(-(almr - 0.95) / 0.03)))


def step(almr: float, lr: float, tokens: float) -> float:
    """One that jumps between two learning rates."""
    return 3 + tokens * (0.01 * almr * (np.log10(lr) + 4) + 1.5 / (1 + np.exp(-(np.log10(lr) + 2.75) / 0.06)))


@pytest.mark.parametrize(("general", "limit"), [(cliff, 0.02), (step, 0.01)])
def test_the_limit_is_kept_beside_a_cliff(general: Callable[[float, float, float], float], limit: float) -> None:
    """Smooth surfaces dip below their neighbours there. Of six choices with 90 % two may break it."""
    rises = []
    for seed in range(6):
        results = make_results(general=general, seed=seed)
        found = choose(results, fit_for_choice(results, "additional"), limit, 0.9, "additional")
        assert found.chance is not None  # by surfaces
        rises.append(general(found.almr, found.lr, 1.0) / 3 - 1)
    assert sum(rise > limit for rise in rises) <= 2
    assert max(rises) < 1.05 * limit
    assert max(rises) > 0.5 * limit  # and not for choosing nothing


def test_a_jump_between_pairs_is_said_to_be_possible() -> None:
    """A loss that jumps after ALMR 0.5 is taken to rise evenly up to 0.75: the choice says which pairs broke the limit."""

    def jump(almr: float, lr: float, tokens: float) -> float:
        return 3 + tokens * (0.12 / (1 + np.exp(-(almr - 0.53) / 0.01)) + 0.0025 * (np.log10(lr) + 4))

    results = make_results(general=jump)
    found = fit_for_choice(results, None)
    choice = choose(results, found, 0.02, 0.9, "additional")
    assert 0.5 < choice.almr < 0.75
    (note,) = (note for note in choice.notes if "broke the limit" in note)
    assert "ALMR 0.75 and learning rate 0.01 (+4." in note
    # Where nothing around has broken it, there is nothing to say
    assert not any("broke the limit" in note for note in choose(results, found, 0.2, 0.9, "additional").notes)


def diverged_at(results: Results, almr: float, lr: float) -> Results:
    """Without the pairs from these values on."""
    gone = {row["run"] for row in results.rows if row["almr"] >= almr and row["lr"] >= lr}
    rows = [row | {"outcome": "diverged", "last": False} if row["run"] in gone else row for row in results.rows]
    return Results(rows, results.scores)


def test_nothing_is_chosen_where_runs_have_diverged() -> None:
    """The metric rises towards them, so that a surface promises most there."""
    whole = make_results(lambda almr, lr: float(30 + 4 * almr + 2 * np.log10(lr)))
    results = diverged_at(whole, 0.75, 3e-3)
    choice = choose(results, fit_for_choice(results, None), max_general_rise=0.5, confidence=0.9, goal=None)
    assert choice.almr < 0.65 or choice.lr < 2e-3
    assert choice.almr_interval is not None
    assert any(note.startswith("4 pairs have diverged or have not finished; places nearest") for note in choice.notes)
    # So with those that have not begun
    rows = [row for row in whole.rows if not (row["almr"] >= 0.75 and row["lr"] >= 3e-3)]
    missing = Results(rows, whole.scores, sorted({(row["almr"], row["lr"]) for row in whole.rows}))
    assert choose(missing, fit_for_choice(missing, None), 0.5, 0.9, None).almr == choice.almr


@pytest.mark.parametrize("seed", range(4))
def test_one_seed_is_not_asked_for_a_probability(seed: int) -> None:
    results = make_results(tilted_metric, seeds=1, seed=seed, noise=0.01)
    choice = choose(results, fit_for_choice(results, "additional"), max_general_rise=0.02, confidence=0.9, goal="additional")
    assert choice.chance is None
    assert choice.almr_interval is None
    assert any("every pair was run with one seed" in note for note in choice.notes)
    assert (choice.almr, choice.lr) in {(row["almr"], row["lr"]) for row in results.rows}


def test_a_pair_with_a_diverged_seed_is_no_measured_choice() -> None:
    results = make_results(tilted_metric, seeds=2, almrs=(0.0, 0.5), rates=(1e-4, 1e-3))
    best = choose(results, fit_for_choice(results, "additional"), 0.5, 0.9, "additional")
    name = f"almr{best.almr:g}_lr{best.lr:g}_seed2"
    rows = [row | {"outcome": "diverged", "last": False} if row["run"] == name else row for row in results.rows]
    other = Results(rows, results.scores)
    again = choose(other, fit_for_choice(other, "additional"), 0.5, 0.9, "additional")
    assert (again.almr, again.lr) != (best.almr, best.lr)


@pytest.mark.parametrize("seed", range(5))
def test_the_choice_is_in_its_intervals(seed: int) -> None:
    results = make_results(tilted_metric, seed=seed, noise=0.01)
    choice = choose(
        results, fit_for_choice(results, "additional"), max_general_rise=0.01, confidence=0.95, goal="additional"
    )
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
    choice = choose(few, fit_for_choice(few, None), max_general_rise=0.02, confidence=0.9, goal=None)
    assert (choice.almr, choice.lr) == (1.0, 1e-4)  # 0.5 and 1.0 at 1e-3 forget 3 and 7 %
    assert choice.almr_interval is None
    assert any("Only measured pairs were compared" in note for note in choice.notes)
    assert any("learning rate is on the border" in note for note in choice.notes)
    with pytest.raises(InputError, match="no run kept the general loss below"):
        choose(few, fit_for_choice(few, None), max_general_rise=-0.2, confidence=0.9, goal=None)
    with pytest.raises(InputError, match="goal is mean_metric, which the runs do not have"):
        choose(few, fit_for_choice(few, "mean_metric"), max_general_rise=0.1, confidence=0.9, goal="mean_metric")


def test_only_places_between_finished_pairs_are_considered() -> None:
    """The best of this metric is where ALMR and learning rate are highest; there nothing was run."""
    whole = make_results(lambda almr, lr: float(30 + 4 * almr + 2 * np.log10(lr)))
    inside = [row for row in whole.rows if row["almr"] + (np.log10(row["lr"]) + 4) / 2 <= 1.01]
    part = Results(inside, whole.scores)
    choice = choose(part, fit_for_choice(part, None), max_general_rise=0.5, confidence=0.9, goal=None)
    assert choice.almr + (np.log10(choice.lr) + 4) / 2 <= 1.02
    assert any(note.startswith("Places that no finished pairs surround, 4") for note in choice.notes)
    # All on one line surround nothing
    line = [
        row
        for row in make_results(
            lambda almr, lr: float(30 + 4 * almr),
            almrs=tuple(np.linspace(0, 1, 9)),
            rates=tuple(np.geomspace(1e-4, 1e-2, 9)),
        ).rows
        if abs(row["almr"] - (np.log10(row["lr"]) + 4) / 2) < 1e-6
    ]
    diagonal = Results(line, whole.scores)
    measured = choose(diagonal, fit_for_choice(diagonal, None), max_general_rise=0.5, confidence=0.9, goal=None)
    assert measured.chance is None
    assert any("surround no place" in note for note in measured.notes)


def test_diverged_pairs_far_away_cost_nothing() -> None:
    results = diverged_at(make_results(tilted_metric), 0.0, 1e-2)
    choice = choose(results, fit_for_choice(results, None), max_general_rise=0.5, confidence=0.9, goal=None)
    assert choice.lr < 3.2e-3
    assert any("none of the places that were considered is nearest" in note for note in choice.notes)
