"""Runs a program that a model has written, in a process of its own with limits, and says whether it comes to its end.

Where bubblewrap is installed and may be used, the program sees no network, no other processes and nothing of the user's
home, and can write into its own folder only. Elsewhere the limits are against accidents, not against an attack: the program
can read this machine's files and use its network, and where this process is not root's, whose programs become nobody's, it
can do to the user's files and processes what the user can. Where this is more than may be risked, install bubblewrap, or
evaluate in a container or a virtual machine that holds nothing else.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import psutil

from megatron_cpt.utils.errors import InputError

CHILD = Path(__file__).with_name("sandbox_child.py")
WALLS = ("--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--die-with-parent")
NOBODY = 65534  # whom the program runs as where this process is root
ENVIRONMENT = {"OMP_NUM_THREADS": "1"}  # numpy would start a thread for each core, and is not let


@dataclass(frozen=True)
class SandboxLimits:
    """Of one program.

    Attributes:
        seconds: until it is killed, and of each process's CPU time
        memory: bytes of address space of each process
        file_size: bytes of each file
        processes: and threads, itself included
    """

    seconds: float = 10.0
    memory: int = 1 << 30
    file_size: int = 16 << 20
    processes: int = 1


@dataclass(frozen=True)
class SandboxOutcome:
    """What became of a program: whether it came to its end, and otherwise the last line of its errors."""

    passed: bool
    error: str


def run_program(program: str, limits: SandboxLimits) -> SandboxOutcome:
    """Run a Python program in an empty folder, without this process's environment.

    It passes by coming to its end: not by an exit, whatever the status. What it has started is killed with it.
    """
    with tempfile.TemporaryDirectory(prefix="sandbox-", ignore_cleanup_errors=True) as home:
        folder, result, errors = Path(home, "program"), Path(home, "program", ".result"), Path(home, "errors")
        folder.mkdir()
        user = os.getuid()
        if user == 0:
            user = NOBODY
            os.chmod(home, 0o711)
            os.chown(folder, user, user)
        token = secrets.token_hex()
        job = {"program": program, "user": user, "limits": bounds(limits, user), "result": str(result), "token": token}
        killed = execute(json.dumps(job), folder, errors, limits.seconds)
        passed = is_text(result, token)
        lines = errors.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    if passed:
        return SandboxOutcome(True, "")
    return SandboxOutcome(False, f"killed after {limits.seconds} s" if killed else (lines or ["it ended early"])[-1][:200])


def bounds(limits: SandboxLimits, user: int) -> dict[str, int]:
    """Limits by setrlimit's names. That on processes counts all of a user's."""
    return {
        "RLIMIT_CPU": math.ceil(limits.seconds),
        "RLIMIT_AS": limits.memory,
        "RLIMIT_FSIZE": limits.file_size,
        "RLIMIT_NPROC": threads_of(user) + limits.processes,
        "RLIMIT_CORE": 0,
    }


def threads_of(user: int) -> int:
    """How many threads a user has now."""
    found = (process.info for process in psutil.process_iter(["uids", "num_threads"]))
    return sum(info["num_threads"] or 0 for info in found if info["uids"] and info["uids"].real == user)


def execute(job: str, folder: Path, errors: Path, seconds: float) -> bool:
    """Run the child on a job; returns whether its time ran out. None of its process group is left."""
    command = [*bubblewrap(folder), sys.executable, "-I", "-c", CHILD.read_text(encoding="utf-8")]
    with (
        errors.open("wb") as log,
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=log,
            cwd=folder,
            env=ENVIRONMENT,
            start_new_session=True,
        ) as process,
    ):
        try:
            process.communicate(job.encode(), timeout=seconds)
        except subprocess.TimeoutExpired:
            return True
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return False


def bubblewrap(folder: Path) -> list[str]:
    """The beginning of a command that runs within walls, in `folder`; nothing where bubblewrap is missing or not allowed."""
    program = shutil.which("bwrap")
    command = [] if program is None else [program, *WALLS, *visible(folder)]
    if command and subprocess.run([*command, sys.executable, "-I", "-c", ""], capture_output=True, check=False).returncode:
        return []  # containers and clusters may forbid namespaces
    return command


def visible(folder: Path) -> list[str]:
    """Options of bubblewrap: this machine read-only, of the user's home only Python's own files, `folder` to write to."""
    home = os.path.expanduser("~")
    options = ["--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc", "--tmpfs", home]
    for place in sorted({sys.prefix, sys.base_prefix, os.path.dirname(os.path.realpath(sys.executable))}):
        if os.path.commonpath([home, place]) == home:
            options += ["--ro-bind", place, place]
    return [*options, "--bind", str(folder), str(folder), "--chdir", str(folder)]


def is_text(path: Path, text: str) -> bool:
    """Whether a file, and not what a program may have put in its place, holds this text."""
    try:
        found = path.lstat()
    except OSError:
        return False
    return stat.S_ISREG(found.st_mode) and found.st_size == len(text) and path.read_text(encoding="ascii") == text


def require_sandbox() -> None:
    """Raise InputError if programs cannot be run here: every answer would be called wrong."""
    outcome = run_program("import math, typing\nassert math.isqrt(9) == 3", SandboxLimits(seconds=60.0))
    if not outcome.passed:
        raise InputError(f"the sandbox cannot run {sys.executable}: {outcome.error}; expected: a program that passes")
