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
from scipy.linalg import cho_solve, cholesky
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

from megatron_cpt.errors import InputError

Array = npt.NDArray[np.float64]
RESTARTS = 4  # of the search for the kernel's parameters
SMOOTHNESS = 2.5  # Matern's nu: twice differentiable, so that gradients mean something


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
class Surface:
    """A Gaussian process after it has seen its points.

    Attributes:
        points: [n, 2], unit coordinates
        values: [n], what was measured there
        kernel: of the surface itself, in units of the values' deviation
        noise: deviation of a single run about the surface (seeds), in units of the values
        center, deviation: of the values
        factor: Cholesky factor of the covariance of the scaled values
    """

    scale: Scale
    points: Array
    values: Array
    kernel: Any
    noise: float
    center: float
    deviation: float
    factor: Array

    def weights(self, at: Array) -> Array:
        """[m, n]: the mean at `at` is center + weights @ (values - center)."""
        return cho_solve((self.factor, True), self.kernel(self.points, at)).T

    def mean(self, at: Array) -> Array:
        """[m, 2] unit coordinates -> [m]"""
        return self.center + self.weights(at) @ (self.values - self.center)

    def covariance(self, at: Array) -> Array:
        """Of the surface (not of single runs): [m, m]"""
        across = self.kernel(at, self.points)
        inner = self.kernel(at) - across @ cho_solve((self.factor, True), across.T)
        return self.deviation**2 * inner

    def std(self, at: Array) -> Array:
        """[m]"""
        across = self.kernel(at, self.points)
        explained = np.einsum("ij,ji->i", across, cho_solve((self.factor, True), across.T))
        return self.deviation * np.sqrt(np.maximum(self.kernel.diag(at) - explained, 0.0))

    def samples(self, at: Array, number: int, seed: int) -> Array:
        """Surfaces that these runs leave possible, [number, m]."""
        covariance = self.covariance(at)
        covariance[np.diag_indices_from(covariance)] += 1e-8 * self.deviation**2
        normal = np.random.default_rng(seed).standard_normal((len(at), number))
        return self.mean(at) + (cholesky(covariance, lower=True) @ normal).T

    def left_out_errors(self) -> Array:
        """Of each run, by a surface that has seen all others (kernel fixed): section 5.4.2 of the book."""
        inverse = cho_solve((self.factor, True), np.eye(len(self.values)))
        return self.deviation * (inverse @ ((self.values - self.center) / self.deviation)) / np.diag(inverse)


def fit_surface(almr: Sequence[float] | Array, lr: Sequence[float] | Array, values: Sequence[float] | Array) -> Surface:
    """The Gaussian process with the most likely lengths, height and noise.

    Raises:
        InputError: fewer than four runs, or all with one ALMR or one learning rate
    """
    x, y, z = (np.asarray(numbers, dtype=np.float64) for numbers in (almr, lr, values))
    if len(z) < 4:
        raise InputError(f"{len(z)} finished runs have this; a surface needs four or more")
    scale = Scale.of(x, y)
    points = scale.unit(x, y)
    center, deviation = float(z.mean()), float(z.std()) or 1.0
    kernel = ConstantKernel(1.0, (1e-2, 1e3)) * Matern([1.0, 1.0], (0.15, 20.0), SMOOTHNESS) + WhiteKernel(1e-2, (1e-6, 2.0))
    process = GaussianProcessRegressor(kernel, alpha=1e-10, n_restarts_optimizer=RESTARTS, random_state=0)
    with warnings.catch_warnings():  # a length at its bound is a surface that is flat in that direction
        warnings.simplefilter("ignore", ConvergenceWarning)
        process.fit(points, (z - center) / deviation)
    smooth, white = process.kernel_.k1, process.kernel_.k2
    covariance = smooth(points) + (white.noise_level + 1e-10) * np.eye(len(z))
    noise = deviation * float(np.sqrt(white.noise_level))
    return Surface(scale, points, z, smooth, noise, center, deviation, cholesky(covariance, lower=True))


def unit_grid(number: int) -> Array:
    """[number * number, 2]: u changes slowest."""
    steps = np.linspace(0.0, 1.0, number)
    u, v = np.meshgrid(steps, steps, indexing="ij")
    return np.stack([u.ravel(), v.ravel()], axis=-1)
