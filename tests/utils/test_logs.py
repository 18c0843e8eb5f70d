"""Where messages go: levels, ranks and a file, through the tools' own command line."""

from __future__ import annotations

import logging
import multiprocessing
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from tiny_models import ROOT

from megatron_cpt.config.cli import run_tool
from megatron_cpt.utils.logs import ON_SCREEN, ScreenHandler, rank_of, start_logs

logger = logging.getLogger("megatron_cpt.some.module")


@dataclass(frozen=True)
class Config:
    """A tool's configuration."""

    name: str = "x"
    """A name."""


def speak(config: Config) -> str:
    for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR):
        logger.log(level, f"{config.name} at {logging.getLevelName(level)}")
    logger.info("note: 100 % of %s")
    return "result"


def run(*words: str) -> None:
    run_tool(speak, Config, "A tool.", words)


SHOWN = {
    "debug": ["x at DEBUG", "x at INFO", "WARNING: x at WARNING", "error: x at ERROR", "note: 100 % of %s"],
    "info": ["x at INFO", "WARNING: x at WARNING", "error: x at ERROR", "note: 100 % of %s"],
    "warning": ["WARNING: x at WARNING", "error: x at ERROR"],
    "error": ["error: x at ERROR"],
}


@pytest.mark.parametrize("level", SHOWN)
def test_a_level_and_those_above_are_shown(level: str, capsys: pytest.CaptureFixture[str]) -> None:
    run("--log_level", level)
    out, err = capsys.readouterr()
    assert (out, err.splitlines()) == ("result\n", SHOWN[level])


def test_without_options_a_tool_shows_info(capsys: pytest.CaptureFixture[str]) -> None:
    run("--log-level=error")
    run("--name", "x")
    assert capsys.readouterr().err.splitlines() == SHOWN["error"] + SHOWN["info"]


LINE = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4} (\w+) rank (\d+) ([\w.]+): (.*)"


def lines_of(path: Path) -> list[tuple[str, ...]]:
    """(level, rank, logger, message) of each line of a log file."""
    lines = [re.fullmatch(LINE, line) for line in path.read_text().splitlines()]
    assert all(lines)
    return [line.groups() for line in lines if line]


def test_a_file_gets_each_record_too_and_keeps_what_it_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "log"
    for name in ("a", "b"):
        run("--name", name, "--log_file", str(file), "--log_level", "warning")
    own = [line for line in lines_of(file) if line[2] == logger.name]
    assert own == [(level, "0", logger.name, f"{name} at {level}") for name in ("a", "b") for level in ("WARNING", "ERROR")]
    assert capsys.readouterr().err.splitlines() == [
        f"{prefix}{name} at {level}"
        for name in ("a", "b")
        for prefix, level in (("WARNING: ", "WARNING"), ("error: ", "ERROR"))
    ]


def test_the_file_begins_with_the_command_and_ends_with_the_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["tool.py", "--name", "a b"])
    with pytest.raises(SystemExit):
        run("--log_file", str(tmp_path / "log"), "--nam", "a b")
    (first, last) = lines_of(tmp_path / "log")
    assert first[3].endswith(": tool.py --name 'a b'")
    assert last[3].startswith("--nam is unknown")
    assert capsys.readouterr().err == f"error: {last[3]}\n"


