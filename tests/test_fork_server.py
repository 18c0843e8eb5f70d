"""That a tool from fork_server.py lives as one of the real Python."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from fork_server import ENVIRONMENT
from forks import until
from tiny_models import command_of

WAIT = "import os, time; print(os.getpid(), flush=True); time.sleep(100)"


@pytest.mark.parametrize("words", [["--help"], ["--nonsense", "1"], ["--config", "nowhere.yaml"]])
def test_it_says_and_ends_with_what_the_real_one_does(words: list[str], tmp_path: Path) -> None:
    python, tool = command_of("convert_checkpoint.py")
    forked, real = (
        subprocess.run([each, tool, *words], capture_output=True, text=True, cwd=tmp_path, env=os.environ | ENVIRONMENT)
        for each in (python, sys.executable)
    )
    assert (forked.returncode, forked.stdout, forked.stderr) == (real.returncode, real.stdout, real.stderr)


def test_what_is_no_tool_is_run_by_the_real_one() -> None:
    python = command_of("convert_checkpoint.py")[0]
    words = [python, "-c", "import sys; print(sys.executable)"]
    assert (
        subprocess.run(words, capture_output=True, text=True, env=os.environ | ENVIRONMENT).stdout.strip() == sys.executable
    )


def test_other_settings_for_threads_are_for_the_real_one(tmp_path: Path) -> None:
    """The server's threads were decided when it imported torch."""
    (tmp_path / "sitecustomize.py").write_text("import sys; print(sys.executable, file=sys.stderr); sys.exit(0)")
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": str(tmp_path)}
    python, tool = command_of("convert_checkpoint.py")
    for threads, executable in (("1", python), ("3", sys.executable)):
        environment["OMP_NUM_THREADS"] = threads
        done = subprocess.run([python, tool], capture_output=True, text=True, env=environment)
        assert done.stderr.splitlines()[0] == executable


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_both(number: signal.Signals, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(WAIT)
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": str(tmp_path)}
    with subprocess.Popen(command_of("convert_checkpoint.py"), stdout=subprocess.PIPE, text=True, env=environment) as client:
        assert client.stdout is not None
        pid = int(client.stdout.readline())
        assert pid != client.pid
        client.send_signal(number)
        assert client.wait(20) == -number
    until(lambda: not psutil.pid_exists(pid))


def test_its_server_is_no_child() -> None:
    """Some tests count the children of their process."""
    place = str(Path(command_of("convert_checkpoint.py")[0]).parent)
    servers = [process for process in psutil.process_iter(["cmdline"]) if (process.info["cmdline"] or [])[-1:] == [place]]
    assert servers
    assert not set(servers) & set(psutil.Process().children())
