"""The SLURM scripts as a user starts them on a machine where `sbatch` is not there, or is a program of the test's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tiny_models import ROOT


def start(script: Path, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    """Dry, and without a look at inputs, unless variables say otherwise."""
    environment = {
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
        "PYTHONPATH": str(ROOT),
        "VENV": "/nowhere",
        "DRY_RUN": "1",
        "CHECK": "0",
        "OMP_NUM_THREADS": "1",
        "HOME": os.environ.get("HOME", "/"),
    }
    return subprocess.run([script], cwd=cwd, env=environment | variables, capture_output=True, text=True, timeout=600)


def assert_refused(done: subprocess.CompletedProcess[str], message: str) -> None:
    """With exit status 2, the message in the last line, and nothing on stdout."""
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: "), done.stderr
    assert message in last