def test_the_traceback_of_a_bug_is_in_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(config: Config) -> None:
        raise KeyError("a bug")

    with pytest.raises(KeyError):  # which Python shows
        run_tool(fail, Config, "A tool.", ["--log_file", str(tmp_path / "log")])
    assert (tmp_path / "log").read_text().endswith("KeyError: 'a bug'\n")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--log_level", "loud"], "log_level is 'loud'; expected one of debug, info, warning, error"),
        (["--log_level"], "--log_level has no value; expected one of debug, info, warning, error"),
        (["--log_file"], "--log_file has no value; expected a file to append to"),
        (
            ["--log_file", "/nowhere/log"],
            "log_file is '/nowhere/log': No such file or directory; expected a file to append to",
        ),
        (["--log_file", "/"], "log_file is '/': Is a directory; expected a file to append to"),
        (["--log_file", "a\0b"], "log_file is 'a\\x00b': embedded null byte; expected a file to append to"),
    ],
)
def test_what_is_refused_is_one_line_beside_others(words: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    for more in ([], ["--other=1"]):
        with pytest.raises(SystemExit) as stopped:
            run(*words, *more)
        assert stopped.value.code == 2
        said = capsys.readouterr().err.splitlines()
        assert f"error: {line}" in said
        assert len(said) == 1 + len(more)


def test_help_and_print_config_open_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for word in ("--help", "--print_config"):
        with pytest.raises(SystemExit) as stopped:
            run(word, "--log_file", str(tmp_path / "log"))
        assert stopped.value.code == 0
    said = capsys.readouterr().out
    assert "--log_level {debug,info,warning,error}" in said
    assert said.endswith("name: x\n")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_ends_no_tool(capsys: pytest.CaptureFixture[str]) -> None:
    run("--log_file", "/dev/full")
    out, err = capsys.readouterr()
    assert out == "result\n"
    assert err.count("WARNING: log_file /dev/full cannot be written: No space left on device\n") == 1
    assert [line for line in err.splitlines() if "log_file" not in line] == SHOWN["info"]


def test_the_screen_may_show_it_otherwise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start_logs(path=str(tmp_path / "log"))
    logger.info("passed", extra={ON_SCREEN: "\033[32mpassed\033[0m"})
    logger.info("shown by another", extra={ON_SCREEN: ""})
    assert capsys.readouterr().err == "\033[32mpassed\033[0m\n"
    assert [line[3] for line in lines_of(tmp_path / "log")] == ["passed", "shown by another"]


def test_a_forked_process_speaks_too(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    start_logs(path=str(tmp_path / "log"))
    worker = multiprocessing.get_context("fork").Process(target=logger.info, args=("from a worker",))
    worker.start()
    worker.join()
    assert capfd.readouterr().err == "from a worker\n"
    assert [line[3] for line in lines_of(tmp_path / "log")] == ["from a worker"]


def test_handlers_of_others_stay_and_the_root_logger_repeats_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    package, other, root = logging.getLogger("megatron_cpt"), logging.NullHandler(), logging.StreamHandler(sys.stderr)
    package.addHandler(other)
    logging.getLogger().addHandler(root)
    try:
        start_logs()
        start_logs()
        logger.warning("once")
        assert other in package.handlers
        assert sum(isinstance(handler, ScreenHandler) for handler in package.handlers) == 1
    finally:
        package.removeHandler(other)
        logging.getLogger().removeHandler(root)
    assert capsys.readouterr().err == "WARNING: once\n"


@pytest.mark.parametrize(
    ("environment", "rank"),
    [
        ({}, 0),
        ({"RANK": "3", "WORLD_SIZE": "4"}, 3),
        ({"RANK": "0", "WORLD_SIZE": "4"}, 0),
        ({"RANK": "3"}, 0),  # a number of somebody else's
        ({"RANK": "3", "WORLD_SIZE": "1"}, 0),
        ({"RANK": "two", "WORLD_SIZE": "4"}, 0),
    ],
)
def test_the_rank_is_that_of_several(environment: dict[str, str], rank: int) -> None:
    assert rank_of(environment) == rank


TOOL = """
import logging, os, sys
from dataclasses import dataclass
from megatron_cpt.config.cli import run_tool

@dataclass(frozen=True)
class Config:
    name: str = "x"

def speak(config):
    logger = logging.getLogger("megatron_cpt.tool")
    logger.info(f"info of {os.environ['RANK']}")
    logger.warning(f"warning of {os.environ['RANK']}")

run_tool(speak, Config, "A tool.")
"""


def test_ranks_under_torchrun(tmp_path: Path) -> None:
    tool, file = tmp_path / "tool.py", tmp_path / "log"
    tool.write_text(TOOL)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d"]
    done = subprocess.run(
        [*torchrun, "--rdzv_endpoint=localhost:0", str(tool), "--log_file", str(file)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        check=True,
    )
    said = [line for line in done.stderr.splitlines() if " of " in line]
    assert sorted(said) == ["WARNING: warning of 0", "[rank 1] WARNING: warning of 1", "info of 0"]
    for rank, path in enumerate((file, tmp_path / "log.rank1")):
        own = [line for line in lines_of(path) if line[2] == "megatron_cpt.tool"]
        assert [line[:2] + line[3:] for line in own] == [
            ("INFO", f"{rank}", f"info of {rank}"),
            ("WARNING", f"{rank}", f"warning of {rank}"),
        ]
