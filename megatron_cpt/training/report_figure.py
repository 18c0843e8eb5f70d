"""The curves of a run in one picture: training loss, held-out text, learning rate, throughput."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg  # needs no display
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator

POINTS = 1000  # drawn of a curve; more are binned
FEW = 40  # steps up to which each is marked
LONGEST_NAME = 28  # of a set in a legend
CJK_FONTS = (
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei"),
    *("Droid Sans Fallback", "PingFang SC", "Hiragino Sans GB", "Arial Unicode MS", "Microsoft YaHei", "SimHei"),
)
COLORS = ("tab:red", "tab:green", "tab:purple", "tab:orange", "tab:cyan", "tab:brown", "tab:pink", "tab:olive")

Array = npt.NDArray[np.float64]


def draw(steps: list[dict[str, Any]], evaluations: list[dict[str, Any]], resumed: Sequence[int], path: str) -> None:
    """Write the picture.

    Args:
        steps: training rows of metrics.jsonl
        evaluations: its validation rows; without any their panels are left out
        resumed: steps after which the run was started again
    """
    # Names are text: a $ in them begins no formula, and a character that no font has is a box.
    settings = {"text.parse_math": False, "font.size": 9, "font.family": ["DejaVu Sans", *cjk_fonts()]}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")
        columns = 3 if evaluations else 2
        figure = Figure(figsize=(5.5 * columns, 7), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))
        FigureCanvasAgg(figure)
        axes = figure.subplots(2, columns)
        last = max(row["iteration"] for row in [*steps, *evaluations])
        draw_loss(axes[0][0], steps, resumed)
        if evaluations:
            draw_validation_loss(axes[0][1], evaluations)
            draw_validation(axes[0][2], evaluations)
            draw_grad_norm(axes[1][1], steps)
        else:
            draw_grad_norm(axes[0][1], steps)
        draw_learning_rate(axes[1][0], steps)
        draw_throughput(axes[1][-1], steps)
        for axis in axes.flat:
            finish_axis(axis, last, resumed)
        figure.savefig(path, dpi=130)


def cjk_fonts() -> list[str]:
    """Of the fonts that have Chinese, Japanese and Korean characters, those that are installed."""
    installed = {font.name for font in font_manager.fontManager.ttflist}
    return [name for name in CJK_FONTS if name in installed]


def finish_axis(axis: Axes, last: int, resumed: Sequence[int]) -> None:
    """What all panels have in common."""
    for iteration in resumed:
        axis.axvline(iteration, color="0.5", linewidth=0.9, linestyle=":", zorder=0.5)
    begin = 0.0 if last > FEW else -0.02 * last
    axis.set_xlim(begin - 0.01 * last, last * 1.02 if last else 1.0)
    axis.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axis.set_xlabel("step")
    axis.grid(color="0.92")
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    axis.title.set_fontweight("bold")


def column(rows: list[dict[str, Any]], name: str) -> Array:
    """A field of all rows; what is missing or null is nan."""
    return np.array([math.nan if row.get(name) is None else float(row[name]) for row in rows], np.float64)


def binned(x: Array, y: Array) -> tuple[Array, Array, Array, Array]:
    """Position, mean, lowest and highest of at most POINTS bins of equally many rows; nan where a bin has nothing."""
    bins = np.array_split(np.arange(len(x)), min(len(x), POINTS))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Mean of empty slice")
        warnings.filterwarnings("ignore", message="All-NaN")
        figures = [(x[b].mean(), np.nanmean(y[b]), np.nanmin(y[b]), np.nanmax(y[b])) for b in bins]
    place, mean, low, high = np.array(figures, np.float64).reshape(-1, 4).T
    return place, mean, low, high


def running_median(y: Array, width: int) -> tuple[npt.NDArray[np.int64], Array]:
    """At most POINTS places, and at each the median of the `width` values around it (of fewer at the ends), nans left out.

    A median, so that one spike is one spike and no plateau.
    """
    places = np.unique(np.linspace(0, len(y) - 1, min(len(y), POINTS)).astype(np.int64))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="All-NaN")
        medians = [np.nanmedian(y[max(place - width // 2, 0) : place - width // 2 + width]) for place in places]
    return places, np.array(medians, np.float64)


def draw_curve(axis: Axes, rows: list[dict[str, Any]], name: str, color: str, y: Array | None = None) -> None:
    """A noisy series: each value, or the range of each bin, in a light tone, and its running median."""
    x = column(rows, "iteration")
    y = column(rows, name) if y is None else y
    if len(x) <= FEW:
        axis.plot(x, y, color=color, marker="o", markersize=3.5, linewidth=1.2)
        return
    place, mean, low, high = binned(x, y)
    if len(x) > POINTS:
        axis.fill_between(place, low, high, color=color, alpha=0.25, linewidth=0)
    else:
        axis.plot(place, mean, color=color, alpha=0.35, linewidth=0.8)
    width = max(len(x) // 50, 5)
    places, smooth = running_median(y, width)
    axis.plot(x[places], smooth, color=color, linewidth=1.6, label=f"median of {width:,} steps")
    limit(axis, y)


def limit(axis: Axes, y: Array) -> None:
    """Leave the few farthest values outside when they would press all others flat."""
    known = y[np.isfinite(y)]
    if len(known) < FEW:
        return
    low, high = np.quantile(known, [0.005, 0.995])
    space = 0.15 * (high - low)
    if space > 0 and (known.max() > high + 2 * space or known.min() < low - 2 * space):
        axis.set_ylim(max(low - space, known.min() - space), min(high + space, known.max() + space))


def draw_loss(axis: Axes, steps: list[dict[str, Any]], resumed: Sequence[int]) -> None:
    """Training loss; skipped steps are marked below and not part of the curve. Its legend speaks for all panels."""
    axis.set(title="Training loss", ylabel="nats per token")
    skipped = np.array([bool(row.get("skipped")) for row in steps], bool)
    y = np.where(skipped, np.nan, column(steps, "loss"))
    if np.isfinite(y).any():
        draw_curve(axis, steps, "loss", "tab:blue", y)
    else:
        axis.set_yticks([])
    if skipped.any():
        x = column(steps, "iteration")[skipped]
        axis.plot(
            x,
            np.full(len(x), 0.02),
            transform=axis.get_xaxis_transform(),
            linestyle="none",
            marker="|",
            markersize=9,
            color="tab:red",
            label=f"skipped steps: {len(x):,}",
        )
    if resumed:
        axis.plot([], [], color="0.5", linewidth=0.9, linestyle=":", label="resumed")
    if axis.get_legend_handles_labels()[1]:
        axis.legend(loc="upper right", fontsize="small")


def draw_grad_norm(axis: Axes, steps: list[dict[str, Any]]) -> None:
    """Gradient norm before clipping."""
    axis.set(title="Gradient norm", ylabel="before clipping")
    y = column(steps, "grad_norm")
    if np.isfinite(y).any():
        draw_curve(axis, steps, "grad_norm", "tab:brown")
        axis.set_ylim(bottom=0)
    else:
        axis.set_yticks([])


def shortened(name: str) -> str:
    """A set's name, not longer than a legend has room for."""
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"


