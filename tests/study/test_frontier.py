"""Lines through known surfaces are found again; where there is no line, that is said."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from study_results import ALMRS, RATES

from megatron_cpt.study.frontier import FIELD, gradients, interpolated, loss_line, metric_frontier, steepest_curve
from megatron_cpt.study.settings import Axis
from megatron_cpt.study.surfaces import Surface, fit_surface, unit_grid
from megatron_cpt.utils.errors import InputError

A, B = 1.4, 0.3  # ALMR 0.2 at a learning rate of 1e-4, 0.8 at 1e-2


def ridge(almr: np.ndarray, lr: np.ndarray) -> np.ndarray:
    """Highest along ALMR = A + B log10 LR, whichever axis one looks along at the middle of it."""
    log_lr = np.log10(lr)
    return 50 - 8 * (almr - A - B * log_lr) ** 2 - 0.1 * (log_lr + 3) ** 2


def sampled(function, noise: float, seed: int, seeds: int = 3) -> Surface:
    random = np.random.default_rng(seed)
    almr, lr = (part.ravel().repeat(seeds) for part in np.meshgrid(ALMRS, RATES))
    return fit_surface(almr, lr, function(almr, lr) + noise * random.standard_normal(len(almr)), loss=False)


@pytest.mark.parametrize("seed", range(8))
def test_a_known_frontier_is_found_from_noisy_runs(seed: int) -> None:
    """Within 0.1 and 0.04 with noise of 0.15 on heights that differ by 3; the true line is mostly in the intervals."""
    line = metric_frontier(sampled(ridge, 0.15, seed), replicates=100)
    assert line.refused is None
    assert abs(line.a - A) < 0.1
    assert abs(line.b - B) < 0.04
    width = line.a_interval[1] - line.a_interval[0]
    assert 0.05 < width < 0.3


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    """90 % intervals: on 30 sets of runs at least 24 hold a, a chance of 2 % to fail if they are right."""
    held = 0
    for seed in range(30):
        line = metric_frontier(sampled(ridge, 0.15, seed), replicates=80)
        held += line.a_interval[0] <= A <= line.a_interval[1]
    assert held >= 24


def lopsided(almr: np.ndarray, lr: np.ndarray) -> np.ndarray:
    """Four times as steep above ALMR = 0.4 - 0.1 log10 LR as below."""
    past = almr - 0.4 + 0.1 * np.log10(lr)
    return 50 - np.where(past < 0, 5, 20) * past**2


def narrow(almr: np.ndarray, lr: np.ndarray) -> np.ndarray:
    """A bell about ALMR = 0.14 - 0.12 log10 LR, narrower than the ALMRs are apart."""
    return 50 + 5 * np.exp(-(((almr - 0.14 + 0.12 * np.log10(lr)) / 0.2) ** 2))


@pytest.mark.parametrize(("metric", "a", "b"), [(lopsided, 0.4, -0.1), (narrow, 0.14, -0.12)])
def test_intervals_hold_what_is_unknown_between_the_ratios(
    metric: Callable[[np.ndarray, np.ndarray], np.ndarray], a: float, b: float
) -> None:
    """Where five ALMRs are too few for the ridge, its line is off by more than the noise, and the interval says so."""
    held = 0
    for seed in range(6):
        line = metric_frontier(sampled(metric, 0.15, seed), replicates=80)
        assert line.refused is None
        held += line.a_interval[0] <= a <= line.a_interval[1] and line.b_interval[0] <= b <= line.b_interval[1]
    assert held >= 5


def test_along_the_other_axis() -> None:
    """Peaks over the learning rate at each ALMR: a steeper line, as peaks along another direction are other points."""
    line = metric_frontier(sampled(ridge, 0.02, 0), axis="lr", replicates=50)
    assert line.refused is None
    # d/dlog_lr of the ridge is zero where 16 B (almr - A - B x) = 0.2 (x + 3)
    slope = (0.2 + 16 * B * B) / (16 * B)
    assert line.b == pytest.approx(slope, rel=0.1)


@pytest.mark.parametrize(
    ("metric", "noise"),
    [
        (lambda almr, lr: 30 + 5 * np.minimum(almr, 0.3) + 0.15 * almr, 0.3),
        (lambda almr, lr: 30 + 5 * (1 - np.exp(-(2 + 2 * (np.log10(lr) + 4)) * almr)), 0.15),
    ],
)
@pytest.mark.parametrize("seed", range(4))
def test_a_plateau_up_to_the_border_has_no_frontier(
    metric: Callable[[np.ndarray, np.ndarray], np.ndarray], noise: float, seed: int
) -> None:
    """The best ALMR is 1 at all rates; on the plateau before it noise alone makes peaks."""
    line = metric_frontier(sampled(metric, noise, seed), replicates=20)
    assert line.refused is not None
    assert "above the border by less than the noise" in line.refused


def test_a_surface_that_is_refused_has_no_lines_either() -> None:
    surface = sampled(ridge, 0.02, 0)
    for line in (metric_frontier(surface, replicates=5, refused="too few"), loss_line(surface, 5, refused="too few")):
        assert line.refused == "too few"
        assert np.isfinite(line.b)  # drawn, dotted


@pytest.mark.parametrize(("axis", "what"), [("almr", "best ALMR"), ("lr", "best learning rate")])
def test_peaks_on_the_border_are_refused(axis: Axis, what: str) -> None:
    surface = sampled(lambda almr, lr: 3 * almr + np.log10(lr), 0.02, 0)
    line = metric_frontier(surface, axis, replicates=20)
    assert line.refused is not None
    assert what in line.refused
    assert "widen the range" in line.refused
    assert np.isnan(line.a)


def test_a_peak_that_noise_moves_to_the_border_is_not_trusted() -> None:
    surface = sampled(lambda almr, lr: -0.3 * (almr - 0.5) ** 2 + 0.0 * lr, 0.15, 3, seeds=1)
    line = metric_frontier(surface, replicates=100)
    assert line.refused is not None


def test_rates_at_which_all_ratios_are_alike_have_no_peak() -> None:
    """Below 1e-3 nothing is learned and noise decides; the line is that of the rates above."""

    def learned(almr: np.ndarray, lr: np.ndarray) -> np.ndarray:
        log_lr = np.log10(lr)
        return -8 * (almr - A - B * log_lr) ** 2 * (1 + np.tanh(4 * (log_lr + 2.9))) / 2

    surface = sampled(learned, 0.05, 0)
    line = metric_frontier(surface, replicates=100)
    assert line.points[:, 1].min() > 3e-4
    assert line.b == pytest.approx(B, abs=0.08)
    nothing = metric_frontier(sampled(lambda almr, lr: 0 * almr, 0.1, 1), replicates=20)
    assert (
        nothing.refused
        == "at most learning rates all ALMRs are alike within the noise: more seeds, longer runs or wider ranges"
    )


def test_losses_have_their_frontier_where_they_are_least() -> None:
    line = metric_frontier(sampled(lambda almr, lr: -ridge(almr, lr), 0.05, 0), sign=-1.0, replicates=50)
    assert line.b == pytest.approx(B, abs=0.03)


@pytest.mark.parametrize(("across", "along"), [(1.0, 2.0), (-1.0, 1.0), (0.3, 1.0)])
def test_the_loss_line_follows_the_gradient(across: float, along: float) -> None:
    """On a plane the steepest direction is that of its gradient, in scaled coordinates."""

    def plane(almr: np.ndarray, lr: np.ndarray) -> np.ndarray:
        u = (np.log10(lr) + 4) / 2  # 0 to 1
        return 5 - across * u - along * almr

    line = loss_line(sampled(plane, 0.01, 0), replicates=50)
    assert line.refused is None
    assert line.b == pytest.approx(along / across / 2, rel=0.05)  # 2 decades over the whole range
    assert line.almr(np.array([1e-3]))[0] == pytest.approx(0.5, abs=0.02)  # through the middle
    assert line.b_interval[0] < along / across / 2 < line.b_interval[1]


def test_the_loss_line_bends_to_the_valley() -> None:
    """The curve ends where the loss is least, and begins where it is highest along the path."""
    line = loss_line(
        sampled(lambda almr, lr: 4 + (almr - 0.8) ** 2 + 0.2 * (np.log10(lr) + 2.5) ** 2, 0.005, 0), replicates=30
    )
    (end_almr, end_lr) = line.points[-1]
    assert end_almr == pytest.approx(0.8, abs=0.05)
    assert np.log10(end_lr) == pytest.approx(-2.5, abs=0.1)


def test_the_descent_does_not_go_to_and_fro_at_the_bottom() -> None:
    """Across a narrow valley a step of fixed length would overshoot again and again; the curve turns into the valley."""
    u, v = unit_grid(FIELD).T
    path = steepest_curve((v - 0.305) ** 2 + 0.01 * u)
    assert path is not None
    downhill = path[path[:, 1] <= 0.5]
    assert np.linalg.norm(np.diff(downhill, axis=0), axis=1).sum() == pytest.approx(0.2 + 0.5, abs=0.06)
    assert (np.diff(downhill[:, 1]) <= 1e-3).all()
    assert downhill[-1] == pytest.approx([0.0, 0.305], abs=0.011)


def test_a_line_that_may_be_upright_has_no_interval() -> None:
    """The best learning rate is the same for all ratios: an angle near 90 degrees, on either side of it."""
    surface = sampled(lambda almr, lr: -((np.log10(lr) + 3) ** 2) + 0 * almr, 0.1, 0)
    line = metric_frontier(surface, axis="lr", replicates=60)
    assert line.refused is None
    assert abs(line.angle) > 75
    assert line.b_interval == (-np.inf, np.inf)
    low, high = line.angle_interval
    assert high - low < 30
    assert low < 90 < high or low < -90 < high


def test_gradients_are_those_of_the_function() -> None:
    u, v = unit_grid(FIELD).T
    field = gradients((2 * v * v - 3 * u).reshape(FIELD, FIELD))
    for place in ((0.0, 0.0), (0.503, 0.251), (1.0, 1.0)):
        assert interpolated(field, np.array(place)) == pytest.approx([-3.0, 4 * place[1]], abs=1e-6)


def test_surfaces_say_what_is_missing() -> None:
    with pytest.raises(InputError, match="finished runs with a value: 3; a surface needs four"):
        fit_surface([0, 1, 0], [1e-3, 1e-3, 1e-2], [1, 2, 3], loss=False)
    with pytest.raises(InputError, match=r"all finished runs have the same learning rate, 0\.001"):
        fit_surface([0, 1, 0, 0.5], [1e-3] * 4, [1, 2, 3, 4], loss=False)


def test_a_surface_knows_its_noise_and_its_errors() -> None:
    surface = sampled(ridge, 0.15, 1)
    assert surface.noise(unit_grid(2)) == pytest.approx([0.15] * 4, rel=0.25)
    assert np.sqrt((surface.left_out_errors() ** 2).mean()) == pytest.approx(0.16, rel=0.25)
    # The pair left out and fitted anew, with the same kernel
    others = (surface.points != surface.points[7]).any(axis=1)
    assert others.sum() == len(surface.values) - 3
    from scipy.linalg import cholesky

    covariance = surface.factor @ surface.factor.T
    without = Surface(
        surface.scale, surface.points[others], surface.values[others], None, surface.kernel, surface.inner_noise,
        surface.center, surface.deviation, cholesky(covariance[np.ix_(others, others)], lower=True),
    )  # fmt: skip
    expected = surface.values[7] - without.mean(surface.points[7:8])[0]
    assert surface.left_out_errors()[7] == pytest.approx(expected, rel=1e-6)
    samples = surface.samples(unit_grid(5), 400, 0)
    assert samples.std(axis=0) == pytest.approx(surface.std(unit_grid(5)), rel=0.2)
