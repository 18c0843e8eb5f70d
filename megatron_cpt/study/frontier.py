"""The paper's two lines over (ALMR, log10 LR): the metric frontier and the line along which the loss falls fastest.

Both are ALMR = a + b log10 LR. The paper names them (its equations 1 and 2) without saying how they were computed; what is
done here is written out below, and in docs/almr_study.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from megatron_cpt.study.surfaces import INTERVAL, Array, Scale, Surface, unit_grid

SLICES = 25  # of the surface, each with one peak at most
STEPS = 201  # along a slice
REPLICATES = 300
LEAST_SLICES = 5  # that are not flat
LEAST_SHARE = 0.5  # of these with a peak inside
SIGNIFICANT = 3.0  # deviations by which a slice's highest place is above its lowest, else it is flat: the two are picked
LEAST_REPLICATES = 0.8  # that must have a line
FIELD = 101  # points along each axis of the field of gradients
STEP = 0.01  # of the descent, in unit coordinates
FLAT_GRADIENT = 1e-3  # of the steepest: where the descent ends

Axis = Literal["almr", "lr"]


@dataclass(frozen=True)
class Line:
    """ALMR = a + b log10 LR.

    Attributes:
        points: [n, 2] (ALMR, LR) that the line was fitted to
        a_interval, b_interval: 5 % to 95 % of the bootstrap
        refused: why nothing should be concluded from it; None: nothing speaks against it
    """

    a: float
    b: float
    a_interval: tuple[float, float]
    b_interval: tuple[float, float]
    points: Array
    refused: str | None

    def almr(self, lr: Array) -> Array:
        """On the line."""
        return self.a + self.b * np.log10(lr)


def metric_frontier(
    surface: Surface, axis: Axis = "almr", sign: float = 1.0, replicates: int = REPLICATES, seed: int = 0
) -> Line:
    """Peaks of a surface, regressed.

    Along `axis` "almr", each of 25 learning rates, evenly spaced on the log scale, has the ALMR at which the surface is
    highest; along "lr" each of 25 ALMRs has its learning rate. Slices along which the surface is flat within its uncertainty
    have no best place; peaks on the border of the studied range say only that the best is not inside: both are left out.
    The line is the least-squares regression of ALMR on log10 LR over the others.

    `sign`: 1 where higher is better, -1 for losses.
    """
    at = slices(axis)
    alike = {"almr": "at most learning rates all ALMRs", "lr": "at most ALMRs all learning rates"}[axis]
    use = not_flat(surface, at)
    if use.sum() < LEAST_SLICES:
        return no_line(f"{alike} are alike within the noise: more seeds, longer runs or wider ranges")
    return bootstrapped(
        surface, at, lambda heights: peaks(sign * heights, use, axis), regress, replicates, seed, border_reason(axis)
    )


def border_reason(axis: Axis) -> str:
    """Why there is no frontier."""
    other = {"almr": "learning rates", "lr": "mixture ratios"}[axis]
    name = {"almr": "ALMR", "lr": "learning rate"}[axis]
    return f"for most {other} the best {name} is on the border of the studied range: widen the range"


def slices(axis: Axis) -> Array:
    """[25 * 201, 2] unit coordinates, slice by slice."""
    first, second = np.meshgrid(np.linspace(0.0, 1.0, SLICES), np.linspace(0.0, 1.0, STEPS), indexing="ij")
    order = (first, second) if axis == "almr" else (second, first)  # (u, v): u is fixed in a slice along ALMR
    return np.stack([part.ravel() for part in order], axis=-1)


def not_flat(surface: Surface, at: Array) -> npt.NDArray[np.bool_]:
    """[25]: whether the surface along a slice differs by more than its uncertainty."""
    heights = surface.inner_mean(at).reshape(SLICES, STEPS)
    rows = np.arange(SLICES) * STEPS
    high, low = rows + heights.argmax(axis=1), rows + heights.argmin(axis=1)
    differences = heights.max(axis=1) - heights.min(axis=1)
    return differences > SIGNIFICANT * surface.std_of_difference(at[high], at[low])


def peaks(heights: Array, use: npt.NDArray[np.bool_], axis: Axis) -> Array | None:
    """[n, 2] unit coordinates of the peaks inside of the slices in `use`, from the heights at `slices`; None: too few."""
    best = heights.reshape(SLICES, STEPS).argmax(axis=1)
    inside = use & (best > 0) & (best < STEPS - 1)
    if inside.sum() < max(LEAST_SHARE * use.sum(), 2):
        return None
    fixed, moving = np.linspace(0.0, 1.0, SLICES)[inside], np.linspace(0.0, 1.0, STEPS)[best[inside]]
    return np.stack([fixed, moving] if axis == "almr" else [moving, fixed], axis=-1)


def regress(scale: Scale, path: Array) -> tuple[float, float]:
    """a and b of the least-squares line of ALMR on log10 LR."""
    b, a = np.polyfit(np.log10(scale.lr(path[:, 0])), scale.share(path[:, 1]), 1)
    return float(a), float(b)


def loss_line(surface: Surface, replicates: int = REPLICATES, seed: int = 0) -> Line:
    """The direction in which a loss falls fastest, integrated and fitted.

    In coordinates scaled to the studied ranges (u for log10 LR, v for ALMR, each from 0 to 1) the curve
    d(u, v)/ds = -grad L / |grad L| through the middle (0.5, 0.5) is followed downhill and uphill, until it leaves the square
    or the slope is a thousandth of the steepest. Its line is that of total least squares in these coordinates, through the
    curve's mean along its main direction, as a curve may be steep in either. The slope depends on the ranges: "fastest"
    needs a measure of both axes.
    """
    reason = "the loss does not fall from the middle of the studied range: it is flat there"
    return bootstrapped(surface, unit_grid(FIELD), steepest_curve, main_direction, replicates, seed, reason)


def steepest_curve(heights: Array) -> Array | None:
    """[n, 2] unit coordinates from the highest loss to the lowest, from the heights on a grid; None: it has no length."""
    field = gradients(heights.reshape(FIELD, FIELD))
    steepest = float(np.linalg.norm(field, axis=-1).max())
    parts = []
    for sign in (1.0, -1.0):  # uphill, downhill
        place: Array = np.array([0.5, 0.5])
        path: list[Array] = []
        for _ in range(int(4 / STEP)):
            slope = interpolated(field, place)
            length = float(np.linalg.norm(slope))
            if length <= FLAT_GRADIENT * steepest:
                break
            place = place + sign * STEP * slope / length
            if place.min() < 0 or place.max() > 1:
                break
            path.append(place)
        parts.append(path)
    curve: list[Array] = [*reversed(parts[0]), np.array([0.5, 0.5]), *parts[1]]
    return np.stack(curve) if len(curve) >= 10 else None


def gradients(heights: Array) -> Array:
    """Along u and v, [FIELD, FIELD, 2]."""
    step = 1.0 / (FIELD - 1)
    return np.stack([np.gradient(heights, step, axis=axis, edge_order=2) for axis in (0, 1)], axis=-1)


def interpolated(field: Array, place: Array) -> Array:
    """Bilinear, at (u, v)."""
    low = np.minimum((place * (FIELD - 1)).astype(int), FIELD - 2)
    (i, j), (s, t) = low, place * (FIELD - 1) - low
    left, right = field[i, j] * (1 - t) + field[i, j + 1] * t, field[i + 1, j] * (1 - t) + field[i + 1, j + 1] * t
    return left * (1 - s) + right * s


def main_direction(scale: Scale, path: Array) -> tuple[float, float]:
    """a and b of the line of total least squares, in unit coordinates."""
    center = path.mean(axis=0)
    u, v = np.linalg.svd(path - center)[2][0]
    slope = v / u if abs(u) > 1e-6 else np.copysign(1e6, v)
    (low, high), (least, most) = scale.log_lr, scale.almr
    b = slope * (most - least) / (high - low)
    a = scale.share(center[1]) - b * (low + center[0] * (high - low))
    return float(a), float(b)


def bootstrapped(
    surface: Surface,
    at: Array,
    find: Callable[[Array], Array | None],
    fit: Callable[[Scale, Array], tuple[float, float]],
    replicates: int,
    seed: int,
    reason: str,
) -> Line:
    """The line, and how much it moves when every run is measured again (parametric bootstrap).

    `find` makes the path of the line from the heights at `at`, `fit` the line of the path.
    """
    path = find(surface.mean(at))
    if path is None:
        return no_line(reason)
    a, b = fit(surface.scale, path)
    repeated = [find(heights) for heights in surface.repetitions(at, replicates, seed)]
    found = [fit(surface.scale, again) for again in repeated if again is not None]
    refused = None
    if len(found) < LEAST_REPLICATES * replicates:
        refused = f"{reason} in {replicates - len(found)} of {replicates} repetitions of the runs (bootstrap)"
    (a_low, b_low), (a_high, b_high) = np.percentile(found or [(np.nan, np.nan)], INTERVAL, axis=0)
    points = np.stack([surface.scale.share(path[:, 1]), surface.scale.lr(path[:, 0])], axis=-1)
    return Line(a, b, (float(a_low), float(a_high)), (float(b_low), float(b_high)), points, refused)


def no_line(reason: str) -> Line:
    """Refused."""
    nothing = (float("nan"), float("nan"))
    return Line(*nothing, nothing, nothing, np.zeros((0, 2)), reason)
