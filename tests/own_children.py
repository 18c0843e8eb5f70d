"""Processes that a test has started itself."""

from __future__ import annotations

import psutil


def own_children() -> list[psutil.Process]:
    """Children of this process, but for the server of forks.py, which lives as long as the tests do."""
    return [child for child in psutil.Process().children() if not is_server(child)]


def is_server(process: psutil.Process) -> bool:
    """Whether it is the server of forks.py."""
    try:
        return process.cmdline()[-1:] != [] and process.cmdline()[-1].endswith("/forks.py")
    except psutil.Error:
        return False
