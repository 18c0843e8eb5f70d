"""The figures of a study, as in the paper: two contours with their lines, trajectories; and a Pareto plot."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no screen
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter

from megatron_cpt.study.fit import FEWEST_POINTS, Fit, FittedSurface, equation
from megatron_cpt.study.frontier import Line
from megatron_cpt.study.results import MEAN_METRIC, Results
from megatron_cpt.study.surfaces import Array, Surface, unit_grid
from megatron_cpt.utils.files import replacing

GRID = 101
LEVELS = 14
RUN: dict[str, Any] = {"color": "white", "edgecolors": "black", "linewidths": 0.7, "s": 22, "zorder": 3}
CHOSEN: dict[str, Any] = {"marker": "*", "s": 260, "color": "#ffcc00", "edgecolors": "black", "linewidths": 0.9, "zorder": 5}
TITLES = {
    "general": "general loss (nats per token)",
    "additional": "additional loss (nats per token)",
    "mixed": "validation loss on the run's own mixture (nats per token)",
    "balanced": "mean change of both losses (lower is better)",
    MEAN_METRIC: "mean metric (higher is better)",
}
Chosen = tuple[float, float] | None  # ALMR, learning rate


def contours(results: Results, fit: Fit, chosen: Chosen) -> Figure:
    """The paper's figure 1: loss with the line along which it falls fastest; metric with its frontier."""
    right = fit.frontier_of
    figure, axes = plt.subplots(1, 2, figsize=(13, 5.2), layout="constrained")
    draw_surface(axes[0], "mixed", fit.surfaces["mixed"], results, chosen, "viridis_r")
    if fit.line is not None:
        draw_almr_line(axes[0], fit.line, "steepest descent", "#e63946")
    draw_surface(axes[1], right, fit.surfaces[right], results, chosen, "viridis" if right == MEAN_METRIC else "viridis_r")
    if fit.frontier is not None:
        draw_almr_line(axes[1], fit.frontier, "frontier", "#e63946", "peaks")
    for ax in axes:
        legend_below(ax)
    return figure


def draw_language_losses(results: Results, fit: Fit, chosen: Chosen) -> Figure:
    """Losses of both languages."""
    figure, axes = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    for ax, name in zip(axes, ("general", "additional"), strict=True):
        draw_surface(ax, name, fit.surfaces[name], results, chosen, "viridis_r")
        legend_below(ax)
    return figure


def legend_below(ax: Axes) -> None:
    """What the marks are, out of the contours' way."""
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, frameon=False, fontsize=9)


def draw_surface(ax: Axes, name: str, fitted: FittedSurface, results: Results, chosen: Chosen, colors: str) -> None:
    """Filled contours over (LR, ALMR), with the runs and the chosen pair."""
    rows = results.last(name)
    pairs = sorted({(row["lr"], row["almr"]) for row in rows})
    if len(pairs) < FEWEST_POINTS:  # contours would be invented
        rates, shares = draw_points(ax, name, rows, pairs, colors)
    else:
        rates, shares = draw_contours(ax, fitted.surface, colors)
        ax.scatter(*zip(*pairs, strict=True), label="runs", clip_on=False, **RUN)
    diverged = sorted({(row["lr"], row["almr"]) for row in results.rows if row["outcome"] == "diverged"})
    if diverged:
        x, y = zip(*diverged, strict=True)
        inside = [(a, b) for a, b in zip(x, y, strict=True) if rates.min() <= a <= rates.max()]
        if inside:
            ax.scatter(*zip(*inside, strict=True), marker="x", color="#e63946", label="diverged", zorder=4, clip_on=False)
    if chosen is not None:
        ax.scatter([chosen[1]], [chosen[0]], label="chosen", clip_on=False, **CHOSEN)
    ax.set_xscale("log")
    few_decades = rates.max() / rates.min() < 30
    if few_decades:
        ax.xaxis.set_major_locator(FixedLocator([f * 10.0**n for n in range(-12, 3) for f in (1, 2, 5)]))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:g}"))
    else:
        ax.xaxis.set_major_locator(LogLocator())
    ax.xaxis.set_minor_formatter(NullFormatter())  # its labels overlap
    ax.set_xlabel("learning rate")
    ax.set_ylabel("ALMR")
    flat = "\nnot supported: see the notes" if fitted.refused else ""
    ax.set_title(TITLES[name] + flat, fontsize=11)
    ax.set_xlim(rates.min(), rates.max())
    ax.set_ylim(shares.min(), shares.max())


