"""A bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import io
import re
import sys
import time
from pathlib import Path

import pytest

import megatron_cpt
from megatron_cpt.utils import progress
from megatron_cpt.utils.progress import Meter, ProgressBar, tracked


class Terminal(io.StringIO):
    """What people look at."""

    def isatty(self) -> bool:
        return True


def at_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Stderr from now on (a fixture comes too early: pytest replaces it for the test itself)."""
    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(progress, "SECONDS_BEFORE_BAR", -1.0)
    return shown


def test_a_log_has_a_line_every_minute(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    bar, meter = ProgressBar(1000, 200, "writing"), Meter(2_000_000)
    for second in (30, 61, 100, 122):
        now[0] = 100.0 + second
        bar.show(200 + 5 * second, "5 B/s")
        meter.advance(250_000, 100)
    assert capsys.readouterr().err.splitlines() == [
        "writing: 50.5 %, 5 B/s, 0:01:39 left",
        "25.0 %, 0.0 MB of text/s, 3 documents/s, 0:03:03 left",
        "writing: 81.0 %, 5 B/s, 0:00:38 left",
        "50.0 %, 0.0 MB of text/s, 3 documents/s, 0:02:02 left",
    ]


def test_a_terminal_has_a_bar_that_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = at_terminal(monkeypatch)
    bar = ProgressBar(1000, title="writing [x]")
    for done in (250, 500):
        time.sleep(0.11)
        bar.show(done, "7 B/s [y]")
    bar.stop()
    text = terminal.getvalue()
    for part in ("writing [x]", "25%", "50%", "7 B/s [y]"):
        assert part in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor is there again
    assert text.endswith("\x1b[2K")  # and the bar is not


def test_what_is_quick_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = at_terminal(monkeypatch)
    monkeypatch.setattr(progress, "SECONDS_BEFORE_BAR", 1.0)
    assert list(tracked([1, 2, 3], "comparing")) == [1, 2, 3]
    assert terminal.getvalue() == ""


def test_items_are_counted_and_the_bar_goes_when_one_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = at_terminal(monkeypatch)
    for item in (items := tracked(["a", "b", "c"], "comparing")):
        time.sleep(0.11)
        if item == "b":
            break
    items.close()  # type: ignore[attr-defined]
    assert "33%" in terminal.getvalue()
    assert terminal.getvalue().endswith("\x1b[2K")


def test_no_other_bars_are_made() -> None:
    found = {
        path.name
        for path in Path(megatron_cpt.__file__).parent.rglob("*.py")
        if re.search(r"rich\.progress", path.read_text(encoding="utf-8"))
    }
    assert found == {"progress.py", "progress_line.py"}
