"""The SLURM that tests start on this host."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tiny_models import ROOT

HERE = Path(__file__).parent
OVER = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}


class Cluster:
    """What a user does on a login node, and what befalls the nodes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = os.environ | {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "VENV": "/nowhere",
        }

    def run(self, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            command, cwd=ROOT, env=self.environment | variables, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        return done

    def submit(self, script: str, **variables: str) -> str:
        """Start a script as a user would; returns the job's number."""
        return self.run(script, **variables).stdout.split()[-1]

    def show(self, job: str) -> dict[str, str]:
        """What scontrol says of a job; of an array, of its last task."""
        lines = self.run("scontrol", "--oneliner", "show", "job", job).stdout.splitlines()
        return dict(re.findall(r"(\w+)=(\S*)", lines[-1]))

    def states(self, job: str) -> set[str]:
        return set(re.findall(r"JobState=(\w+)", self.run("scontrol", "--oneliner", "show", "job", job).stdout))

    def wait(self, job: str, seconds: float = 600) -> dict[str, str]:
        """Until a job, or all tasks of an array, is over; one that is queued again can look so for a moment."""
        deadline, seen = time.monotonic() + seconds, 0
        while seen < 3:
            assert time.monotonic() < deadline, f"{self.show(job)}\n{self.log(job)}"
            time.sleep(0.5)
            seen = seen + 1 if self.states(job) <= OVER else 0
        return self.show(job)

    def wait_for(self, place: Callable[[], bool], job: str, seconds: float = 300) -> None:
        """Until a job has come to a place."""
        deadline = time.monotonic() + seconds
        while not place():
            assert time.monotonic() < deadline, self.log(job)
            time.sleep(0.2)

    def log(self, job: str) -> str:
        path = Path(self.show(job)["StdOut"])
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def preempt(self) -> None:
        """A job that may take nodes from others wants all of them, for a moment."""
        self.run("sbatch", "--partition=main", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=true")

    def kill_node(self, number: int) -> None:
        """At once, with all that it runs."""
        pid = int((self.folder / "run" / f"node.{number}.pid").read_text())
        os.kill(pid, signal.SIGKILL)

    def start_node(self, number: int) -> None:
        self.run(str(HERE / "node.sh"), FOLDER=str(self.folder), NODE=str(number))
        deadline = time.monotonic() + 60
        while self.run("sinfo", "--noheader", f"--nodes=n{number}", "--format=%t").stdout.strip() != "idle":
            assert time.monotonic() < deadline, f"n{number} does not come back"
            time.sleep(0.5)
