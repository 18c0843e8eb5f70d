"""How a job of `launch` ends, with programs of the test in SLURM's place: what a real SLURM cannot be made to do at will."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_models import ROOT

PROGRAMS = {
    # The step of the ranks: it writes what a test wants, and ends at once (ENDS) or when it is told (AFTER).
    "srun": """case "$*" in *--overlap*) exit 0;; esac
log=$(printf '%s\\n' "$@" | sed -n 's/^--output=//p')
printf '%b' "$SAYS" >"${log//%N/n1}"
[ -z "${ENDS:-}" ] || exit "$ENDS"
touch "$HERE/started"
until [ -e "$HERE/told" ]; do /bin/sleep 0.1; done
mkdir -p "$SAVE"
echo '  "state": "stopped",' >"$SAVE/status.json"
exit "${AFTER:-0}"
""",
    "scancel": 'touch "$HERE/told"\n',
    "squeue": '[ ! -e "$HERE/busy" ] || { rm "$HERE/busy"; exit 1; }\necho "${STATE:-RUNNING}"\n',
    "scontrol": """case $1 in
show) [ "$2" != job ] || echo "PreemptTime=${PREEMPTED:-None}"; [ "$2" != hostnames ] || echo n1;;
requeue) echo "$2" >>"$HERE/requeued"; exit "${REQUEUES:-0}";;
esac
""",
    "sleep": "exec /bin/sleep 0.1\n",
}


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A folder with the programs, and the script as SLURM names it."""
    for name, text in PROGRAMS.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "slurm_script").write_text((ROOT / "examples/slurm_quickstart/cpt.sh").read_text())
    return tmp_path


def run(here: Path, tell: signal.Signals | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    """A job that is told something once its ranks run."""
    environment = {
        "PATH": f"{here}:{Path(sys.executable).parent}:/usr/bin:/bin",
        "HERE": str(here),
        "SAVE": str(here / "run"),
        "LOGS": str(here / "logs"),
        "VENV": "/nowhere",
        "SAYS": "",
        "SLURM_JOB_ID": "9",
        "SLURM_JOB_NAME": "job",
        "SLURM_NNODES": "1",
        "SLURM_JOB_NODELIST": "n1",
    }
    with (here / "log").open("w") as log:
        job = subprocess.Popen(
            ["bash", here / "slurm_script"], cwd=ROOT, env=environment | variables, stdout=log, stderr=log
        )
        deadline = time.monotonic() + 60
        while tell and not (here / "started").exists():
            assert time.monotonic() < deadline, (here / "log").read_text()
            time.sleep(0.05)
        if tell:
            job.send_signal(tell)
        status = job.wait(timeout=60)
    return subprocess.CompletedProcess("job", status, "", (here / "log").read_text())


def test_a_controller_that_is_busy_once(here: Path) -> None:
    """The job is queued again all the same."""
    (here / "busy").touch()
    done = run(here, signal.SIGUSR1)
    assert done.returncode == 0, done.stderr
    assert "try 1 of 5 failed: squeue" in done.stderr
    assert (here / "requeued").read_text() == "9\n"


def test_a_controller_that_does_not_queue_again(here: Path) -> None:
    done = run(here, signal.SIGUSR1, REQUEUES="1")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith("SLURM does not queue it again: submit it anew")
    assert (here / "requeued").read_text() == "9\n" * 5


def test_a_signal_before_there_are_ranks(here: Path) -> None:
    """From a program that the script's first lines call: they are started, told to save, and the job is queued again."""
    (here / "basename").write_text('#!/bin/sh\nkill -USR1 "$PPID"\nexec /usr/bin/basename "$@"\n')
    (here / "basename").chmod(0o755)
    (here / "slurm_script").write_text("set -euo pipefail\nsource examples/lib/launch.sh\nlaunch tool.py\n")
    done = run(here)
    assert done.returncode == 0, done.stderr
    assert "USR1: the ranks are told to save" in done.stderr
    assert (here / "requeued").read_text() == "9\n"


@pytest.mark.parametrize("state", ["stopped", ""])
def test_ranks_that_preemption_has_ended(here: Path, state: str) -> None:
    """Nobody told the script, and they end with a status as if they had failed: queued again, without a summary."""
    said = f'mkdir -p $SAVE; echo \'  "state": "{state}",\' >$SAVE/status.json\n'
    (here / "srun").write_text((here / "srun").read_text().replace("[ -z", said + "[ -z", 1))
    done = run(here, ENDS="143", PREEMPTED="2026-11-26T06:00:54")
    assert done.returncode == 0, done.stderr
    assert (here / "requeued").read_text() == "9\n"
    assert ("failed with status 143" in done.stderr) == (state == "")
    (here / "requeued").unlink()
    done = run(here, ENDS="143")
    assert done.returncode == 143
    assert not (here / "requeued").exists()


def test_a_job_that_slurm_ends_is_not_queued_again(here: Path) -> None:
    done = run(here, signal.SIGTERM, STATE="COMPLETING", AFTER="143")
    assert done.returncode == 1
    assert "SLURM ends this job itself" in done.stderr
    assert not (here / "requeued").exists()


def test_an_unfinished_run_that_may_not_be_queued_again(here: Path) -> None:
    """It must not look like a success to the jobs that wait for it."""
    done = run(here, signal.SIGUSR1, REQUEUE="0")
    assert done.returncode == 1
    assert "not queued again (REQUEUE 0), and not finished" in done.stderr
    assert run(here, ENDS="7", REQUEUE="0", REQUEUE_ON_FAILURE="1").returncode == 1
    assert run(here, ENDS="7", REQUEUE="0").returncode == 7
    assert run(here, ENDS="143", REQUEUE="0", PREEMPTED="2026-11-26T06:00:54").returncode == 1
    assert not (here / "requeued").exists()


@pytest.mark.parametrize(
    ("says", "cause", "error"),
    [
        (
            "1: x\\n0: Traceback\\n0: KeyError: 3\\n1: rank 0 failed: KeyError: 3\\n",
            "rank 0 failed: KeyError: 3",
            "0: Traceback",
        ),
        ("", "neither srun nor a rank says why", ""),
    ],
)
def test_the_summary_of_a_failure(here: Path, says: str, cause: str, error: str) -> None:
    done = run(here, ENDS="7", SAYS=says)
    assert done.returncode == 7
    summary = done.stderr.partition("--- job 9 failed with status 7 at step 0\n")[2].splitlines()
    assert summary[:2] == [cause, error]
