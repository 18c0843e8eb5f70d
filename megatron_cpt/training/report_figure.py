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
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator, ScalarFormatter

from megatron_cpt.training.asked_mixture import AskedMixture

POINTS = 1000  # drawn of a curve; more are binned
PLACE = "place"  # field of a row: its tokens so far
FEW = 40  # steps up to which each is marked
LONGEST_NAME = 28  # of a set in a legend
CJK_FONTS = (
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei"),
    *("Droid Sans Fallback", "PingFang SC", "Hiragino Sans GB", "Arial Unicode MS", "Microsoft YaHei", "SimHei"),
)
COLORS = ("tab:red", "tab:green", "tab:purple", "tab:orange", "tab:cyan", "tab:brown", "tab:pink", "tab:olive")

Array = npt.NDArray[np.float64]


def draw(
    steps: list[dict[str, Any]],
    evaluations: list[dict[str, Any]],
    resumed: Sequence[int],
    path: str,
    asked: AskedMixture | None = None,
) -> None:
    """Write the picture; over tokens, where it is known after how many each step was.

    Args:
        steps: training rows of metrics.jsonl
        evaluations: its validation rows; without any their panels are left out
        resumed: steps after which the run was started again
        asked: ALMR that was asked for
    """
    tokens = tokens_of_steps(steps)
    by_tokens = {*resumed, *(row["iteration"] for row in evaluations)} <= tokens.keys() and len(tokens) > 1
    if by_tokens:
        steps, evaluations = with_place(steps, tokens), with_place(evaluations, tokens)
        resumed = [tokens[iteration] for iteration in resumed]
    # Names are text: a $ in them begins no formula, and a character that no font has is a box.
    settings = {"text.parse_math": False, "font.size": 9, "font.family": ["DejaVu Sans", *cjk_fonts()]}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")
        columns = 4 if evaluations else 3
        figure = Figure(figsize=(5.5 * columns, 7), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))
        FigureCanvasAgg(figure)
        axes = figure.subplots(2, columns)
        last = max(row[PLACE] if by_tokens else row["iteration"] for row in [*steps, *evaluations])
        draw_loss(axes[0][0], steps, resumed)
        if evaluations:
            draw_validation_loss(axes[0][1], evaluations)
            draw_validation(axes[0][2], evaluations)
        draw_grad_norm(axes[0][-1], steps)
        draw_learning_rate(axes[1][0], steps)
        draw_almr(axes[1][1], steps, asked if by_tokens else None)
        draw_throughput(axes[1][2], steps)
        for axis in [*axes[0], *axes[1][:3]]:
            finish_axis(axis, last, resumed, by_tokens, len(steps))
        for axis in axes[1][3:]:
            axis.set_axis_off()
        figure.savefig(path, dpi=130)


def cjk_fonts() -> list[str]:
    """Of the fonts that have Chinese, Japanese and Korean characters, those that are installed."""
    installed = {font.name for font in font_manager.fontManager.ttflist}
    return [name for name in CJK_FONTS if name in installed]


def tokens_of_steps(steps: list[dict[str, Any]]) -> dict[int, int]:
    """Step -> tokens that have been read after it; 0 -> 0."""
    return {0: 0} | {row["iteration"]: row["consumed_tokens"] for row in steps if "consumed_tokens" in row}


def with_place(rows: list[dict[str, Any]], tokens: dict[int, int]) -> list[dict[str, Any]]:
    """The rows with their place on an axis of tokens."""
    return [row | {PLACE: tokens[row["iteration"]]} for row in rows]


