"""What is changed in megatron-core on every platform."""

from __future__ import annotations

import contextlib
import queue
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def withheld(package: str) -> Iterator[None]:
    """Let a package that somebody imports where it is there seem not to be there; nothing changes if it is imported already.

    megatron-core imports wandb for the figures of its inference, which is a quarter of the time that a start takes. What
    logs to W&B here imports it when it is asked to.
    """
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[package]


def hide(package: str) -> None:
    """Let a package seem not to be installed from now on, to everything in this process."""
    sys.modules[package] = None  # type: ignore[assignment]


def save_without_queue_server() -> None:
    """megatron-core's checkpoint writer starts a manager process per rank, which imports torch, to hand back its results.

    Ours come back through pipes (checkpoint/background.py), asynchronous saves too, so nothing ever goes through this queue.
    """
    import megatron.core.dist_checkpointing.strategies.filesystem_async as filesystem_async

    filesystem_async._results_queue = queue.Queue()
