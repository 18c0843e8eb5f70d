"""Where tools print tables and text."""

from __future__ import annotations

import sys
from typing import Any, TextIO

from rich.console import Console
from rich.text import Text

WITHOUT_TERMINAL = 10_000  # columns: a log or a pipe has no width, so lines are as long as what they say


def wide_console(stream: TextIO | None = None, **options: Any) -> Console:
    """A console on `stream` (default: stderr) that is as wide as its terminal; without one nothing is wrapped."""
    stream = sys.stderr if stream is None else stream
    return Console(file=stream, width=None if stream.isatty() else WITHOUT_TERMINAL, **options)


def print_heading(console: Console, text: str) -> None:
    """Print a line above a text: a rule over the terminal, where there is one."""
    if console.is_terminal:
        console.rule(Text(text), align="left")
    else:
        console.print(Text(f"── {text} ──"))


def counted(number: int, noun: str, nouns: str | None = None) -> str:
    """As in `1 document` and `1,234 documents`; `nouns`: of several, where it is not the one with an s."""
    return f"{number:,} {noun if number == 1 else nouns or noun + 's'}"