def draw_points(
    ax: Axes, name: str, rows: Sequence[dict[str, Any]], pairs: Sequence[tuple[float, float]], colors: str
) -> tuple[Array, Array]:
    """The means of a few pairs as they were measured; returns the ranges of learning rate and ALMR."""
    means = [np.mean([row[name] for row in rows if (row["lr"], row["almr"]) == pair]) for pair in pairs]
    x, y = (np.array(values) for values in zip(*pairs, strict=True))
    drawn = ax.scatter(x, y, c=means, cmap=colors, label="runs", clip_on=False, **RUN | {"s": 90, "color": None})
    for place, mean in zip(pairs, means, strict=True):
        ax.annotate(f"{mean:.4g}", place, xytext=(7, 7), textcoords="offset points", fontsize=8)
    ax.figure.colorbar(drawn, ax=ax, pad=0.02, format="%.4g")
    return np.array([x.min() / 1.3, x.max() * 1.3]), np.array([max(y.min() - 0.08, -0.05), min(y.max() + 0.08, 1.05)])


def draw_contours(ax: Axes, surface: Surface, colors: str) -> tuple[Array, Array]:
    """A filled surface; returns its learning rates and ALMRs."""
    at = unit_grid(GRID)
    rates, shares = (part.reshape(GRID, GRID) for part in (surface.scale.lr(at[:, 0]), surface.scale.share(at[:, 1])))
    heights = surface.mean(at).reshape(GRID, GRID)
    levels: Any = LEVELS
    shades = None
    if surface.warp is not None:  # where the differences are, not evenly over a range that a few runs stretch
        inner = surface.inner(heights)
        levels = surface.outer(np.linspace(inner.min() - 1e-9, inner.max() + 1e-9, LEVELS + 1))
        shades = BoundaryNorm(levels, 256)
    filled = ax.contourf(rates, shares, heights, levels=levels, cmap=colors, norm=shades)
    lines = ax.contour(rates, shares, heights, levels=filled.levels, colors="black", linewidths=0.3, alpha=0.5)
    ax.clabel(lines, list(lines.levels)[::2], fontsize=7, fmt="%.4g")
    ax.figure.colorbar(filled, ax=ax, pad=0.02, format="%.4g")
    return rates, shares


def draw_almr_line(ax: Axes, line: Line, label: str, color: str, points: str | None = None) -> None:
    """ALMR = a + b log10 LR as far as its points go; dotted where nothing should be concluded from it."""
    if not np.isfinite(line.a):
        ax.plot([], [], " ", label=f"no {label}: see the notes")
        return
    limits = ax.get_xlim(), ax.get_ylim()
    if points is not None:
        ax.scatter(line.points[:, 1], line.points[:, 0], marker=".", s=14, color=color, label=points, zorder=4)
    else:
        ax.plot(line.points[:, 1], line.points[:, 0], color=color, linewidth=1, alpha=0.7)
    rates, shares = ends_within(line, limits)
    style, refused = (":", " (not supported: see the notes)") if line.refused else ("--", "")
    ax.plot(rates, shares, style, color=color, linewidth=1.8, label=f"{label}: {equation(line)}{refused}", zorder=4)
    ax.set_xlim(limits[0])
    ax.set_ylim(limits[1])


def ends_within(line: Line, limits: tuple[tuple[float, float], tuple[float, float]]) -> tuple[Array, Array]:
    """Learning rates and ALMRs of the two ends of the line: as far as its points go along both axes, within the picture.

    A steep line covers all ALMRs of its points within a narrow range of learning rates, perhaps wider than these have.
    """
    (lowest, highest), (least, most) = limits
    log_lr, almr = np.log10(line.points[:, 1]), line.points[:, 0]
    if abs(line.angle) > 45:
        shares = np.clip([almr.min(), almr.max()], least, most)
        ends = np.clip((shares - line.a) / line.b, np.log10(lowest), np.log10(highest))
    else:
        ends = np.array([log_lr.min(), log_lr.max()])
    return 10**ends, line.a + line.b * ends


