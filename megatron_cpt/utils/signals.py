"""Signals that are handled otherwise for a while."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def handling(handler: Callable[[int, FrameType | None], object], *numbers: signal.Signals) -> Iterator[None]:
    """Have `handler` called for these signals, and afterwards what was called before.

    Signals belong to the main thread: in another one nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM, which SLURM sends, ends the work as Ctrl-C does: cleanly."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    with handling(stop, signal.SIGTERM):
        yield
