"""The line of a step fits the terminal, and the time left is what will pass."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from tiny_logs import step_row

from megatron_cpt.training.progress_line import RunProgress, TimeLeft, fitting, plain_line, show_duration, step_parts


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("width", [20, 40, 79, 119, 199])
def test_parts_go_by_importance_until_the_line_fits(width: int) -> None:
    parts = step_parts(step_row(1200, tokens_per_second=1234567.0), 50_000, 123456.0)
    kept = fitting(parts, width)
    assert len(plain_line(kept)) <= width
    assert max(part.rank for part in kept) < min([part.rank for part in parts if part not in kept], default=99)
    assert (len(kept) == len(parts)) == (width == 199)
    assert "loss" in plain_line(kept) or width == 20
    assert ("left" in plain_line(kept)) == (width > 40)


def test_the_step_is_shown_however_narrow_the_terminal() -> None:
    assert plain_line(fitting(step_parts(step_row(3), 20, None), 1)) == "step 3/20"


def test_a_skipped_step_shows_even_where_there_is_little_room() -> None:
    parts = step_parts(step_row(3, loss=float("nan"), skipped="loss is nan"), 20, 5.0)
    assert plain_line(fitting(parts, 40)) == "step 3/20 | SKIPPED | loss nan"


def test_without_a_known_peak_there_is_no_utilisation() -> None:
    row = step_row(3)
    del row["mfu"], row["mfu_causal"]
    assert "MFU" not in plain_line(step_parts(row, 20, None))
    assert "MFU 41.2/38.9%" in plain_line(step_parts(step_row(3), 20, None))


@pytest.mark.parametrize("width", [50, 80, 120, 200])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_nothing_wraps(width: int, encoding: str) -> None:
    written = io.BytesIO()
    console = Console(file=io.TextIOWrapper(written, encoding), force_terminal=True, width=width, legacy_windows=False)
    progress = RunProgress(console, True)
    progress.add_task("validation", total=10)
    progress.show(step_row(1200), 50_000, 1000.0)
    lines = console.render_lines(progress.get_renderable(), pad=False)
    assert len(lines) == (2 if width == 200 else 3)  # a second line takes what does not fit, and the validation's bar
    texts = ["".join(segment.text for segment in line) for line in lines]
    assert all(len(text) <= width for text in texts)
    assert texts[0].encode(encoding).count(b"|") >= 1
    if width >= 80:
        assert all(word in texts[0] + texts[1] for word in ("loss", "lr", "grad norm", "tok/s", "/device", "ALMR", "left"))
    assert ("━" in texts[0] or "-----" in texts[0]) == (width == 200)


def test_time_left_counts_what_lies_between_steps() -> None:
    clock = Clock()
    left = TimeLeft(clock)
    assert left.seconds(10) is None
    clock.now += 60  # loading and the first validation, which is not done again
    left.step(30.0)
    assert left.seconds(10) == 300.0  # nothing else is known
    for iteration in range(1, 101):
        clock.now += 2.0 + (50.0 if iteration % 10 == 0 else 0.0)  # 50 s of validation before every tenth
        left.step(2.0)
    assert left.seconds(10) == pytest.approx(10 * (2.0 + 5.0))


def test_time_left_follows_recent_steps() -> None:
    clock = Clock()
    left = TimeLeft(clock)
    for seconds in [9.0] + [1.0] * 200 + [4.0] * 60:
        clock.now += seconds
        left.step(seconds)
    assert left.seconds(100) == pytest.approx(400.0)


@pytest.mark.parametrize(
    ("seconds", "text"), [(-3.0, "0:00:00"), (59.6, "0:01:00"), (3723.0, "1:02:03"), (180_000.0, "2d 02:00:00")]
)
def test_durations(seconds: float, text: str) -> None:
    assert show_duration(seconds) == text
