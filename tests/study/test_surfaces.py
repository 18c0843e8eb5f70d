"""Losses that a cliff and their noise make hard to fit as they are."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from study_results import ALMRS, RATES

from megatron_cpt.study.surfaces import Surface, Warp, bound_between_pairs, fit_surface, pairs_around, unit_grid


def forgetting(almr: np.ndarray, lr: np.ndarray) -> np.ndarray:
    """Small up to ALMR 0.75, then a cliff at high learning rates, as of a model that reads no general text any more."""
    u = (np.log10(lr) + 4) / 2
    return 3 + 0.02 * u * (1 + 4 * almr) + 4 * u * np.exp(-((1 - almr) ** 2) / 0.015)


def cliff(seed: int, loss: bool) -> Surface:
    """Noise of a thousandth near the floor, and of a tenth of the rise above it."""
    random = np.random.default_rng(seed)
    almr, lr = (part.ravel().repeat(3) for part in np.meshgrid(ALMRS, RATES))
    true = forgetting(almr, lr)
    return fit_surface(almr, lr, true + (0.001 + 0.1 * (true - 3)) * random.standard_normal(len(true)), loss=loss)


@given(st.floats(-10, 10), st.floats(1e-3, 10), st.lists(st.floats(-100, 100), min_size=1))
def test_a_warp_has_an_inverse_and_a_slope(floor: float, width: float, numbers: list[float]) -> None:
    warp, values = Warp(floor, width), np.array(numbers)
    assert warp.inverse(warp(values)) == pytest.approx(values, rel=1e-9, abs=1e-9)
    step = 1e-4 * width
    assert (warp(values + step) - warp(values - step)) / (2 * step) == pytest.approx(warp.slope(values), rel=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_a_cliff_does_not_spoil_the_rest(seed: int) -> None:
    """Away from it the surface is known as well as its noise lets it, at least three times better than unwarped."""
    warped, plain = cliff(seed, True), cliff(seed, False)
    assert warped.warp is not None
    assert plain.warp is None
    at = unit_grid(21)
    at = at[at[:, 1] <= 0.7]
    true = forgetting(warped.scale.share(at[:, 1]), warped.scale.lr(at[:, 0]))
    errors = [float(np.sqrt(((surface.mean(at) - true) ** 2).mean())) for surface in (warped, plain)]
    assert errors[0] < 0.02
    assert errors[0] < errors[1] / 3
    low, high = np.array([[0.1, 0.3]]), np.array([[1.0, 1.0]])
    assert warped.noise(low)[0] < 0.01
    assert warped.noise(high)[0] == pytest.approx(0.4, rel=0.5)


def test_probabilities_hold_where_it_is_warped() -> None:
    """The bound of a confidence is kept with that probability, by the surfaces that are drawn too."""
    surface, at = cliff(0, True), unit_grid(5)
    bound = surface.bound(at, 0.9)
    for place in range(len(at)):
        assert surface.chance_below(at[place : place + 1], bound[place])[0] == pytest.approx(0.9)
    below = (surface.samples(at, 4000, 0) <= bound).mean(axis=0)
    assert below == pytest.approx(np.full(len(at), 0.9), abs=0.03)
    drawn = surface.samples(at, 4000, 0)
    assert np.median(drawn, axis=0) == pytest.approx(surface.mean(at), rel=0.01)


def test_what_needs_no_warp_has_none() -> None:
    random = np.random.default_rng(0)
    almr, lr = (part.ravel().repeat(3) for part in np.meshgrid(ALMRS, RATES))
    values = 3 - (almr - 0.5) - 0.3 * np.log10(lr) + 0.02 * random.standard_normal(len(almr))
    assert fit_surface(almr, lr, values, loss=True).warp is None


def test_the_deviation_of_a_difference() -> None:
    surface = cliff(1, False)
    at, other = np.array([[0.2, 0.4]]), np.array([[0.9, 0.1]])
    drawn = surface.samples(np.concatenate([at, other]), 4000, 0)
    assert surface.std_of_difference(at, other)[0] == pytest.approx((drawn[:, 0] - drawn[:, 1]).std(), rel=0.05)


def test_between_pairs_the_higher_diagonal_counts() -> None:
    """One corner of a rectangle is high: linear between all three ways to it; at the pairs what they measured."""
    almr, lr = (part.ravel() for part in np.meshgrid(ALMRS, RATES))
    random, high = np.random.default_rng(0), (almr == 1.0) & (lr == max(RATES))
    surface = fit_surface(almr, lr, 3 + high + 1e-4 * random.standard_normal(len(almr)), loss=True)
    bound = bound_between_pairs(surface, unit_grid(17), 0.5).reshape(17, 17)
    assert bound[::4, ::4].T.ravel() == pytest.approx(surface.values, abs=1e-3)
    assert bound[14, 14] == pytest.approx(3.5, abs=1e-2)
    assert [bound[16, 13], bound[13, 16]] == pytest.approx([3.25, 3.25], abs=1e-2)
    assert bound[14, 13] == pytest.approx(3.25, abs=1e-2)
    higher = bound_between_pairs(surface, unit_grid(17), 0.95)
    assert (higher >= bound.ravel()).all()


def test_the_pairs_around_a_place() -> None:
    """Four corners of a rectangle, two on an edge, one on a pair itself."""
    almr, lr = (part.ravel() for part in np.meshgrid(ALMRS, RATES))
    surface = fit_surface(almr, lr, 3 + almr, loss=True)
    for place, number in (((0.3, 0.6), 4), ((0.25, 0.6), 2), ((0.25, 0.5), 1), ((1.0, 1.0), 1)):
        at = np.array(place)
        around = pairs_around(surface, at)
        assert len(around) == number, place
        assert np.abs(around - at).max() < 0.25
    assert len(pairs_around(surface, np.array([1.1, 0.5]))) == 0