def draw_sets(
    axis: Axes, evaluations: list[dict[str, Any]], figure: str, scale: float, label: Callable[[float, int], str]
) -> None:
    """A curve of `figure` for each validation set, with a gap wherever the set began to be measured in another way.

    Args:
        label: of the newest value (times `scale`) and the step of its baseline, what to say behind the set's name
    """
    for place, name in enumerate(dict.fromkeys(name for row in evaluations for name in row["validation"])):
        measured: dict[int, list[dict[str, Any]]] = {}  # by the step of the baseline
        for row in evaluations:
            values = row["validation"].get(name, {}) | {"iteration": row["iteration"]}
            measured.setdefault(values.get("baseline", {"iteration": 0})["iteration"], []).append(values)
        since = list(measured)[-1]
        newest = [value for value in scale * column(measured[since], figure) if math.isfinite(value)]
        said = label(newest[-1] if newest else math.nan, since)
        for rows in measured.values():
            axis.plot(
                column(rows, "iteration"),
                scale * column(rows, figure),
                color=COLORS[place % len(COLORS)],
                marker="o" if len(evaluations) <= FEW or len(rows) == 1 else "",
                markersize=3.5,
                label=f" {shortened(name)}: {said}"
                if rows is measured[since]
                else None,  # one that begins with _ is left out
            )
    axis.margins(y=0.12)
    axis.legend(loc="best", fontsize="small")


def draw_validation_loss(axis: Axes, evaluations: list[dict[str, Any]]) -> None:
    """Loss of each set, as it is."""
    axis.set(title="Held-out text: loss", ylabel="nats per token")
    draw_sets(axis, evaluations, "loss", 1.0, lambda now, since: f"{now:.4f}")


def draw_validation(axis: Axes, evaluations: list[dict[str, Any]]) -> None:
    """Bits per byte of each set: the change since it was first measured so, or as it is where nothing has changed."""
    if any(figures.get("bits_per_byte_change") for row in evaluations for figures in row["validation"].values()):
        axis.set(title="Held-out text: change of bits per byte", ylabel="change in %, lower is better")
        draw_sets(axis, evaluations, "bits_per_byte_change", 100, lambda now, since: f"{now:+.1f} % since step {since:,}")
        axis.axhline(0, color="0.4", linewidth=0.8)
    else:
        axis.set(title="Held-out text: bits per byte", ylabel="lower is better")
        draw_sets(axis, evaluations, "bits_per_byte", 1.0, lambda now, since: f"{now:.4f}")


def draw_learning_rate(axis: Axes, steps: list[dict[str, Any]]) -> None:
    """Learning rate."""
    axis.set(title="Learning rate")
    x, y = column(steps, "iteration"), column(steps, "lr")
    if len(x) > POINTS:
        keep = np.unique(np.linspace(0, len(x) - 1, POINTS).astype(np.int64))
        x, y = x[keep], y[keep]
    axis.plot(x, y, color="tab:gray", marker="o" if len(x) <= FEW else "", markersize=3.5)
    axis.set_ylim(0, 1.05 * y.max() if len(y) and y.max() > 0 else 1.0)
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.1e}" if value else "0"))


def draw_throughput(axis: Axes, steps: list[dict[str, Any]]) -> None:
    """Tokens per second, of all devices."""
    axis.set(title="Throughput", ylabel="tokens/s")
    if steps:
        draw_curve(axis, steps, "tokens_per_second", "tab:green")
        rates = column(steps, "tokens_per_second")
        axis.set_title(f"Throughput: median {np.median(rates):,.0f} tokens/s")
        axis.set_ylim(0, 1.15 * float(np.quantile(rates, 0.995)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