def finish_axis(axis: Axes, last: int, resumed: Sequence[int], by_tokens: bool, steps: int) -> None:
    """What all panels have in common.

    Args:
        last: place of the last row
        resumed: places after which the run was started again
        by_tokens: whether places are tokens, or else steps
        steps: that were taken
    """
    for place in resumed:
        axis.axvline(place, color="0.5", linewidth=0.9, linestyle=":", zorder=0.5)
    begin = 0.0 if steps > FEW else -0.02 * last
    axis.set_xlim(begin - 0.01 * last, last * 1.02 if last else 1.0)
    axis.xaxis.set_major_locator(MaxNLocator(nbins=5 if by_tokens else 6, integer=True))
    plain = FuncFormatter(lambda value, _: f"{value:,.0f}")
    axis.xaxis.set_major_formatter(EngFormatter(sep=" ") if by_tokens else plain)  # 1.5 G
    axis.set_xlabel("tokens" if by_tokens else "step")
    axis.grid(color="0.92")
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    axis.title.set_fontweight("bold")


def horizontal_places(rows: list[dict[str, Any]]) -> Array:
    """Where rows lie on the horizontal axis."""
    return column(rows, PLACE if rows and PLACE in rows[0] else "iteration")


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
    x = horizontal_places(rows)
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
        x = horizontal_places(steps)[skipped]
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


def short_name(name: str) -> str:
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
            values = row["validation"].get(name, {}) | {key: row[key] for key in ("iteration", PLACE) if key in row}
            measured.setdefault(values.get("baseline", {"iteration": 0})["iteration"], []).append(values)
        since = list(measured)[-1]
        newest = [value for value in scale * column(measured[since], figure) if math.isfinite(value)]
        said = label(newest[-1] if newest else math.nan, since)
        for rows in measured.values():
            axis.plot(
                horizontal_places(rows),
                scale * column(rows, figure),
                color=COLORS[place % len(COLORS)],
                marker="o" if len(evaluations) <= FEW or len(rows) == 1 else "",
                markersize=3.5,
                label=f" {short_name(name)}: {said}"
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
    x, y = horizontal_places(steps), column(steps, "lr")
    if len(x) > POINTS:
        keep = np.unique(np.linspace(0, len(x) - 1, POINTS).astype(np.int64))
        x, y = x[keep], y[keep]
    axis.plot(x, y, color="tab:gray", marker="o" if len(x) <= FEW else "", markersize=3.5)
    axis.set_ylim(0, 1.05 * y.max() if len(y) and y.max() > 0 else 1.0)
    labels = ScalarFormatter()  # all labels with as many digits as they need, and their power of ten above
    labels.set_powerlimits((0, 0))
    axis.yaxis.set_major_formatter(labels)


def draw_almr(axis: Axes, steps: list[dict[str, Any]], asked: AskedMixture | None) -> None:
    """ALMR of what was read so far, as asked and as realised, with the borders of stages."""
    axis.set(title="ALMR so far", ylabel="share of the additional languages")
    x, y = horizontal_places(steps), column(steps, "almr_realised")
    if asked is not None and len(x):
        wanted = np.array([asked.so_far(int(tokens)) for tokens in x], np.float64)
        axis.plot(x, wanted, color="0.6", linewidth=3.5, label="asked")
        for border in asked.borders:
            if 0 < border < x[-1]:
                axis.axvline(border, color="tab:orange", linewidth=0.9, linestyle="--", label="_border", zorder=0.6)
        if any(0 < border < x[-1] for border in asked.borders):
            axis.plot([], [], color="tab:orange", linewidth=0.9, linestyle="--", label="next stage or mixture")
    axis.plot(x, y, color="tab:blue", linewidth=1.2, marker="o" if len(x) <= FEW else "", markersize=3.5, label="realised")
    axis.set_ylim(-0.03, 1.03)
    axis.legend(loc="best", fontsize="small")


def draw_throughput(axis: Axes, steps: list[dict[str, Any]]) -> None:
    """Tokens per second, of all devices."""
    axis.set(title="Throughput", ylabel="tokens/s")
    if steps:
        draw_curve(axis, steps, "tokens_per_second", "tab:green")
        rates = column(steps, "tokens_per_second")
        axis.set_title(f"Throughput: median {np.median(rates):,.0f} tokens/s")
        axis.set_ylim(0, 1.15 * float(np.quantile(rates, 0.995)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
