"""Processes that a test has forked itself."""

from __future__ import annotations

import psutil


def own_children() -> list[psutil.Process]:
    """Children of this process that it has forked, zombies too, but for the server of forks.py.

    Other tests of the process start programs that live on, such as W&B's.
    """
    own = psutil.Process()
    return [child for child in own.children() if child.name() == own.name() and not is_server(child)]


def is_server(process: psutil.Process) -> bool:
    """Whether it is the server of forks.py, which lives as long as the tests do."""
    try:
        return any(word.endswith("/forks.py") for word in process.cmdline()[-1:])
    except psutil.Error:
        return False
