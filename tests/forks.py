"""Runs of the training tool in forked processes: what takes seconds to import is imported once, for hundreds of short runs.

A server process imports everything and then forks the ranks of each run it is asked for. A rank has the environment that
srun or torchrun would give it and calls the tool's main with a command line: from there on nothing differs from a process
that was started by itself.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent
TOOL = str(TESTS.parent / "tools" / "pretrain_cpt.py")


@dataclass
class Job:
    """A run under way."""

    forks: Forks
    pids: list[int]
    log: Path
    codes: list[int | None] = field(default_factory=list)

    def poll(self) -> bool:
        """Whether all its processes have ended; `codes` says how (as subprocess does: minus the signal)."""
        self.codes = self.forks.ask({"poll": self.pids})
        return None not in self.codes

    def wait(self, timeout: float = 120.0) -> list[int]:
        """The exit statuses of its processes, by rank; kills what is left when the time is over, and fails."""
        try:
            until(self.poll, timeout)
        except TimeoutError:
            for pid, code in zip(self.pids, self.codes, strict=True):
                if code is None:
                    os.kill(pid, signal.SIGKILL)
            raise TimeoutError(f"still running after {timeout} s: {self.codes}\n{self.text()}") from None
        return [code for code in self.codes if code is not None]

    def finish(self, timeout: float = 120.0) -> None:
        """Wait, and fail unless all goes well."""
        codes = self.wait(timeout)
        assert not any(codes), f"exit statuses {codes}\n{self.text()}"

    def kill(self, number: int, rank: int = 0) -> None:
        """Send a signal to one process."""
        os.kill(self.pids[rank], number)

    def text(self) -> str:
        """What it has written to stdout and stderr."""
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""


class Forks:
    """The server, and how to ask it for runs."""

    def __init__(self) -> None:
        self.server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ
            | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}"},
        )

    def ask(self, question: dict[str, Any]) -> Any:
        """One line to the server and one back."""
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.write(json.dumps(question) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def start(
        self, argv: Iterable[str], log: Path, processes: int = 1, tamper: dict[str, Any] | None = None, launcher: bool = True
    ) -> Job:
        """Begin a run; `launcher` False: one process without a launcher's environment."""
        wish = {"argv": [*argv], "log": str(log), "processes": processes, "tamper": tamper or {}, "launcher": launcher}
        return Job(self, self.ask({"start": wish}), log)

    def run(self, *argv: str, log: Path, processes: int = 1, check: bool = True) -> subprocess.CompletedProcess[str]:
        """A run to its end, as `tiny_models.run_tool` gives it; both streams are in `stderr`."""
        log.unlink(missing_ok=True)
        job = self.start(argv, log, processes, launcher=processes > 1)
        codes = job.wait()
        assert not (check and any(codes)), f"exit statuses {codes}\n{job.text()}"
        return subprocess.CompletedProcess([*argv], max(codes), "", job.text())

    def close(self) -> None:
        """End the server."""
        assert self.server.stdin is not None
        self.server.stdin.close()
        self.server.wait()


def until(condition: Callable[[], object], timeout: float = 60.0, pause: float = 0.02) -> None:
    """Poll every `pause` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{condition} did not come true within {timeout} s")
        time.sleep(pause)


PORTS = range(10_000, 32_000)  # below those that the system gives to connections, which would come between


def free_ports() -> Iterator[int]:
    """Ports that nobody listens on, each another one; two servers begin at different places."""
    for port in itertools.cycle(PORTS[97 * os.getpid() % len(PORTS) :]):
        if is_free(port):
            yield port


def is_free(port: int) -> bool:
    """Whether nobody listens on it."""
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def serve() -> None:
    """Answer questions until there are no more; runs as the server's main."""

    import torch._dynamo  # noqa: F401  which the first optimizer imports: more than a second of each run

    import megatron_cpt.training.pretrain
    import megatron_cpt.training.report
    import megatron_cpt.training.step  # noqa: F401
    from megatron_cpt.tokenizer import load_tokenizer  # noqa: F401

    gc.collect()
    gc.freeze()  # or each collection in a forked process writes to, and so copies, all that was imported
    codes: dict[int, int | None] = {}
    ports = free_ports()
    for line in sys.stdin:
        question = json.loads(line)
        if "start" in question:
            answer: list[int | None] = list(fork_ranks(question["start"], next(ports)))
            codes |= {pid: None for pid in answer if pid is not None}
        else:
            for pid in question["poll"]:
                if codes[pid] is None and (ended := os.waitpid(pid, os.WNOHANG))[0]:
                    codes[pid] = os.waitstatus_to_exitcode(ended[1])
            answer = [codes[pid] for pid in question["poll"]]
        print(json.dumps(answer), flush=True)
    for pid, code in codes.items():
        if code is None:
            os.kill(pid, signal.SIGKILL)


def fork_ranks(wish: dict[str, Any], port: int) -> list[int]:
    """Start the processes of a run."""
    pids = []
    for rank in range(wish["processes"]):
        pid = os.fork()
        if pid == 0:
            run_rank(wish, rank, port)
        pids.append(pid)
    return pids


def run_rank(wish: dict[str, Any], rank: int, port: int) -> None:
    """The life of a forked process."""
    status = 1
    try:
        os.setsid()
        log = os.open(wish["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        if wish["launcher"]:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(wish["processes"])}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        from tampering import tamper

        tamper(wish["tamper"])
        sys.argv = [TOOL, *wish["argv"]]
        runpy.run_path(TOOL, run_name="__main__")
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    serve()
