"""The paper's two lines over (ALMR, log10 LR): the metric frontier and the line along which the loss falls fastest.

Both are ALMR = a + b log10 LR. The paper names them (its equations 1 and 2) without saying how they were computed; what is
done here is written out below, and in docs/almr_study.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.integrate import solve_ivp

from megatron_cpt.study.settings import Axis
from megatron_cpt.study.surfaces import INTERVAL, Array, Scale, Surface, unit_grid

SLICES = 25  # of the surface, each with one peak at most
STEPS = 101  # along a slice
REPLICATES = 300
LEAST_SLICES = 5  # with a peak
LEAST_SHARE = 0.5  # of the slices that are not flat, with a peak inside
SIGNIFICANT = 3.0  # deviations by which a slice's best place must be above a border: it was picked as the highest
LEAST_REPLICATES = 0.8  # that must have a line
FIELD = 51  # points along each axis of the field of gradients
STEP, LONGEST = 0.01, 4.0  # of the descent: between its points, and in all, in unit coordinates
FLAT_GRADIENT = 1e-3  # of the steepest: where the descent ends


@dataclass(frozen=True)
class Line:
    """ALMR = a + b log10 LR.

    Attributes:
        angle: in coordinates in which each axis goes from 0 to 1; degrees, 0 is level (b = 0), 90 and -90 are upright
        a_interval, b_interval, angle_interval: 5 % to 95 % of the drawn surfaces; those of a and b have no ends where the
            line may be upright
        points: [n, 2] (ALMR, LR) that the line was fitted to
        refused: why nothing should be concluded from it; None: nothing speaks against it
    """

    a: float
    b: float
    angle: float
    a_interval: tuple[float, float]
    b_interval: tuple[float, float]
    angle_interval: tuple[float, float]
    points: Array
    refused: str | None

    def almr(self, lr: Array) -> Array:
        """On the line."""
        return self.a + self.b * np.log10(lr)


def metric_frontier(
    surface: Surface,
    axis: Axis = "almr",
    sign: float = 1.0,
    replicates: int = REPLICATES,
    seed: int = 0,
    refused: str | None = None,
) -> Line:
    """Peaks of a surface, regressed.

    Along `axis` "almr", each of 25 learning rates, evenly spaced on the log scale, has the ALMR at which the surface is
    highest; along "lr" each of 25 ALMRs has its learning rate. A peak counts where it is above both borders of the studied
    range by three deviations of the difference: elsewhere the best place may be on the border or beyond, or all are alike.
    The line is the least-squares regression of the best place on the place of the slice: of ALMR on log10 LR, or along "lr"
    of log10 LR on ALMR.

    `sign`: 1 where higher is better, -1 for losses; `refused`: why the surface itself is not to be believed.
    """
    at = slices(axis)
    deviations = border_deviations(surface, at)
    if refused is None and not_flat(sign * surface.inner_mean(at), deviations).sum() < LEAST_SLICES:
        alike = {"almr": "at most learning rates all ALMRs", "lr": "at most ALMRs all learning rates"}[axis]
        return no_line(f"{alike} are alike within the noise: more seeds, longer runs or wider ranges")

    def find(heights: Array) -> Array | None:
        return peaks(sign * heights, deviations, axis)

    return with_intervals(surface, at, find, regress[axis], replicates, seed, border_reason(axis), refused)


def border_reason(axis: Axis) -> str:
    """Why there is no frontier."""
    other = {"almr": "learning rates", "lr": "mixture ratios"}[axis]
    name = {"almr": "ALMR", "lr": "learning rate"}[axis]
    return (
        f"for most {other} the best {name} is on the border of the studied range, or above the border by less than the "
        "noise: widen the range, or add seeds"
    )


def slices(axis: Axis) -> Array:
    """[25 * 201, 2] unit coordinates, slice by slice."""
    first, second = np.meshgrid(np.linspace(0.0, 1.0, SLICES), np.linspace(0.0, 1.0, STEPS), indexing="ij")
    order = (first, second) if axis == "almr" else (second, first)  # (u, v): u is fixed in a slice along ALMR
    return np.stack([part.ravel() for part in order], axis=-1)


def border_deviations(surface: Surface, at: Array) -> Array:
    """[2, 25, 201]: deviation of the (warped) surface between each place of `slices` and either border of its slice."""
    found = np.empty((2, SLICES, STEPS))
    for number, places in enumerate(at.reshape(SLICES, STEPS, 2)):
        for side, border in enumerate((places[0], places[-1])):
            found[side, number] = surface.std_of_difference(places, np.tile(border, (STEPS, 1)))
    return found


def above_borders(heights: Array, deviations: Array) -> tuple[npt.NDArray[np.int_], npt.NDArray[np.bool_]]:
    """[25] the best place of each slice, [2, 25] whether it is above either border by more than the noise."""
    by_slice, rows = heights.reshape(SLICES, STEPS), np.arange(SLICES)
    best = by_slice.argmax(axis=1)
    rise = by_slice[rows, best] - by_slice[:, [0, -1]].T
    return best, rise > SIGNIFICANT * deviations[:, rows, best]


def not_flat(heights: Array, deviations: Array) -> npt.NDArray[np.bool_]:
    """[25]: whether the best place of a slice is above one border at least."""
    low, high = above_borders(heights, deviations)[1]
    return low | high


def peaks(heights: Array, deviations: Array, axis: Axis) -> Array | None:
    """[n, 2] unit coordinates of the peaks inside, from the heights at `slices`; None: too few."""
    best, above = above_borders(heights, deviations)
    inside = above.all(axis=0)
    if inside.sum() < max(LEAST_SHARE * above.any(axis=0).sum(), LEAST_SLICES):
        return None
    fixed, moving = np.linspace(0.0, 1.0, SLICES)[inside], np.linspace(0.0, 1.0, STEPS)[best[inside]]
    return np.stack([fixed, moving] if axis == "almr" else [moving, fixed], axis=-1)


def regress_almr(scale: Scale, path: Array) -> tuple[float, float]:
    """a and b of the least-squares line of ALMR on log10 LR."""
    b, a = np.polyfit(np.log10(scale.lr(path[:, 0])), scale.share(path[:, 1]), 1)
    return float(a), float(b)


def regress_lr(scale: Scale, path: Array) -> tuple[float, float]:
    """a and b of the least-squares line of log10 LR on ALMR, turned round."""
    slope, intercept = np.polyfit(scale.share(path[:, 1]), np.log10(scale.lr(path[:, 0])), 1)
    slope = np.copysign(max(abs(slope), 1e-9), slope)  # upright
    return float(-intercept / slope), float(1 / slope)


regress: dict[Axis, Callable[[Scale, Array], tuple[float, float]]] = {"almr": regress_almr, "lr": regress_lr}


def loss_line(surface: Surface, replicates: int = REPLICATES, seed: int = 0, refused: str | None = None) -> Line:
    """The direction in which a loss falls fastest, integrated and fitted.

    In coordinates scaled to the studied ranges (u for log10 LR, v for ALMR, each from 0 to 1) the curve
    d(u, v)/ds = -grad L / |grad L| through the middle (0.5, 0.5) is followed downhill and uphill, until it leaves the
    square or the slope is a thousandth of the steepest. Its line is that of total least squares in these coordinates,
    through the curve's mean along its main direction, as a curve may be steep in either. The slope depends on the ranges:
    "fastest" needs a measure of both axes.

    `refused`: why the surface itself is not to be believed.
    """
    reason = "the loss does not fall from the middle of the studied range: it is flat there"

    def find(heights: Array) -> Array | None:
        return steepest_curve(surface.outer(heights))

    return with_intervals(surface, unit_grid(FIELD), find, main_direction, replicates, seed, reason, refused)


def steepest_curve(heights: Array) -> Array | None:
    """[n, 2] unit coordinates from the highest loss to the lowest, from the heights on a grid; None: it has no length."""
    field = gradients(heights.reshape(FIELD, FIELD))
    middle: Array = np.array([0.5, 0.5])
    uphill, downhill = follow_gradient(field, middle, 1.0), follow_gradient(field, middle, -1.0)
    curve = np.concatenate([uphill[:0:-1], downhill])
    return curve if len(curve) >= 10 else None


def follow_gradient(field: Array, start: Array, sign: float) -> Array:
    """[n, 2] places along the gradient (`sign` 1) or against it (-1), from the start on, `STEP` apart.

    Integrated without the normalization, which is the same curve, by an implicit method: a step of a fixed length would go
    to and fro across a valley.
    """
    least = FLAT_GRADIENT * float(np.linalg.norm(field, axis=-1).max())
    if least == 0:
        return start[None]

    def slope(_: float, place: Array) -> Array:
        return sign * np.asarray(interpolated(field, place))

    def inside(_: float, place: Array) -> float:
        return float(min(place.min(), 1 - place.max()))

    def steep(_: float, place: Array) -> float:
        return float(np.linalg.norm(interpolated(field, place))) - least

    inside.terminal = steep.terminal = True  # type: ignore[attr-defined]  # as scipy wants it
    times = (0.0, LONGEST / least)
    found = solve_ivp(slope, times, start, "LSODA", dense_output=True, events=(inside, steep), rtol=1e-4, atol=1e-6)
    moments = np.concatenate([np.linspace(a, b, 20, endpoint=False) for a, b in pairwise(found.t)] + [found.t[-1:]])
    places = found.sol(moments).T
    lengths = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(places, axis=0), axis=1))])
    at = np.arange(0.0, lengths[-1] + 1e-9, STEP)
    return np.stack([np.interp(at, lengths, places[:, axis]) for axis in (0, 1)], axis=-1)


def gradients(heights: Array) -> Array:
    """Along u and v, [FIELD, FIELD, 2]."""
    step = 1.0 / (FIELD - 1)
    return np.stack([np.gradient(heights, step, axis=axis, edge_order=2) for axis in (0, 1)], axis=-1)


def interpolated(field: Array, place: Array) -> Any:
    """Bilinear, at (u, v); beyond the borders as on them."""
    at = np.clip(place, 0.0, 1.0) * (FIELD - 1)
    low = np.minimum(at.astype(int), FIELD - 2)
    (i, j), (s, t) = low, at - low
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


def with_intervals(
    surface: Surface,
    at: Array,
    find: Callable[[Array], Array | None],
    fit: Callable[[Scale, Array], tuple[float, float]],
    replicates: int,
    seed: int,
    reason: str,
    refused: str | None,
) -> Line:
    """The line, and how much it moves on other surfaces that the runs leave possible (`Surface.inner_samples`).

    `find` makes the path of the line from the (warped) heights at `at`, `fit` the line of the path; `reason`: why there is
    no path where there is none.
    """
    path = find(surface.inner_mean(at))
    if path is None:
        return no_line(refused or reason)
    a, b = fit(surface.scale, path)
    repeated = [find(heights) for heights in surface.inner_samples(at, replicates, seed)]
    found = np.array([fit(surface.scale, again) for again in repeated if again is not None] or [(a, b)])
    if refused is None and len(found) < LEAST_REPLICATES * replicates:
        refused = f"{reason} (in {replicates - len(found)} of {replicates} surfaces that the runs leave possible)"
    angle = float(angles(surface.scale, np.array(b)))
    turned = (angles(surface.scale, found[:, 1]) - angle + 90) % 180 - 90  # a line has no sense of direction
    low, high = angle + np.percentile(turned, INTERVAL)
    ends: Array = np.percentile(found, INTERVAL, axis=0)
    if low < -90 or high > 90:
        ends = np.array([[-np.inf] * 2, [np.inf] * 2])
    (a_low, b_low), (a_high, b_high) = ends.tolist()
    points = np.stack([surface.scale.share(path[:, 1]), surface.scale.lr(path[:, 0])], axis=-1)
    return Line(a, b, angle, (a_low, a_high), (b_low, b_high), (float(low), float(high)), points, refused)


def angles(scale: Scale, b: Array) -> Array:
    """Degrees above level, in coordinates in which each axis goes from 0 to 1."""
    return np.degrees(np.arctan(b * np.ptp(scale.log_lr) / np.ptp(scale.almr)))


def no_line(reason: str) -> Line:
    """Refused."""
    nothing = (float("nan"), float("nan"))
    return Line(*nothing, nothing[0], nothing, nothing, nothing, np.zeros((0, 2)), reason)