def trajectories(results: Results, lr: float) -> Figure:
    """The paper's figure 2: losses and scores along the tokens, one line for each ALMR, at one learning rate."""
    rows = [row for row in results.rows if row["lr"] == lr and row["tokens"] is not None]
    names = ["general", "additional", *results.scores]
    if len(results.scores) > 1:
        names.append(MEAN_METRIC)
    names = [name for name in names if any(row.get(name) is not None for row in rows)]
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    figure, grid = plt.subplots(lines, columns, figsize=(4.6 * columns, 3.6 * lines), layout="constrained", squeeze=False)
    shares = sorted({row["almr"] for row in rows})
    colors = plt.get_cmap("plasma")(np.linspace(0.05, 0.85, len(shares)))
    for ax, name in zip(grid.flat, names, strict=False):
        for share, color in zip(shares, colors, strict=True):
            of_share = [row for row in rows if row["almr"] == share and row.get(name) is not None]
            tokens = sorted({row["tokens"] for row in of_share})
            found = [[row[name] for row in of_share if row["tokens"] == t] for t in tokens]
            means = np.array([np.mean(values) for values in found])
            spread = np.array([np.std(values) for values in found])
            ax.plot(tokens, means, marker="." if len(tokens) < 20 else None, color=color, label=f"ALMR {share:g}")
            ax.fill_between(tokens, means - spread, means + spread, color=color, alpha=0.15, linewidth=0)
        ax.set_title(TITLES.get(name, name), fontsize=10)
        ax.set_xlabel("tokens")
        ax.grid(alpha=0.3)
    for ax in list(grid.flat)[len(names) :]:
        ax.set_axis_off()
    grid.flat[0].legend(fontsize=8)
    bands = "; bands: one standard deviation over seeds" if len({row["seed"] for row in rows}) > 1 else ""
    figure.suptitle(f"learning rate {lr:g}{bands}", fontsize=10)
    return figure


def pareto(results: Results, fit: Fit, chosen: Chosen, max_general_rise: float | None) -> Figure:
    """What the additional language gains against what the general one loses, a point for each pair; the chosen pair where
    the surfaces have it, if it was not run.
    """
    starts = {row["run"]: row for row in results.rows if row["iteration"] == 0}
    pairs: dict[tuple[float, float], list[tuple[float, float]]] = {}
    for row in results.last("general"):
        start = starts[row["run"]]
        change = tuple(100 * (row[group] / start[group] - 1) for group in ("general", "additional"))
        pairs.setdefault((row["almr"], row["lr"]), []).append(change)
    places = {pair: np.mean(changes, axis=0) for pair, changes in pairs.items()}
    figure, ax = plt.subplots(figsize=(8, 5.6), layout="constrained")
    rates = sorted({lr for _, lr in places})
    for marker, lr in zip(markers(len(rates)), rates, strict=True):
        here = [(almr, place) for (almr, rate), place in places.items() if rate == lr]
        x, y = np.array([place for _, place in here]).T
        drawn = ax.scatter(
            x, y, c=[almr for almr, _ in here], cmap="plasma", vmin=0, vmax=1, marker=marker, s=55, edgecolors="black",
            linewidths=0.5, label=f"LR {lr:.3g}", zorder=3,
        )  # fmt: skip
    figure.colorbar(drawn, ax=ax, label="ALMR")
    front = pareto_front([tuple(place) for place in places.values()])
    ax.plot(*zip(*front, strict=True), color="gray", linewidth=1, zorder=1, label="Pareto front")
    if max_general_rise is not None:
        ax.axvline(100 * max_general_rise, color="#e63946", linestyle="--", linewidth=1, label="limit")
    if chosen is not None:
        place = places[chosen] if chosen in places else expected_changes(results, fit, chosen)
        label = "chosen" if chosen in places else "chosen (by the surfaces)"
        ax.scatter([place[0]], [place[1]], label=label, **CHOSEN)
    ax.set_xlabel("change of the general loss (%)")
    ax.set_ylabel("change of the additional loss (%)")
    x, y = np.array(list(places.values())).T
    right, top = most_shown(x), most_shown(y)
    beyond = int(((x > (np.inf if right is None else right)) | (y > (np.inf if top is None else top))).sum())
    for least, most, limit in ((x.min(), right, ax.set_xlim), (y.min(), top, ax.set_ylim)):
        if most is not None:
            limit(least - 0.06 * (most - least), most)
    outside = f" ({beyond} pairs are beyond the axes)" if beyond else ""
    ax.set_title(f"both losses since the start: lower left is better{outside}", fontsize=11)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    return figure


def expected_changes(results: Results, fit: Fit, pair: tuple[float, float]) -> list[float]:
    """Of the general and the additional loss since the start, per cent, by their surfaces."""
    changes = []
    for name in ("general", "additional"):
        surface = fit.surfaces[name].surface
        start = float(np.mean([row[name] for row in results.rows if row["iteration"] == 0]))
        changes.append(100 * (float(surface.mean(surface.scale.unit(*(np.array([x]) for x in pair)))[0]) / start - 1))
    return changes


