"""A process that fails, is killed or hangs ends the whole job within seconds, and the reason can be read."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from forks import TESTS, TOOL, Forks, Job, until
from layout_cases import Case
from metrics_rows import steps_taken
from tampering import sign_of, signs
from tiny_models import VARIANTS
from tiny_runs import Layout, Runs

BOUND = 30.0  # seconds; without anybody noticing it would take gloo's and NCCL's half hour
HEARTBEAT = "--loss_spikes.heartbeat_seconds=4"
LONG = ("--training.train_iters=2000", "--checkpoint.save_interval=0")
LAYOUTS = [Case(dp=2), Case(pp=2), Case(tp=2)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: str) -> Runs:
    return Runs(tmp_path_factory.mktemp("dead"), tiny_tokenizer_dir, **VARIANTS["tied"])


def started_like_srun(runs: Runs, forks: Forks, name: str, case: Case, *extra: str, **tamper: Any) -> Job:
    """Processes with the variables of a launcher, and no launcher that would end the others."""
    argv = ["--config", runs.configure(name, Layout()), *LONG, HEARTBEAT, *case.arguments, *extra]
    return forks.start(argv, runs.folder / f"{name}.log", case.processes, tamper)


def assert_ends(wait: Callable[[float], object], since: float) -> None:
    """Within the bound."""
    wait(BOUND + 30)
    assert time.monotonic() - since < BOUND


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_an_exception(runs: Runs, forks: Forks, case: Case, rank: int) -> None:
    name = f"exception-{case}-{rank}"
    sign = str(runs.folder / f"{name}-signs")
    broken = {"rank": rank, "step": 3, "sign": sign}
    job = started_like_srun(runs, forks, name, case, fail_in_step=broken)
    until(lambda: signs(sign, rank) or job.poll())
    assert_ends(job.wait, time.monotonic())
    assert all(job.codes), (job.codes, job.text())
    assert f"rank {rank} failed: ArithmeticError: broken on purpose" in job.text()
    assert "in train_step" in job.text()  # the traceback of the rank that failed


@pytest.mark.parametrize("case", LAYOUTS, ids=str)
@pytest.mark.parametrize(
    ("number", "rank"), [(signal.SIGKILL, 0), (signal.SIGKILL, 1), (signal.SIGSTOP, 0), (signal.SIGSTOP, 1)]
)
def test_a_process_that_is_gone_or_hangs(runs: Runs, forks: Forks, case: Case, number: int, rank: int) -> None:
    name = f"signal-{number}-{case}-{rank}"
    job = started_like_srun(runs, forks, name, case)
    until(lambda: steps_taken(runs.folder / name) >= 2 or job.poll())
    assert not job.poll(), job.text()
    since = time.monotonic()
    job.kill(number, rank)
    other = 1 - rank
    until(lambda: job.poll() or job.codes[other] is not None, BOUND)
    assert time.monotonic() - since < BOUND
    if number == signal.SIGSTOP:
        assert job.codes[rank] is None
        job.kill(signal.SIGKILL, rank)
    assert job.wait()[other] not in (0, None)
    if number == signal.SIGKILL:  # which of them notices first is chance
        assert any(sign in job.text() for sign in ("store of the job is gone", "Connection closed", "Connection reset"))
    elif rank == 0:  # without a launcher it holds the store
        assert "error: rank 1 stops: the store of the job has not answered" in job.text()
    else:
        assert "error: rank 0 stops: rank 1 has shown no sign of life" in job.text()


def under_torchrun(runs: Runs, name: str, **tamper: Any) -> tuple[subprocess.Popen[bytes], Path]:
    """A torchrun job of two processes, and where it writes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d"]
    command += ["--rdzv_endpoint", "localhost:0", str(TESTS / "tampered_tool.py")]
    command += ["--config", runs.configure(name, Layout()), *LONG, HEARTBEAT, *Case(pp=2).arguments]
    wishes = tamper | {"tell_pid": str(runs.folder / f"{name}-pid")}
    log = runs.folder / f"{name}.log"
    with open(log, "wb") as file:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TAMPER": json.dumps(wishes)}
        return subprocess.Popen(command, stdout=file, stderr=file, env=environment), log


def test_an_exception_under_torchrun(runs: Runs) -> None:
    sign = str(runs.folder / "torchrun-exception-signs")
    job, log = under_torchrun(runs, "torchrun-exception", fail_in_step={"rank": 1, "step": 3, "sign": sign})
    until(lambda: signs(sign, 1) or job.poll() is not None, 120)
    assert_ends(job.wait, time.monotonic())
    assert job.returncode
    assert "ArithmeticError: broken on purpose" in log.read_text()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_process_that_is_gone_or_hangs_under_torchrun(runs: Runs, number: int) -> None:
    name = f"torchrun-{number}"
    job, log = under_torchrun(runs, name)
    until(lambda: steps_taken(runs.folder / name) >= 2 or job.poll() is not None, 120)
    pids = [int(sign_of(str(runs.folder / f"{name}-pid"), rank).read_text()) for rank in (0, 1)]
    since = time.monotonic()
    os.kill(pids[1], number)
    if number == signal.SIGSTOP:  # torchrun waits for it to obey SIGTERM, in vain
        until(lambda: job.poll() is not None or not psutil.pid_exists(pids[0]) or is_zombie(pids[0]), BOUND)
        os.kill(pids[1], signal.SIGKILL)
    assert_ends(job.wait, since)
    assert job.returncode
    assert "no sign of life" in log.read_text() or number == signal.SIGKILL


def is_zombie(pid: int) -> bool:
    """Ended, and nobody has asked how."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_two_runs_in_one_folder(runs: Runs, forks: Forks) -> None:
    """The second is refused, and the first does not notice. When the first is killed, the folder is free."""
    argv = ["--config", runs.configure("shared", Layout()), *LONG]
    first = forks.start(argv, runs.folder / "first.log", launcher=False)
    until(lambda: steps_taken(runs.folder / "shared") >= 2 or first.poll())
    second = forks.start(argv, runs.folder / "second.log", launcher=False)
    assert second.wait() == [2], second.text()
    (line,) = second.text().strip().splitlines()
    assert line.startswith("error: another run is under way in ")
    pair = started_like_srun(runs, forks, "shared", Case(dp=2))
    until(lambda: pair.poll() or 2 in pair.codes, BOUND)
    assert pair.codes[0] == 2
    assert "another run is under way" in pair.text()
    if pair.codes[1] is None:  # it waits for the first to form a group
        pair.kill(signal.SIGKILL, 1)
    taken = steps_taken(runs.folder / "shared")
    until(lambda: steps_taken(runs.folder / "shared") > taken or first.poll())
    assert not first.poll(), first.text()
    first.kill(signal.SIGKILL)
    first.wait()
    assert (
        subprocess.run(
            [sys.executable, TOOL, *argv, "--training.train_iters=1", "--lr.warmup_iters=0"], check=False
        ).returncode
        == 0
    )
