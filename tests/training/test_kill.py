"""kill -9, again and again, at moments spread over start-up, steps, evaluations and saves: the run that comes out of it is
the undisturbed one, bit for bit. Real tools, as a user starts them."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from forks import TOOL, Forks, Job, until
from layout_cases import Case
from metrics_rows import clockless, newest
from recipes import saving_as
from tiny_models import VARIANTS
from tiny_runs import Layout, Runs

from megatron_cpt.convert.config import Verify
from megatron_cpt.convert.verify import verify
from megatron_cpt.training.metrics_file import read_metrics

SETTINGS = ("--validation.eval_interval=4", "--training.global_batch_size=4")
START, STEP, EVALUATION, SAVE = "in the start", "in a step", "in an evaluation", "in a save"
# Those in an evaluation come to a checkpoint before; the others may lose all that was done since the start.
MOMENTS = (START, SAVE, STEP, EVALUATION, SAVE, SAVE, STEP, EVALUATION, START, SAVE, STEP, SAVE, EVALUATION)
SEED = 5


@dataclass(frozen=True)
class Suffering:
    """How a run saves, how long it is and how often it is killed."""

    case: Case
    recipe: str  # whose way of saving it has
    steps: int
    starts: int
    kills: int  # as many of the starts at least come to the moment at which they are killed
    torchrun: bool = True  # or the ranks are forked from a process that has imported everything, which is much quicker

    @property
    def arguments(self) -> list[str]:
        return [*SETTINGS, f"--training.train_iters={self.steps}", *saving_as(self.recipe, 1), *self.case.arguments]

    @property
    def seconds_of_start(self) -> float:
        return 6.0 if self.torchrun else 2.0

    def __str__(self) -> str:
        return f"{self.case}-{self.recipe}-{self.kills} kills"


class KilledRun:
    """One run that is started and killed until it is done."""

    forks: Forks

    def __init__(self, runs: Runs, name: str, suffering: Suffering) -> None:
        self.folder, self.case, self.log = runs.folder / name, suffering.case, runs.folder / f"{name}.log"
        self.arguments = ["--config", runs.configure(name, Layout()), *suffering.arguments]
        self.random, self.pause = random.Random(SEED), suffering.seconds_of_start
        self.landed: Counter[str] = Counter()

    def start(self) -> subprocess.Popen[bytes]:
        """As a user would, in a process group of its own."""
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(self.case.processes)]
        launcher += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
        command = [sys.executable, *(launcher if self.case.processes > 1 else []), TOOL, *self.arguments]
        with open(self.log, "ab") as log:
            environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
            return subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)

    def half_written(self) -> set[tuple[int, int]]:
        """Checkpoints that are not complete, told apart from those of the same name."""
        found = set()
        for path in self.folder.glob(".iter_*.tmp"):
            with contextlib.suppress(FileNotFoundError):
                found.add((path.stat().st_ino, path.stat().st_ctime_ns))
        return found

    def last_row(self) -> tuple[int, float]:
        """Iteration of the last row of metrics.jsonl, and when it was written."""
        path = self.folder / "metrics.jsonl"
        with contextlib.suppress(FileNotFoundError, IndexError):
            return read_metrics(str(self.folder))[-1]["iteration"], path.stat().st_mtime
        return 0, 0.0

    def wait_for(self, moment: str, job: subprocess.Popen[bytes]) -> None:
        """Until the moment has come, and a random part of it is over."""
        left_over, (_, last_write), saved = self.half_written(), self.last_row(), newest(self.folder) or 0

        def begun() -> bool:  # rows after the newest checkpoint are removed at the start
            iteration, written = self.last_row()
            return written > last_write and iteration > saved

        conditions: dict[str, Callable[[], bool]] = {
            START: lambda: True,
            SAVE: lambda: bool(self.half_written() - left_over),
            STEP: begun,
            EVALUATION: lambda: begun() and self.last_row()[0] % 4 == 0,
        }
        pauses = {START: (0, self.pause), SAVE: (0, 0.03), STEP: (0, 0.3), EVALUATION: (0, 0.05)}
        until(lambda: conditions[moment]() or job.poll() is not None, 120, pause=0.002)
        time.sleep(self.random.uniform(*pauses[moment]))

    def kill(self, job: subprocess.Popen[bytes], alone: bool) -> None:
        """The whole job, or one worker, whose end has to end the others."""
        workers = [child.pid for child in psutil.Process(job.pid).children()] if alone else []
        if workers:
            os.kill(self.random.choice(workers), signal.SIGKILL)
            job.wait(120)  # torchrun gives the others half a minute, in which some wait for it to join them
            assert job.returncode
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
        job.wait()

    def suffer(self, moment: str, alone: bool) -> None:
        """Start, wait for a moment, kill."""
        left_over = self.half_written()
        job = self.start()
        self.wait_for(moment, job)
        if job.poll() is None:
            self.kill(job, alone)
            self.landed[SAVE if self.half_written() - left_over else "elsewhere"] += 1
        assert job.returncode in (-signal.SIGKILL, 1, 0), self.log.read_text()[-3000:]


class RankInfo:
    """Forked ranks, as `KilledRun` sees a job."""

    def __init__(self, job: Job) -> None:
        self.job = job

    @property
    def returncode(self) -> int:
        return next((code for code in self.job.codes if code), 0) or 0

    def poll(self) -> int | None:
        return self.returncode if self.job.poll() else None

    def wait(self, timeout: float) -> int:
        self.job.wait(timeout)
        return self.returncode


class ForkedRun(KilledRun):
    """A run without torchrun: it is killed as a whole, or one rank is, whose end has to end the others."""

    def start(self) -> Any:
        return RankInfo(self.forks.start(self.arguments, self.log, self.case.processes))

    def kill(self, job: Any, alone: bool) -> None:
        pids = job.job.pids
        for pid in [self.random.choice(pids)] if alone else pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        job.wait(120)


LONGEST = [pytest.mark.slow, pytest.mark.overnight]
RECIPE = "llama3_8b/cpt_8k.yaml"
SUFFERINGS = [
    Suffering(Case(), RECIPE, steps=12, starts=6, kills=4),
    pytest.param(Suffering(Case(tp=2), "slurm_quickstart/cpt.yaml", steps=20, starts=13, kills=10), marks=pytest.mark.slow),
    pytest.param(Suffering(Case(dp=2), RECIPE, steps=100, starts=66, kills=60, torchrun=False), marks=LONGEST),
]


@pytest.mark.parametrize("suffering", SUFFERINGS, ids=str)
def test_a_run_survives_any_number_of_kills(
    tmp_path: Path, tiny_tokenizer_dir: str, forks: Forks, suffering: Suffering
) -> None:
    runs, case = Runs(tmp_path, tiny_tokenizer_dir, **VARIANTS["tied"]), suffering.case
    whole = KilledRun(runs, "whole", suffering)
    forks.start(whole.arguments, runs.folder / "whole.log", case.processes).finish(600)
    killed = KilledRun(runs, "killed", suffering) if suffering.torchrun else ForkedRun(runs, "killed", suffering)
    killed.forks = forks
    for number, moment in zip(range(suffering.starts), itertools.cycle(MOMENTS), strict=False):
        # Ranks that have not joined yet know nothing of each other: it is torchrun that ends the others there
        together = case.processes == 1 or number % 2 or (moment == START and not suffering.torchrun)
        killed.suffer(moment, alone=not together)
        print(f"kill {number + 1} {moment}: checkpoint {newest(killed.folder)}", flush=True)
    print(f"landed: {dict(killed.landed)}")
    assert sum(killed.landed.values()) >= suffering.kills, killed.landed
    assert killed.landed[SAVE] >= 2, killed.landed
    assert newest(killed.folder), "no kill but the last was survived"
    assert killed.start().wait(600) == 0, killed.log.read_text()[-3000:]
    assert clockless(killed.folder) == clockless(whole.folder)
    assert [row["iteration"] for row in clockless(killed.folder) if "loss" in row] == list(range(1, suffering.steps + 1))
    assert not [*killed.folder.glob(".iter_*")]
    kept = sorted(path.name for path in killed.folder.glob("iter_*"))
    assert kept == sorted(path.name for path in whole.folder.glob("iter_*"))
    for name in kept:
        assert "tensors equal" in verify(Verify(str(killed.folder / name), str(whole.folder / name)))
        for path in (whole.folder / name / "hf").iterdir():
            assert (killed.folder / name / "hf" / path.name).read_bytes() == path.read_bytes()