def most_shown(values: Array) -> float | None:
    """Where an axis ends: a few values far above all others, of runs that forgot everything, would leave no room for these.
    None: it shows all.
    """
    usual, most = float(np.percentile(values, 75)), float(values.max())
    width = usual - float(values.min())
    return usual + width if most > usual + 2 * width else None


def markers(number: int) -> list[str]:
    """A shape for each learning rate."""
    shapes = "ovs^DP*Xhd<>"
    return [shapes[i % len(shapes)] for i in range(number)]


def pareto_front(places: Sequence[tuple[float, ...]]) -> list[tuple[float, ...]]:
    """Those that no other is better than in both, in order."""
    front: list[tuple[float, ...]] = []
    for place in sorted(places):
        if not front or place[1] < front[-1][1]:
            front.append(place)
    return front


def laws(results: Results, fit: Fit) -> Figure | None:
    """D-CPT: measured losses and the law's over the ratio, one line for each number of tokens, at the learning rate whose
    law predicts best; and critical mixture ratios. None: nothing was fitted.
    """
    quantities = [name for name in ("general", "additional") if any(law.quantity == name for law in fit.d_cpt)]
    number = len(quantities) + bool(fit.cmr)
    if not number:
        return None
    figure, (axes,) = plt.subplots(1, number, figsize=(5 * number, 4.4), layout="constrained", squeeze=False)
    for ax, quantity in zip(axes, quantities, strict=False):
        best = min((law for law in fit.d_cpt if law.quantity == quantity), key=lambda law: law.held_out.error)
        rows = [r for r in results.rows if r["lr"] == best.lr and r["outcome"] == "finished" and r["iteration"] > 0]
        rows = [row for row in rows if row["almr"] != (1.0 if quantity == "general" else 0.0)]  # as for the fit
        budgets = sorted({row["tokens"] for row in rows})
        kept = spread_evenly(budgets, 5)
        shares = np.linspace(min(row["almr"] for row in rows), max(row["almr"] for row in rows), 101)
        for tokens, color in zip(kept, plt.get_cmap("viridis")(np.linspace(0.1, 0.9, len(kept))), strict=True):
            here = [row for row in rows if row["tokens"] == tokens]
            ax.scatter([row["almr"] for row in here], [row[quantity] for row in here], s=14, color=color)
            ratio = 1 - shares if quantity == "general" else shares
            ax.plot(
                shares, best.law.loss(np.full_like(shares, tokens), ratio), color=color, label=f"{tokens / 1e6:.3g} M tokens"
            )
        off = f"{best.held_out.nats:.2g} nats off, {best.held_out.explained:.0%} of their differences explained"
        ax.set_title(f"D-CPT, {quantity}, LR {best.lr:g}\nleft-out ratios: {off}", fontsize=9)
        ax.set_xlabel("ALMR")
        ax.set_ylabel("loss (nats per token)")
        ax.legend(fontsize=8)
    for lr, law in fit.cmr.items():
        (dots,) = axes[-1].plot(law.tokens, law.ratios, "o", markersize=4, label=f"LR {lr:g}")
        tokens = np.linspace(law.tokens.min(), law.tokens.max() * 1.3, 200)
        axes[-1].plot(tokens, [law.ratio(t) for t in tokens], color=dots.get_color())
    if fit.cmr:
        axes[-1].set_title("critical mixture ratio (CMR)", fontsize=10)
        axes[-1].set_xlabel("tokens")
        axes[-1].set_ylabel("largest ALMR within the tolerance")
        axes[-1].legend(fontsize=8)
    return figure


def spread_evenly(values: Sequence[Any], most: int) -> list[Any]:
    """At most so many of them, evenly, with the first and the last."""
    if len(values) <= most:
        return list(values)
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]


def save_all(folder: str, drawn: Iterable[tuple[str, Callable[[], Figure | None]]]) -> list[str]:
    """Draw and write PNGs; returns the paths of those that there are."""
    paths = []
    for name, draw in drawn:
        figure = draw()
        path = os.path.join(folder, f"{name}.png")
        if figure is None:
            with contextlib.suppress(FileNotFoundError):
                os.remove(path)  # of other results
            continue
        with replacing(path, ".png") as temporary:
            figure.savefig(temporary, dpi=130)
        plt.close(figure)
        paths.append(path)
    return paths


def chosen_pair(choice: dict[str, Any] | None) -> Chosen:
    """Of choice.json."""
    return None if choice is None else (choice["almr"], choice["lr"])
