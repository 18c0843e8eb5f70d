"""Parameters of mixture laws are found again from noisy losses."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_cpt.study.critical import CriticalRatio, predict_critical_ratios
from megatron_cpt.study.laws import critical_ratio, fit_cmr, fit_d_cpt, held_out, predict, slopes
from megatron_cpt.study.results import Results
from megatron_cpt.utils.errors import InputError

TRUE = np.array([2.0, 0.35, 0.4, 0.3, 0.25, 0.05, 0.6])  # E, B, eta, beta, C, epsilon, gamma
# 5 ratios, 16 evaluations, 3 seeds
TOKENS, RATIOS = (x.ravel().repeat(3) for x in np.meshgrid(np.linspace(0.25, 4, 16) * 1e6, [0.0, 0.25, 0.5, 0.75, 1.0]))


def test_d_cpt_parameters_without_noise() -> None:
    law = fit_d_cpt(TOKENS, RATIOS, predict(TRUE, TOKENS, RATIOS))
    found = [law.E, law.B, law.eta, law.beta, law.C, law.epsilon, law.gamma]
    assert found == pytest.approx(TRUE.tolist(), rel=0.01)


@pytest.mark.parametrize(
    ("noise", "within"), [(0.001, (0.03, 0.05, 0.05, 0.05, 0.15, 0.15, 0.15)), (0.003, (0.1, *[0.15] * 3, *[0.4] * 3))]
)
@pytest.mark.parametrize("seed", range(8))
def test_d_cpt_parameters_with_noise(noise: float, within: tuple[float, ...], seed: int) -> None:
    """C, epsilon and gamma trade places, so they are found less exactly than E, B, eta and beta; the losses are."""
    losses = predict(TRUE, TOKENS, RATIOS)
    law = fit_d_cpt(TOKENS, RATIOS, losses * (1 + noise * np.random.default_rng(seed).standard_normal(len(TOKENS))))
    found = np.array([law.E, law.B, law.eta, law.beta, law.C, law.epsilon, law.gamma])
    assert (np.abs(found / TRUE - 1) < within).all(), found / TRUE
    assert np.abs(law.loss(TOKENS, RATIOS) / losses - 1).max() < noise


@given(st.lists(st.floats(-3, 1), min_size=7, max_size=7))
def test_slopes_are_the_derivatives(logarithms: list[float]) -> None:
    at, step = np.array(logarithms), 1e-5
    found = slopes(np.exp(at), TOKENS, RATIOS)[1]
    for i in range(7):
        move = step * np.eye(7)[i]
        wanted = (predict(np.exp(at + move), TOKENS, RATIOS) - predict(np.exp(at - move), TOKENS, RATIOS)) / (2 * step)
        assert found[i] == pytest.approx(wanted, rel=1e-4, abs=1e-6)


def test_left_out_ratios_are_predicted_and_other_laws_are_not() -> None:
    noise = 1 + 0.001 * np.random.default_rng(0).standard_normal(len(TOKENS))
    found = held_out(TOKENS, RATIOS, predict(TRUE, TOKENS, RATIOS) * noise)
    assert found.error < 0.005
    assert found.explained > 0.9
    assert found.nats == pytest.approx(found.error * predict(TRUE, TOKENS, RATIOS).mean(), rel=0.3)
    waves = 3 + np.sin(12 * RATIOS) * TOKENS / 4e6  # no such law
    found = held_out(TOKENS, RATIOS, waves)
    assert found.error > 0.05
    assert found.explained < 0.5


def test_too_few_points_for_d_cpt() -> None:
    with pytest.raises(InputError, match="7 parameters: 2 ratios are too few, 4 are needed"):
        fit_d_cpt(np.arange(16.0) + 1, np.tile([0.2, 0.8], 8), np.ones(16))


def test_the_critical_ratio_is_between_the_runs() -> None:
    ratio, losses = np.array([1.0, 0.0, 0.5]), np.array([3.4, 2.9, 3.0])
    assert critical_ratio(ratio, losses, 3.1) == pytest.approx(0.5 + 0.5 * 0.1 / 0.4)
    assert critical_ratio(ratio, losses, 2.8) is None  # no share
    assert critical_ratio(ratio, losses, 3.5) is None  # every share


@pytest.mark.parametrize("seed", range(4))
def test_a_known_critical_ratio_law(seed: int) -> None:
    """R = 0.9 - 0.3 T^0.5: losses that cross the tolerance there, with 0.05 % of noise, give it back within 0.03."""
    tokens, ratio = (part.ravel() for part in np.meshgrid(np.linspace(0.25, 4, 12) * 1e6, np.linspace(0, 1, 9)))
    true = 0.9 - 0.3 * (tokens / 1e6) ** 0.5
    losses = 3.0 * (1.01 + 0.05 * (ratio - true))
    losses = losses * (1 + 0.0005 * np.random.default_rng(seed).standard_normal(len(losses)))
    law = fit_cmr(tokens, ratio, losses, start=3.0, tolerance=0.01)
    for budget in (0.5e6, 2e6, 4e6):
        assert law.ratio(budget) == pytest.approx(0.9 - 0.3 * (budget / 1e6) ** 0.5, abs=0.03)
    assert law.error < 0.05


def test_a_tolerance_that_nothing_reaches() -> None:
    losses = np.full(len(TOKENS), 3.0)
    with pytest.raises(InputError, match=r"0 of 16 budgets have a critical mixture ratio .* 1\.0%; 4 are needed"):
        fit_cmr(TOKENS, RATIOS, losses, start=3.0, tolerance=0.01)


def study_of_a_known_law(seeds: int = 3, seed: int = 0) -> Results:
    """Runs whose losses cross 1 % at R = 0.9 - 0.3 T^0.5, up to 4 million tokens, each with an offset."""
    random, rows = np.random.default_rng(seed), []
    for number in range(seeds):
        for almr in np.linspace(0, 1, 5):
            of_run = 0.0005 * random.standard_normal()
            for step, tokens in enumerate(np.linspace(0, 4e6, 13)):
                loss = 3.0 * (1.01 + 0.05 * (almr - 0.9 + 0.3 * (tokens / 1e6) ** 0.5))
                loss *= 1 + of_run + 0.0002 * random.standard_normal()
                row = {"run": f"{almr}_{number}", "almr": almr, "lr": 1e-3, "seed": number, "outcome": "finished"}
                losses = {"general": loss if step else 3.0, "mixed": loss}
                rows.append(row | {"iteration": step, "tokens": round(tokens), "last": step == 12} | losses)
    return Results(rows, [])


def predicted(results: Results, tokens: int) -> CriticalRatio:
    here = [row for row in results.rows if row["iteration"]]
    columns = (np.array([row[name] for row in here], dtype=np.float64) for name in ("tokens", "almr", "general"))
    law = fit_cmr(*columns, start=3.0, tolerance=0.01)
    (found,) = predict_critical_ratios(results, {1e-3: law}, 0.01, tokens, replicates=30)
    return found


@pytest.mark.parametrize("seed", range(2))
def test_a_budget_has_a_critical_ratio_with_an_interval(seed: int) -> None:
    found = predicted(study_of_a_known_law(seed=seed), 2_000_000)
    true = 0.9 - 0.3 * 2**0.5
    assert found.ratio == pytest.approx(true, abs=0.02)
    assert found.interval is not None
    assert found.interval[0] - 0.01 < true < found.interval[1] + 0.01
    assert found.interval[0] < found.ratio < found.interval[1]
    assert found.notes == []


def test_a_budget_beyond_the_runs_says_how_far_it_is() -> None:
    results = study_of_a_known_law()
    inside, beyond = predicted(results, 4_000_000), predicted(results, 8_000_000)
    assert beyond.notes == ["extrapolated: 2 times the most tokens measured, 4,000,000"]
    assert beyond.interval is not None
    assert inside.interval is not None
    assert np.ptp(beyond.interval) > 2 * np.ptp(inside.interval)
    assert beyond.ratio == pytest.approx(0.9 - 0.3 * 8**0.5, abs=0.05)
    (below,) = predicted(results, 100_000).notes
    assert below == "extrapolated: 3.33 times below the fewest tokens that have a critical ratio, 333,333"
    assert any(note.startswith("on the border of the studied ALMRs, 0 to 1") for note in predicted(results, 10**9).notes)


def test_one_seed_gives_no_interval_of_a_critical_ratio() -> None:
    found = predicted(study_of_a_known_law(seeds=1), 2_000_000)
    assert found.interval is None
    assert found.notes == ["no interval: too few seeds to say how far runs differ"]
