"""How far a tool is: a bar on a terminal, a line every minute in a log. (Of a training: training/progress_line.py.)"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

logger = logging.getLogger(__name__)

Item = TypeVar("Item")

SECONDS_BEFORE_BAR = 1.0
SECONDS_BETWEEN_LINES = 60.0


class ProgressBar:
    """A bar on a terminal, once it takes longer than a second; a line every minute in a log.

    It has no thread of its own: processes are forked while it runs.
    """

    def __init__(self, total: int, done: int = 0, title: str = "") -> None:
        self._terminal = sys.stderr.isatty()
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.percentage:.0f}%"),
            TextColumn("{task.fields[speed]}", markup=False),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
            auto_refresh=False,
        )
        self._task = self._bar.add_task(title, total=total, completed=done, speed="")
        self._title, self._total, self._first = title, total, done
        self._began = self._shown = time.monotonic()

    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self._began

    def show(self, done: int, speed: str = "") -> None:
        """Show how much is done, and how fast it went, when it is time to."""
        now = time.monotonic()
        if self._terminal:
            self._bar.update(self._task, completed=done, speed=speed)
            if now - self._began > SECONDS_BEFORE_BAR and now - self._shown > 0.1:
                if not self._bar.live.is_started:
                    self._bar.start()
                self._bar.refresh()
                self._shown = now
        elif now - self._shown > SECONDS_BETWEEN_LINES:
            self._shown = now
            logger.info(self._line(done, speed))

    def _line(self, done: int, speed: str) -> str:
        read = done - self._first
        left = self.seconds() * (self._total - done) / read if read else 0.0
        share = f"{100 * done / max(self._total, 1):.1f} %"
        figures = ", ".join(part for part in (share, speed, f"{_clock(left)} left") if part)
        return f"{self._title}: {figures}" if self._title else figures

    def stop(self) -> None:
        """Remove the bar."""
        if self._bar.live.is_started:
            self._bar.stop()


def tracked(items: Sequence[Item], title: str) -> Iterator[Item]:
    """The items, with a bar that says how many of them have been dealt with."""
    bar = ProgressBar(len(items), title=title)
    try:
        for number, item in enumerate(items):
            bar.show(number)
            yield item
    finally:
        bar.stop()


class Meter:
    """Counts input bytes and documents, with a bar."""

    def __init__(self, total_bytes: int, done_bytes: int = 0, of: str = "text") -> None:
        self._bar = ProgressBar(total_bytes, done_bytes)
        self._of, self._counted, self._done = of, 0, done_bytes
        self.documents = 0

    def advance(self, read_bytes: int, documents: int, counted: int | None = None) -> None:
        """Count one unit. `counted`: its bytes of what the speed is of, if not all."""
        self._counted += read_bytes if counted is None else counted
        self._done += read_bytes
        self.documents += documents
        self._bar.show(self._done, rates(self._counted, self.documents, self._bar.seconds(), self._of))

    def stop(self) -> None:
        """Remove the bar."""
        self._bar.stop()


def rates(counted: int, documents: int, seconds: float, of: str = "text") -> str:
    """As in `31.2 MB of text/s, 4,012 documents/s`; `counted`: bytes of what is named, and not of compressed files."""
    seconds = max(seconds, 1e-9)
    return f"{counted / 1e6 / seconds:.1f} MB of {of}/s, {documents / seconds:,.0f} documents/s"


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"


@contextmanager
def meter(total_bytes: int, done_bytes: int = 0, of: str = "text") -> Iterator[Meter]:
    """A `Meter` that is removed from the screen at the end."""
    shown = Meter(total_bytes, done_bytes, of)
    try:
        yield shown
    finally:
        shown.stop()
