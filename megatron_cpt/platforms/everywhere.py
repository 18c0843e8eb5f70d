"""What is changed in megatron-core on every platform."""

from __future__ import annotations

import contextlib
import logging
import queue
import sys
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def withheld(*packages: str) -> Iterator[None]:
    """Let packages that somebody imports where they are there seem not to be there; those imported already stay.

    megatron-core imports wandb for the figures of its inference, which is a quarter of the time that a start takes. What
    logs to W&B here imports it when it is asked to.
    """
    hidden = [package for package in packages if package not in sys.modules]
    for package in hidden:
        hide(package)
    try:
        yield
    finally:
        for package in hidden:
            del sys.modules[package]


@contextlib.contextmanager
def quiet(logger: str) -> Iterator[None]:
    """No warnings of this logger, and none of Python's: megatron-core's import warns of each optional package.

    The pages say once what is used without them; a user can do nothing about it at each start.
    """
    log = logging.getLogger(logger)
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(before)


def hide(package: str) -> None:
    """Let a package seem not to be installed from now on, to everything in this process."""
    sys.modules[package] = None  # type: ignore[assignment]


def save_without_queue_server() -> None:
    """megatron-core's checkpoint writer starts a manager process per rank, which imports torch, to hand back its results.

    Ours come back through pipes (checkpoint/background.py), asynchronous saves too, so nothing ever goes through this queue.
    """
    import megatron.core.dist_checkpointing.strategies.filesystem_async as filesystem_async

    filesystem_async._results_queue = queue.Queue()
