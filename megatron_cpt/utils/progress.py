"""How far preprocessing is: a bar on a terminal, a line every minute in a log."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

logger = logging.getLogger(__name__)

SECONDS_BEFORE_BAR = 1.0
SECONDS_BETWEEN_LINES = 60.0


class Meter:
    """Counts input bytes and documents. It has no thread of its own: workers are forked while it runs."""

    def __init__(self, total_bytes: int, done_bytes: int = 0, of: str = "text") -> None:
        self._of, self._counted = of, 0
        console = Console(stderr=True)
        self._bar = Progress(
            BarColumn(),
            TextColumn("{task.percentage:.0f}%"),
            _Rates(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            auto_refresh=False,
        )
        self._task = self._bar.add_task("", total=total_bytes, completed=done_bytes, documents=0, speed="")
        self._terminal = sys.stderr.isatty()
        self._began = self._shown = time.monotonic()
        self._total, self._first, self._done = total_bytes, done_bytes, done_bytes
        self.documents = 0

    def advance(self, read_bytes: int, documents: int, counted: int | None = None) -> None:
        """Count one unit, and show it when it is time to. `counted`: its bytes of what the speed is of, if not all."""
        self._counted += read_bytes if counted is None else counted
        self._done += read_bytes
        self.documents += documents
        now = time.monotonic()
        if self._terminal:
            speed = rates(self._counted, self.documents, now - self._began, self._of)
            self._bar.update(self._task, advance=read_bytes, documents=self.documents, speed=speed)
            if now - self._began > SECONDS_BEFORE_BAR and now - self._shown > 0.1:
                if not self._bar.live.is_started:
                    self._bar.start()
                self._bar.refresh()
                self._shown = now
        elif now - self._shown > SECONDS_BETWEEN_LINES:
            self._shown = now
            logger.info(self._line(now - self._began))

    def _line(self, seconds: float) -> str:
        read = self._done - self._first
        left = seconds * (self._total - self._done) / read if read else 0.0
        share = f"{100 * self._done / max(self._total, 1):.1f} %"
        return f"{share}, {rates(self._counted, self.documents, seconds, self._of)}, {_clock(left)} left"

    def stop(self) -> None:
        """Remove the bar."""
        if self._bar.live.is_started:
            self._bar.stop()


def rates(counted: int, documents: int, seconds: float, of: str = "text") -> str:
    """As in `31.2 MB of text/s, 4,012 documents/s`; `counted`: bytes of what is named, and not of compressed files."""
    seconds = max(seconds, 1e-9)
    return f"{counted / 1e6 / seconds:.1f} MB of {of}/s, {documents / seconds:,.0f} documents/s"


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"


class _Rates(ProgressColumn):
    """Speed since the start."""

    def render(self, task: Task) -> Text:
        """The text of one task."""
        return Text(task.fields["speed"])


@contextmanager
def meter(total_bytes: int, done_bytes: int = 0, of: str = "text") -> Iterator[Meter]:
    """A `Meter` that is removed from the screen at the end."""
    shown = Meter(total_bytes, done_bytes, of)
    try:
        yield shown
    finally:
        shown.stop()
