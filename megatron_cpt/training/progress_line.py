"""One step in one line, or two where the terminal is narrow, and how long the rest of the run will take."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

SEPARATOR = " | "
RECENT_STEPS = 50
BAR_WIDTH = 16


@dataclass(frozen=True)
class LinePart:
    """One figure of the line. The higher its rank, the earlier it goes when the line is too long."""

    rank: int
    text: str
    style: str = ""


def step_parts(row: dict[str, Any], train_iters: int, seconds_left: float | None) -> list[LinePart]:
    """The figures of one step, in the order in which they are shown."""
    parts = [
        LinePart(0, f"step {row['iteration']:,}/{train_iters:,}", "bold"),
        LinePart(1, f"loss {show_figure(row['loss'], '.4f')}", "bold cyan"),
        LinePart(4, f"lr {row['lr']:.2e}"),
        LinePart(5, f"grad norm {show_figure(row['grad_norm'], '.2f')}"),
        LinePart(3, f"{row['tokens_per_second']:,.0f} tok/s", "green"),
        LinePart(8, f"{row['tokens_per_second_per_device']:,.0f}/device"),
        LinePart(7, f"ALMR {row['almr_realised']:.4f}"),
    ]
    if row.get("mfu") is not None:
        parts.insert(-1, LinePart(6, f"MFU {100 * row['mfu']:.1f}/{100 * row['mfu_causal']:.1f}%"))
    if row.get("skipped"):
        parts.insert(1, LinePart(1, "SKIPPED", "bold red"))
    if seconds_left is not None:
        parts.append(LinePart(2, f"{show_duration(seconds_left)} left", "magenta"))
    return parts


def show_figure(value: float | None, form: str) -> str:
    """A figure that may be missing or not finite."""
    return "nan" if value is None else format(value, form)


def show_duration(seconds: float) -> str:
    """1:02:03, or 2d 01:02:03."""
    minutes, second = divmod(int(max(seconds, 0) + 0.5), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return f"{days}d {hour:02}:{minute:02}:{second:02}" if days else f"{hour}:{minute:02}:{second:02}"


def plain_line(parts: list[LinePart]) -> str:
    """The whole line."""
    return SEPARATOR.join(part.text for part in parts)


def fitting(parts: list[LinePart], width: int) -> list[LinePart]:
    """The parts that matter most, as many as fit into `width` columns (the first of all always)."""
    kept: set[int] = set()
    room = width + len(SEPARATOR)
    for place in sorted(range(len(parts)), key=lambda i: parts[i].rank):
        room -= len(parts[place].text) + len(SEPARATOR)
        if room < 0 and kept:  # also nothing shorter of less importance: the line would change from step to step
            break
        kept.add(place)
    return [part for place, part in enumerate(parts) if place in kept]


class TimeLeft:
    """How long the rest of a run will take, by the wall clock of this process.

    A step takes what the recent ones took, and beside it what has gone to everything else (validation, checkpoints) per step
    since the first ended. The first step is not typical; it counts only as long as there is no other.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.first_end: float | None = None
        self.steps = 0
        self.in_steps = 0.0
        self.recent: deque[float] = deque(maxlen=RECENT_STEPS)

    def step(self, seconds: float) -> None:
        """A step that took so long has just ended."""
        if self.first_end is None:
            self.first_end = self.clock()
            self.recent.append(seconds)
            return
        if not self.steps:
            self.recent.clear()
        self.steps += 1
        self.in_steps += seconds
        self.recent.append(seconds)
        self.last_end = self.clock()

    def seconds(self, steps_left: int) -> float | None:
        """From the end of the last step to the end of the run; None before the first step."""
        if self.first_end is None:
            return None
        per_step = sum(self.recent) / len(self.recent)
        if self.steps:
            per_step += max(self.last_end - self.first_end - self.in_steps, 0.0) / self.steps
        return per_step * steps_left


class RunProgress(Progress):
    """The line of the training step, redrawn in place; below it a bar for each task (validation).

    Not the ProgressBar of utils: it stands for days with figures that change with the width of the terminal, has a thread
    that counts its time left down during a step, and several bars.
    """

    def __init__(self, console: Console, shown: bool) -> None:
        self.row: dict[str, Any] | None = None  # before the base class, whose constructor renders once
        super().__init__(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not shown,
            refresh_per_second=4,
        )

    def show(self, row: dict[str, Any], train_iters: int, seconds_left: float | None) -> None:
        """Draw the line of this step from now on; its time left goes down until the next."""
        self.train_iters, self.seconds_left, self.shown_at = train_iters, seconds_left, time.monotonic()
        self.row = row
        self.refresh()

    def get_renderables(self) -> Iterable[RenderableType]:
        """The training line, then the tasks."""
        if self.row is not None:
            yield from self.training_lines(self.row)
        if tasks := [task for task in self.tasks if task.visible]:
            yield self.make_tasks_table(tasks)

    def training_lines(self, row: dict[str, Any]) -> list[Text]:
        """The line, and a bar if there is room for it; what does not fit goes into a second line, as far as that fits."""
        left = self.seconds_left
        if left is not None:
            left = max(left - (time.monotonic() - self.shown_at), 0.0)
        width = self.console.width - 1  # some terminals wrap a line that fills them
        parts = step_parts(row, self.train_iters, left)
        first = fitting(parts, width)
        rest = [part for part in parts if part not in first]
        lines = [Text(SEPARATOR).join(Text(part.text, part.style) for part in first)]
        if not rest and len(lines[0]) + BAR_WIDTH + 1 <= width:
            lines = [Text(" ").join([bar(row["iteration"], self.train_iters, self.console.encoding), lines[0]])]
        if rest:
            lines.append(Text(SEPARATOR).join(Text(part.text, part.style) for part in fitting(rest, width)))
        for line in lines:
            line.no_wrap, line.overflow = True, "crop"
        return lines


def bar(done: int, total: int, encoding: str) -> Text:
    """A progress bar of BAR_WIDTH columns."""
    full, empty = ("━", "━") if encoding.lower().startswith("utf") else ("#", "-")
    filled = min(BAR_WIDTH * done // max(total, 1), BAR_WIDTH)
    return Text.assemble((full * filled, "cyan"), (empty * (BAR_WIDTH - filled), "bright_black"))
