"""Smooth surfaces over (ALMR, log10 LR) with their uncertainty: Gaussian processes on the last evaluations of all runs.

Coordinates inside are scaled: u = log10 LR and v = ALMR, each from 0 to 1 over the studied range, so that "direction" means
something. Rasmussen and Williams, "Gaussian Processes for Machine Learning" (2006), algorithm 2.1.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats
from scipy.interpolate import LinearNDInterpolator
from scipy.linalg import cho_solve, cholesky
from scipy.spatial import Delaunay
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

from megatron_cpt.utils.errors import InputError

Array = npt.NDArray[np.float64]
RESTARTS = 4  # of the search for the kernel's parameters
SMOOTHNESS = 2.5  # Matern's nu: twice differentiable, so that gradients mean something
DIAGONALS = np.array([[[1.0, 0.01], [0.01, 1.0]], [[1.0, -0.01], [-0.01, 1.0]]])  # shears: each makes one the shorter
ON_EDGE = 0.01  # weight of the third corner, for a place that lies on an edge: learning rates are rounded
WIDTHS = (0.3, 0.1, 0.03, 0.01, 0.003)  # of warps that are tried, of the range of the values
INTERVAL = (5.0, 95.0)  # per cent, of all intervals of a study


@dataclass(frozen=True)
class Scale:
    """Studied ranges, of log10 LR and of ALMR."""

    log_lr: tuple[float, float]
    almr: tuple[float, float]

    @classmethod
    def of(cls, almr: Array, lr: Array) -> Scale:
        """The ranges of these runs.

        Raises:
            InputError: one of the two does not vary
        """
        log_lr = np.log10(lr)
        for name, values in (("ALMR", almr), ("learning rate", lr)):
            if np.ptp(values) == 0:
                raise InputError(
                    f"all finished runs have the same {name}, {values[0]:g}; a surface needs two values or more"
                )
        return cls((float(log_lr.min()), float(log_lr.max())), (float(almr.min()), float(almr.max())))

    def unit(self, almr: Array, lr: Array) -> Array:
        """(u, v), [n, 2]"""
        u = (np.log10(lr) - self.log_lr[0]) / (self.log_lr[1] - self.log_lr[0])
        return np.stack([u, (almr - self.almr[0]) / (self.almr[1] - self.almr[0])], axis=-1)

    def lr(self, u: Array) -> Array:
        """The inverse, of u."""
        return 10 ** (self.log_lr[0] + u * (self.log_lr[1] - self.log_lr[0]))

    def share(self, v: Array) -> Array:
        """The inverse, of v."""
        return self.almr[0] + v * (self.almr[1] - self.almr[0])


@dataclass(frozen=True)
class Warp:
    """t = asinh((y - floor) / width): as it is near the lowest loss, logarithmic far above it.

    A loss that a model forgets is twice as high on one side of the studied range as in the middle, and differs more
    between seeds there. In t one length and one noise hold for all of it: a warped Gaussian process (Snelson, Rasmussen and
    Ghahramani, 2004).
    """

    floor: float
    width: float

    def __call__(self, values: Array) -> Array:
        return np.arcsinh((values - self.floor) / self.width)

    def inverse(self, inner: Array) -> Array:
        """y of t."""
        return self.floor + self.width * np.sinh(inner)

    def slope(self, values: Array) -> Array:
        """dt/dy"""
        return 1 / np.hypot(values - self.floor, self.width)


@dataclass(frozen=True)
class Surface:
    """A Gaussian process after it has seen its points, of the values as they are or of warped ones.

    Attributes:
        points: [n, 2], unit coordinates
        values: [n], what was measured there
        warp: None: as they are. All that follows is of the warped values
        kernel: of the surface itself, in units of the deviation
        inner_noise: deviation of a single run about the surface (seeds)
        center, deviation: of the values
        factor: Cholesky factor of the covariance of the scaled values
    """

    scale: Scale
    points: Array
    values: Array
    warp: Warp | None
    kernel: Any
    inner_noise: float
    center: float
    deviation: float
    factor: Array

    def inner(self, values: Array) -> Array:
        """Warped."""
        return values if self.warp is None else self.warp(values)

    def outer(self, inner: Array) -> Array:
        """The inverse."""
        return inner if self.warp is None else self.warp.inverse(inner)

    def inner_mean(self, at: Array) -> Array:
        """[m, 2] unit coordinates -> [m]"""
        return self.center + self._weights(at) @ (self.inner(self.values) - self.center)

    def inner_std(self, at: Array) -> Array:
        """Of the surface (not of single runs): [m]"""
        across = self.kernel(at, self.points)
        explained = np.einsum("ij,ji->i", across, cho_solve((self.factor, True), across.T))
        return self.deviation * np.sqrt(np.maximum(self.kernel.diag(at) - explained, 0.0))

    def mean(self, at: Array) -> Array:
        """[m, 2] unit coordinates -> [m]; of a warped process, what is as likely to be above as below."""
        return self.outer(self.inner_mean(at))

    def std(self, at: Array) -> Array:
        """[m]; of a warped process, to first order."""
        return self.inner_std(at) * self._stretch(at)

    def noise(self, at: Array) -> Array:
        """Deviation of a single run about the surface, [m]; of a warped process, to first order."""
        return self.inner_noise * self._stretch(at)

    def bound(self, at: Array, confidence: float) -> Array:
        """Below which the surface lies with this probability, [m]."""
        return self.outer(self.inner_mean(at) + float(stats.norm.ppf(confidence)) * self.inner_std(at))

    def chance_below(self, at: Array, value: float) -> Array:
        """Probability that the surface is below a value, [m]."""
        return stats.norm.cdf((self.inner(np.array(value)) - self.inner_mean(at)) / np.maximum(self.inner_std(at), 1e-300))

    def std_of_difference(self, at: Array, other: Array) -> Array:
        """Of the (warped) surface between one place and another, [m]."""
        both = np.concatenate([at, other])
        covariance, m = self._covariance(both), len(at)
        diagonal, across = np.diag(covariance), np.diag(covariance[:m, m:])
        return np.sqrt(np.maximum(diagonal[:m] + diagonal[m:] - 2 * across, 0.0))

    def inner_samples(self, at: Array, number: int, seed: int) -> Array:
        """(Warped) surfaces that these runs leave possible, [number, m]: they differ by what noise hides, and by what nobody
        knows between the points.
        """
        covariance = self._covariance(at)
        covariance[np.diag_indices_from(covariance)] += 1e-8 * self.deviation**2
        normal = np.random.default_rng(seed).standard_normal((len(at), number))
        return self.inner_mean(at) + (cholesky(covariance, lower=True) @ normal).T

    def samples(self, at: Array, number: int, seed: int, confidence: float = 0.5) -> Array:
        """The same, not warped, [number, m]; of each the bound (see `bound`) that it would be given."""
        margin = float(stats.norm.ppf(confidence)) * self.inner_std(at)
        return self.outer(self.inner_samples(at, number, seed) + margin)

    def left_out_errors(self) -> Array:
        """Of each run, by a surface that has seen no run of its pair (kernel fixed): section 5.4.2 of the book, in blocks.

        With single runs left out, the other seeds of a pair would tell what it is.
        """
        inverse, inner = cho_solve((self.factor, True), np.eye(len(self.values))), self.inner(self.values)
        weighted = inverse @ ((inner - self.center) / self.deviation)
        errors = np.empty(len(inner))
        _, which = np.unique(self.points, axis=0, return_inverse=True)
        for pair in range(which.max() + 1):
            own = which == pair
            errors[own] = self.deviation * np.linalg.solve(inverse[np.ix_(own, own)], weighted[own])
        return self.values - self.outer(inner - errors)

    def _weights(self, at: Array) -> Array:
        """[m, n]: the mean at `at` is center + weights @ (values - center)."""
        return cho_solve((self.factor, True), self.kernel(self.points, at)).T

    def _covariance(self, at: Array) -> Array:
        across = self.kernel(at, self.points)
        return self.deviation**2 * (self.kernel(at) - across @ cho_solve((self.factor, True), across.T))

    def _stretch(self, at: Array) -> Array:
        """dy/dt on the surface."""
        return np.ones(len(at)) if self.warp is None else 1 / self.warp.slope(self.mean(at))


def fit_surface(
    almr: Sequence[float] | Array, lr: Sequence[float] | Array, values: Sequence[float] | Array, loss: bool
) -> Surface:
    """The Gaussian process with the most likely lengths, height and noise, and of a `loss` the most likely warp, if any.

    Raises:
        InputError: fewer than four runs, or all with one ALMR or one learning rate
    """
    x, y, z = (np.asarray(numbers, dtype=np.float64) for numbers in (almr, lr, values))
    if len(z) < 4:
        raise InputError(f"finished runs with a value: {len(z)}; a surface needs four or more")
    scale = Scale.of(x, y)
    points, height = scale.unit(x, y), float(np.ptp(z))
    warps = [None, *(Warp(float(z.min()), width * height) for width in WIDTHS)] if loss and height > 0 else [None]
    return max((_fit(scale, points, z, warp) for warp in warps), key=lambda found: found[0])[1]


def _fit(scale: Scale, points: Array, values: Array, warp: Warp | None) -> tuple[float, Surface]:
    """(log likelihood of the values, surface)"""
    inner = values if warp is None else warp(values)
    center, deviation = float(inner.mean()), float(inner.std()) or 1.0
    kernel = ConstantKernel(1.0, (1e-2, 1e3)) * Matern([1.0, 1.0], (0.15, 20.0), SMOOTHNESS) + WhiteKernel(1e-2, (1e-6, 2.0))
    process = GaussianProcessRegressor(kernel, alpha=1e-10, n_restarts_optimizer=RESTARTS, random_state=0)
    with warnings.catch_warnings():  # a length at its bound is a surface that is flat in that direction
        warnings.simplefilter("ignore", ConvergenceWarning)
        process.fit(points, (inner - center) / deviation)
    smooth, white = process.kernel_.k1, process.kernel_.k2
    covariance = smooth(points) + (white.noise_level + 1e-10) * np.eye(len(values))
    noise = deviation * float(np.sqrt(white.noise_level))
    stretched = 0.0 if warp is None else float(np.log(warp.slope(values)).sum())
    likelihood = process.log_marginal_likelihood_value_ - len(values) * np.log(deviation) + stretched
    factor = cholesky(covariance, lower=True)
    return likelihood, Surface(scale, points, values, warp, smooth, noise, center, deviation, factor)


def bound_between_pairs(surface: Surface, at: Array, confidence: float) -> Array:
    """What the measured pairs around a place say, [m]: the bound of each pair, from its own runs and the noise of seeds
    alone, and between these as straight lines go; nan beyond the outermost pairs.

    Beside a cliff a smooth surface may dip below all that was measured around it; this does not. Of the triangles between
    pairs of a regular grid there are two ways to choose (either diagonal of a rectangle): the higher one counts.
    """
    pairs, which, runs = np.unique(surface.points, axis=0, return_inverse=True, return_counts=True)
    means = np.bincount(which, surface.inner(surface.values)) / runs
    bounds = surface.outer(means + float(stats.norm.ppf(confidence)) * surface.inner_noise / np.sqrt(runs))
    if np.linalg.matrix_rank(pairs - pairs[0], tol=1e-6) < 2:  # all on one line
        return np.full(len(at), np.nan)
    found = [LinearNDInterpolator(pairs @ sheared, bounds)(at @ sheared) for sheared in DIAGONALS]
    return np.asarray(np.fmax(*found))


def pairs_around(surface: Surface, place: Array) -> Array:
    """[n, 2] the measured pairs that `bound_between_pairs` goes between at a place, [2]; none where nothing surrounds it."""
    pairs = np.unique(surface.points, axis=0)
    found: set[int] = set()
    for sheared in DIAGONALS:
        triangles, at = Delaunay(pairs @ sheared), place @ sheared
        number = int(triangles.find_simplex(at))
        if number < 0:
            continue
        transform = triangles.transform[number]
        first = transform[:2] @ (at - transform[2])
        weights = np.append(first, 1 - first.sum())
        found |= set(triangles.simplices[number][weights > ON_EDGE].tolist())
    return pairs[sorted(found)]


def unit_grid(number: int) -> Array:
    """[number * number, 2]: u changes slowest."""
    steps = np.linspace(0.0, 1.0, number)
    u, v = np.meshgrid(steps, steps, indexing="ij")
    return np.stack([u.ravel(), v.ravel()], axis=-1)
