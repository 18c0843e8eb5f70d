"""Figures of models side by side, and of the checkpoints of a run."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib

matplotlib.use("Agg")  # no screen
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from megatron_cpt.evaluation.columns import Column, Measured, all_columns, score_columns
from megatron_cpt.evaluation.trajectory import TrajectoryPoint
from megatron_cpt.utils.files import replacing

GROUP = 0.8  # of the room that a group of bars has
SHARED = {"text": "bits per byte (lower is better)", "answers": "share of the answers' tokens (%)"}


def scores(measured: Measured) -> Figure | None:
    """Benchmarks with standard errors, a bar for each model. None: there are none."""
    columns = [column for column in score_columns(measured, "benchmarks") if has_numbers(measured, column)]
    if not columns:
        return None
    bars = len(columns) * (len(measured) + 1)
    figure, ax = plt.subplots(figsize=(min(max(5.5, 0.35 * bars + 1.5), 18), 4.4), layout="constrained")
    draw_bars(ax, measured, columns, [column.label for column in columns], 100)
    ax.set_ylabel("score (%), with standard errors")
    add_legend(figure, ax)
    return figure


def draw_languages(measured: Measured) -> Figure | None:
    """Bits per byte and languages of the answers. None: there are none."""
    parts = {
        "text": [column for column in score_columns(measured, "text") if has_numbers(measured, column)],
        "answers": [column for column in score_columns(measured, "answers") if has_numbers(measured, column)],
    }
    shown = {part: columns for part, columns in parts.items() if columns}
    if not shown:
        return None
    widths = [len(columns) for columns in shown.values()]
    figure, axes = plt.subplots(
        1,
        len(shown),
        figsize=(min(3 + 0.4 * sum(widths) * (len(measured) + 1), 18), 4.4),
        layout="constrained",
        squeeze=False,
        width_ratios=widths,
    )
    for ax, (part, columns) in zip(axes.flat, shown.items(), strict=True):
        names = [column.name if part == "text" else column.label.replace(" by ", "\nby ") for column in columns]
        draw_bars(ax, measured, columns, names, 1 if part == "text" else 100)
        ax.set_ylabel(SHARED[part])
    add_legend(figure, axes.flat[0])
    return figure


def has_numbers(measured: Measured, column: Column) -> bool:
    """Whether there is something to draw."""
    return any(column.number(parts) is not None for parts in measured.values())


def draw_bars(ax: Axes, measured: Measured, columns: Sequence[Column], names: Sequence[str], factor: float) -> None:
    """A group for each column, in it a bar for each model; a gap where it was not measured."""
    width = GROUP / len(measured)
    colors = plt.get_cmap("viridis")(np.linspace(0.1, 0.85, len(measured)))
    for place, ((model, parts), color) in enumerate(zip(measured.items(), colors, strict=True)):
        numbers = [column.number(parts) for column in columns]
        heights = [np.nan if number is None else factor * number.value for number in numbers]
        errors = [np.nan if number is None or number.stderr is None else factor * number.stderr for number in numbers]
        x = np.arange(len(columns)) + (place - (len(measured) - 1) / 2) * width
        ax.bar(x, heights, 0.92 * width, color=color, label=model)
        ax.errorbar(x, heights, errors, fmt="none", ecolor="black", elinewidth=1, capsize=2)
    ax.set_xticks(range(len(columns)), names, fontsize=9)
    ax.grid(axis="y", alpha=0.3)
    ax.set_axisbelow(True)
    ax.margins(x=0.02)


def add_legend(figure: Figure, ax: Axes) -> None:
    """Below all panels."""
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 6), frameon=False, fontsize=9)


def trajectory(points: Sequence[TrajectoryPoint]) -> Figure:
    """A panel for each benchmark, bits per byte and language of the answers, over tokens where all are known."""
    columns = all_columns({str(point.iteration): point.parts for point in points})
    panels: dict[str, list[Column]] = {}
    for column in columns:
        if any(column.number(point.parts) is not None for point in points):
            panels.setdefault(column.panel, []).append(column)
    across = min(3, max(1, len(panels)))
    down = max(1, -(-len(panels) // across))
    figure, grid = plt.subplots(down, across, figsize=(4.6 * across, 3.6 * down), layout="constrained", squeeze=False)
    by_tokens = all(point.tokens is not None for point in points)
    for ax, (name, lines) in zip(grid.flat, panels.items(), strict=False):
        for column in lines:
            draw_score(ax, points, column, by_tokens)
        ax.set_title(name, fontsize=10)
        ax.set_xlabel("tokens" if by_tokens else "iteration")
        if by_tokens:
            ax.xaxis.set_major_formatter(EngFormatter(sep=" "))  # 1.5 G
        ax.set_ylabel({"benchmarks": "score (%)", "text": "bits per byte", "answers": "share (%)"}[lines[0].part])
        ax.grid(alpha=0.3)
        if len(lines) > 1:
            ax.legend(fontsize=8)
    for ax in list(grid.flat)[len(panels) :]:
        ax.set_axis_off()
    return figure


def draw_score(ax: Axes, points: Sequence[TrajectoryPoint], column: Column, by_tokens: bool) -> None:
    """One number over the run, with standard errors where there are some."""
    factor = 1 if column.part == "text" else 100
    known = [(point, number) for point in points if (number := column.number(point.parts)) is not None]
    x = [point.tokens if by_tokens and point.tokens is not None else point.iteration for point, _ in known]
    errors = [np.nan if number.stderr is None else factor * number.stderr for _, number in known]
    shown = None if np.isnan(errors).all() else errors
    label = f"by {column.label.split(' by ')[1]}" if column.way else None
    ax.errorbar(x, [factor * number.value for _, number in known], shown, marker=".", capsize=2, label=label)


def save_figure(figure: Figure, path: str) -> None:
    """As PNG, whole or not at all."""
    with replacing(path, ".png") as temporary:
        figure.savefig(temporary, dpi=130)
    plt.close(figure)
