"""What a run shows and records."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import multiprocessing
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tiny_logs import record, results, start, step_row, validated

from megatron_cpt.config.run import LoggingConfig
from megatron_cpt.training.log import RunLog
from megatron_cpt.training.metrics_file import MetricsFile, read_metrics
from megatron_cpt.training.validation_result import ValidationResult
from megatron_cpt.utils.logs import start_logs


def test_names_are_not_markup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "[x]run"
    folder.mkdir()
    with RunLog(str(folder), LoggingConfig(), 0) as log:
        validated(log, 3, [ValidationResult("zh [/b]", "zh", 2.5, 1.25, 100, 200)])
        log.say(f"saved {folder}")
    shown = capsys.readouterr().err
    assert "zh [/b]  zh        2.5000" in shown
    assert f"saved {folder}" in shown
    assert read_metrics(str(folder))[0]["validation"]["zh [/b]"]["loss"] == 2.5


def test_a_start_records_the_run_and_shows_ledger_and_learning_rate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with RunLog(str(tmp_path / "run"), LoggingConfig(), 0) as log:
        start(log)
    names = ("run.json", "ledger.json", "learning_rate.json")
    run, ledger, rates = (json.loads((tmp_path / "run" / name).read_text()) for name in names)
    assert run["config"] == {"seed": 1}
    assert ledger["planned"]["almr_asked"] == 0.5
    assert [rate["lr"] for rate in rates] == [1e-4, 1e-5]
    shown = capsys.readouterr().err
    assert "ALMR asked 0.5000" in shown
    assert "1.0000e-05" in shown


def test_steps_are_recorded_and_shown_every_log_interval_and_at_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record(tmp_path, 1, 20, LoggingConfig(log_interval=8))
    assert [row["iteration"] for row in read_metrics(str(tmp_path)) if "loss" in row] == list(range(1, 21))
    lines = [line for line in capsys.readouterr().err.splitlines() if re.match(r"step \d", line)]
    assert [line.split(" | ")[0] for line in lines] == ["step 8/20", "step 16/20", "step 20/20"]
    for shown in (
        "loss 3.9200",
        "lr 1.00e-04",
        "grad norm 1.50",
        "1,234 tok/s",
        "617/device",
        "41.2/38.9%",
        "ALMR 0.5000",
        " left",
    ):
        assert shown in lines[0]


def test_a_skipped_step_is_named_whatever_the_interval(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLog(str(tmp_path), LoggingConfig(log_interval=8), 0) as log:
        start(log)
        log.step(step_row(1, loss=float("nan"), grad_norm=float("inf"), skipped="loss is nan"), 20)
    assert "step 1 is skipped: loss is nan" in capsys.readouterr().err
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    row = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert (row["loss"], row["grad_norm"], row["skipped"]) == (None, None, "loss is nan")


def test_validation_says_what_was_gained_and_what_forgotten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLog(str(tmp_path), LoggingConfig(), 0) as log:
        start(log)
        validated(log, 0, results())
        validated(log, 7, results(0.9))
    shown = [" ".join(line.split()) for line in capsys.readouterr().err.splitlines()]
    assert "zh zh 4.0000 54.60 2.0000" in shown
    assert "zh zh 3.6000 -10.0 % 36.60 1.8000 -10.0 % gain" in shown
    assert "en en 2.2222 +11.1 % 9.23 1.1111 +11.1 % forgetting" in shown
    first, last = (row["validation"] for row in read_metrics(str(tmp_path)))
    assert first["zh"]["bits_per_byte_change"] == 0.0
    assert last["en"]["bits_per_byte_change"] == pytest.approx(1 / 0.9 - 1)
    assert last["zh"]["loss_change"] == pytest.approx(-0.1)
    assert last["zh"]["perplexity"] == pytest.approx(36.598, rel=1e-4)


def test_a_set_that_is_new_or_measured_otherwise_is_compared_with_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with RunLog(str(tmp_path), LoggingConfig(), 0) as log:
        validated(log, 7, [ValidationResult("new", "zh", 2.0, 1.0, 1, 1), *results(0.9)])
        validated(log, 8, results(0.8), samples=99)
    first, second = (row["validation"] for row in read_metrics(str(tmp_path)))
    assert {name: figures["baseline"]["iteration"] for name, figures in first.items()} == {"new": 7, "zh": 0, "en": 0}
    assert {name: figures["baseline"]["iteration"] for name, figures in second.items()} == {"zh": 8, "en": 8}
    assert second["zh"]["bits_per_byte_change"] == 0.0
    shown = [" ".join(line.split()) for line in capsys.readouterr().err.splitlines()]
    assert "new zh 2.0000 7.39 1.0000 7" in shown  # no change, no word about it
    assert "zh zh 3.6000 -10.0 % 36.60 1.8000 -10.0 % 0 gain" in shown
    assert shown[shown.index("validation at step 8") + 1] == "set language loss perplexity bits/byte"


def test_a_resume_forgets_the_steps_it_does_again_and_a_line_cut_off(tmp_path: Path) -> None:
    record(tmp_path, 1, 9)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"iteration": 10, "lo')  # a kill in the middle of a write
    assert read_metrics(str(tmp_path))[-1]["iteration"] == 9
    record(tmp_path, 6, 8)
    rows = read_metrics(str(tmp_path))
    assert [row["iteration"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [row["iteration"] for row in rows if "validation" in row] == [0, 8]
    assert rows[0]["validation"]["zh"]["loss"] == 4.0
    starts = json.loads((tmp_path / "run.json").read_text())["starts"]
    assert [start["iteration"] for start in starts] == [0, 5]


def test_a_run_that_begins_anew_forgets_all(tmp_path: Path) -> None:
    record(tmp_path, 1, 3)
    record(tmp_path, 1, 2)
    assert [row["iteration"] for row in read_metrics(str(tmp_path))] == [0, 1, 2, 2]
    assert len(json.loads((tmp_path / "run.json").read_text())["starts"]) == 1


def test_each_row_is_one_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writes: list[bytes] = []

    def recording(*arguments: Any, **options: Any) -> Recorder:
        return Recorder(io.FileIO(arguments[0], arguments[1]), writes)

    monkeypatch.setattr("builtins.open", recording)
    MetricsFile(str(tmp_path)).append(step_row(1))
    assert [text.count(b"\n") for text in writes] == [1]
    assert writes[0].endswith(b"\n")


class Recorder:
    """A file whose writes are listed."""

    def __init__(self, file: io.IOBase, writes: list[bytes]) -> None:
        self.file, self.writes = file, writes

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write(self, text: bytes) -> int:
        self.writes.append(text)
        return len(text)


def test_rows_wait_while_the_disk_is_full(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLog(str(tmp_path), LoggingConfig(), 0) as log:
        start(log)
        path, log.file.path = log.file.path, "/dev/full"
        log.step(step_row(1), 20)
        log.step(step_row(2), 20)
        log.file.path = path
        log.step(step_row(3), 20)
    assert [row["iteration"] for row in read_metrics(str(tmp_path))] == [1, 2, 3]
    assert capsys.readouterr().err.count("cannot be written") == 1


def test_status_is_for_launchers(tmp_path: Path) -> None:
    with RunLog(str(tmp_path), LoggingConfig(), 0) as log:
        log.status("stopped", 7, 20, "SIGTERM")
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["iteration"], status["train_iters"], status["reason"]) == ("stopped", 7, 20, "SIGTERM")


def test_without_entering_it_only_speaks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    RunLog(str(tmp_path / "run"), LoggingConfig(), 0).say("something")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    start_logs()
    RunLog(str(tmp_path / "other"), LoggingConfig(), 1).say("nothing")
    assert capsys.readouterr().err == "something\n"
    assert list(tmp_path.iterdir()) == []


def other_rank(folder: str, stdout: int, stderr: int) -> None:
    """What a rank other than the first does, in a process of its own."""
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    os.environ |= {"RANK": "1", "WORLD_SIZE": "2"}
    start_logs()
    handler = logging.StreamHandler()  # holds the stderr of now
    with RunLog(folder, LoggingConfig(tensorboard=True), 1) as log:
        start(log)
        log.step(step_row(1), 2)
        validated(log, 1, results())
        log.status("running", 1, 2)
        log.finish()
        log.say("said")
        logging.getLogger("megatron_cpt.x").warning("odd")
        print("printed")
        print("warned", file=sys.stderr)
        logging.getLogger("x").addHandler(handler)
        logging.getLogger("x").warning("logged")
        os.write(2, b"from C\n")
        print("heard", file=log.error_stream)
        raise RuntimeError("fatal")


def test_other_ranks_write_to_their_own_file_but_fatal_errors_are_seen(tmp_path: Path) -> None:
    with open(tmp_path / "out", "wb") as out, open(tmp_path / "err", "wb") as err:
        process = multiprocessing.get_context("fork").Process(
            target=other_rank, args=(str(tmp_path / "run"), out.fileno(), err.fileno())
        )
        process.start()
        process.join(60)
    assert process.exitcode == 1
    written = (tmp_path / "run" / "logs" / "rank_00001.log").read_text()
    for text in ("rank 1 on", "said", "printed", "warned", "logged", "from C", "RuntimeError: fatal"):
        assert text in written
    seen = (tmp_path / "err").read_text()
    assert "heard" in seen
    assert "[rank 1] WARNING: odd\n" in seen
    assert "\nWARNING: odd\n" in written
    assert seen.rstrip().endswith("RuntimeError: fatal")
    assert (tmp_path / "out").read_text() == ""
    for text in ("said", "printed", "warned", "logged", "from C"):
        assert text not in seen.split("Traceback")[0]
    assert os.listdir(tmp_path / "run") == ["logs"]


def test_an_exception_leaves_the_terminal_clean(tmp_path: Path) -> None:
    log = RunLog(str(tmp_path), LoggingConfig(), 0)
    terminal = io.StringIO()
    log.console = Console(file=terminal, force_terminal=True, width=100)
    log.progress = type(log.progress)(log.console, True)
    log.live = True
    with contextlib.suppress(KeyboardInterrupt), log:
        start(log)
        log.step(step_row(1), 20)
        raise KeyboardInterrupt
    shown = terminal.getvalue()
    assert "step 1/20" in shown
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")  # the cursor is shown again
    assert shown.endswith(("\n", "\x1b[?25h"))


def test_messages_stand_above_the_live_line_and_in_the_log_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start_logs(path=str(tmp_path / "file"))
    log, terminal = RunLog(str(tmp_path), LoggingConfig(), 0), io.StringIO()
    log.console = Console(file=terminal, force_terminal=True, width=100)
    log.progress, log.live = type(log.progress)(log.console, True), True
    with log:
        start(log)
        log.step(step_row(1), 20)
        log.say("a message [x]\nof two lines")
        log.warn("a warning")
    shown = terminal.getvalue()
    assert "a message [x]\nof two lines\n" in shown
    assert "WARNING: a warning\n" in shown
    assert capsys.readouterr().err == ""
    written = (tmp_path / "file").read_text()
    for text in ("ALMR asked 0.5000", "1.0000e-05", ": a message [x]\nof two lines\n", ": a warning\n"):
        assert text in written
    assert "\x1b" not in written


def test_a_damaged_line_does_not_stop_a_resume(tmp_path: Path) -> None:
    file = MetricsFile(str(tmp_path))
    for iteration in (1, 2, 3):
        file.append({"iteration": iteration, "loss": 1.0})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "metrics.jsonl").write_text("\n".join([lines[0], "xx" + lines[1], "[1, 2]", lines[2]]) + "\n")
    assert [row["iteration"] for row in read_metrics(str(tmp_path))] == [1, 3]
    said = file.keep_until(3)
    assert [text.split("metrics.jsonl: ")[1] for text in said] == [
        f"line {n} cannot be read and is left out" for n in (2, 3)
    ]
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == [lines[0], lines[2]]


def test_status_says_how_a_run_ended(tmp_path: Path) -> None:
    def state() -> tuple[str, int, str | None]:
        status = json.loads((tmp_path / "status.json").read_text())
        return status["state"], status["iteration"], status["reason"]

    log = RunLog(str(tmp_path), LoggingConfig(), 0)
    log.failed("too early to tell anybody")
    assert not (tmp_path / "status.json").exists()
    log.status("running", 3, 10)
    log.failed("OSError: the disk is gone")
    assert state() == ("failed", 3, "OSError: the disk is gone")
    log.status("stopped", 4, 10, "SIGTERM")
    log.failed("something after the end")
    assert state() == ("stopped", 4, "SIGTERM")
    log.status("running", 4, 10)
    log.stopped_early("the file stop_now")
    assert state() == ("stopped", 4, "the file stop_now")
    log.status("running", 4, 10)
    log.ended_before(10, 10)
    assert state() == ("finished", 10, None)
    RunLog(str(tmp_path / "new"), LoggingConfig(), 0).stopped_early("time limit")  # before its folder was made
    status = json.loads((tmp_path / "new" / "status.json").read_text())
    assert (status["state"], status["iteration"], status["train_iters"]) == ("stopped", 0, None)
