"""Programs that are right, wrong and harmful: only the right ones pass, and none outlives its limits."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from megatron_cpt.evaluation.sandbox import (
    SandboxLimits,
    SandboxOutcome,
    bubblewrap,
    require_sandbox,
    run_program,
    threads_of,
)
from megatron_cpt.utils.errors import InputError

LIMITS = SandboxLimits(seconds=20.0)


def test_right_and_wrong_answers() -> None:
    add = "def add(a, b):\n    return a {} b\n\n\nassert add(2, 3) == 5\n"
    assert run_program(add.format("+"), LIMITS) == SandboxOutcome(True, "")
    assert run_program(add.format("-"), LIMITS) == SandboxOutcome(False, "AssertionError")
    assert run_program("def add(a, b)", LIMITS).error.startswith("SyntaxError")
    assert run_program(
        "print('你好')\nimport numpy\nassert numpy.ones(3).sum() == 3", replace(LIMITS, memory=4 << 30)
    ).passed


@pytest.mark.parametrize("way", ["import sys; sys.exit(0)", "import os; os._exit(0)", "raise SystemExit", "quit()"])
def test_an_exit_before_the_end_does_not_pass(way: str) -> None:
    assert not run_program(f"{way}\nassert False", LIMITS).passed


def test_an_endless_loop_is_killed() -> None:
    began = time.monotonic()
    for program in ("while True: pass", "import time; time.sleep(100)"):
        outcome = run_program(program, SandboxLimits(seconds=2.0))
        assert not outcome.passed
    assert outcome.error == "killed after 2.0 s"
    assert time.monotonic() - began < 15


def test_memory_is_limited() -> None:
    assert run_program("x = bytearray(1 << 32)", LIMITS).error == "MemoryError"
    assert run_program("x = []\nwhile True: x.append(bytearray(1 << 20))", LIMITS).error == "MemoryError"
    assert run_program("x = bytearray(1 << 28)", LIMITS).passed


def test_processes_are_limited() -> None:
    fork = "import os, time\nfor i in range({}):\n    if os.fork() == 0: time.sleep(30); os._exit(0)"
    assert run_program(fork.format(3), replace(LIMITS, processes=4)).passed
    assert run_program(fork.format(4), replace(LIMITS, processes=4)).error.startswith("BlockingIOError")
    assert run_program(fork.format(1), LIMITS).error.startswith("BlockingIOError")


def test_a_fork_bomb_leaves_nothing() -> None:
    bomb = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    before = psutil.pids()
    outcome = run_program(bomb, SandboxLimits(seconds=3.0, processes=8))
    assert not outcome.passed
    deadline = time.monotonic() + 10
    while left := [pid for pid in psutil.pids() if pid not in before and in_sandbox(pid)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def in_sandbox(pid: int) -> bool:
    """Whether a process lives and works in a sandbox's folder."""
    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and "sandbox-" in process.cwd()
    except psutil.Error:
        return False


def test_files_are_limited() -> None:
    write = "with open('x', 'wb') as file: file.write(bytes({}))"
    assert run_program(write.format(1 << 20), replace(LIMITS, file_size=1 << 20)).passed
    assert "File too large" in run_program(write.format((1 << 20) + 1), replace(LIMITS, file_size=1 << 20)).error
    assert run_program(
        "import os, pathlib\nassert os.listdir() == [] and pathlib.Path.cwd().name == 'program'", LIMITS
    ).passed


def test_the_environment_is_not_inherited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert run_program("import os\nassert 'secret' not in os.environ.values() and 'PATH' not in os.environ", LIMITS).passed
    assert run_program("assert b'HF_TOKEN' not in open('/proc/self/environ', 'rb').read()", LIMITS).passed


def test_what_stands_in_place_of_the_result_is_not_read() -> None:
    assert not run_program("import os; os.symlink('/dev/zero', '.result'); os._exit(0)", LIMITS).passed
    assert not run_program("import os; os.mkfifo('.result'); os._exit(0)", LIMITS).passed


@pytest.mark.skipif(os.getuid() != 0, reason="only root leaves its user")
def test_root_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")  # without walls, in which there is nothing to be done to
    (tmp_path / "file").write_text("mine")
    for use in (f"open({str(tmp_path / 'file')!r}, 'w')", "open(f'/proc/{os.getppid()}/environ', 'rb').read()"):
        assert run_program(f"import os\n{use}", LIMITS).error.startswith("PermissionError")
    assert run_program("import os\nassert os.getuid() == os.geteuid() == 65534 and os.getgroups() == []", LIMITS).passed


def test_threads_are_counted() -> None:
    assert threads_of(os.getuid()) >= psutil.Process().num_threads()
    assert threads_of(12345678) == 0


def test_a_sandbox_that_cannot_run_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    require_sandbox()
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho no library >&2; exit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    with pytest.raises(InputError, match=r"the sandbox cannot run .*: no library"):
        require_sandbox()


@pytest.mark.skipif(not bubblewrap(Path("/tmp")), reason="bubblewrap is not installed, or not allowed here")
def test_within_walls_nothing_of_the_user_is_seen(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("kept")
    os.chmod(outside, 0o666)
    secret = Path.home() / ".a-secret-of-the-test"
    secret.write_text("secret")
    try:
        home = f"import os\nassert {secret.name!r} not in os.listdir({str(secret.parent)!r})"
        assert run_program(home, LIMITS) == SandboxOutcome(True, "")
    finally:
        secret.unlink()
    network = "import socket\nassert [name for _, name in socket.if_nameindex()] == ['lo']"
    assert run_program(network, LIMITS) == SandboxOutcome(True, "")
    assert run_program("import os\nassert len([p for p in os.listdir('/proc') if p.isdigit()]) <= 2", LIMITS).passed
    assert not run_program(f"open({str(outside)!r}, 'w').write('changed')", LIMITS).passed
    assert outside.read_text() == "kept"
    assert run_program("open('mine', 'w').write('x')", LIMITS).passed


def test_where_walls_are_not_allowed_there_are_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "bwrap").write_text("#!/bin/sh\nexit 1\n")
    os.chmod(tmp_path / "bwrap", 0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert bubblewrap(tmp_path) == []
    assert run_program("assert True", LIMITS) == SandboxOutcome(True, "")
