"""kill -9, again and again, at moments spread over start-up, steps, evaluations and saves: the run that comes out of it is
the undisturbed one, bit for bit. Real tools, as a user starts them."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from forks import TOOL, Forks, until
from layout_cases import Case
from metrics_rows import clockless, newest
from tiny_models import VARIANTS
from tiny_runs import Layout, Runs

from megatron_cpt.checkpoint.verify import Verify, verify
from megatron_cpt.training.metrics_file import read_metrics

STEPS = 20
SETTINGS = (
    f"--training.train_iters={STEPS}",
    "--validation.eval_interval=4",
    "--checkpoint.save_interval=2",
    "--training.global_batch_size=4",
)
START, STEP, EVALUATION, SAVE = "in the start", "in a step", "in an evaluation", "in a save"
# Those in an evaluation come to a checkpoint before; the others may lose all that was done since the start.
MOMENTS = (START, SAVE, STEP, EVALUATION, SAVE, SAVE, STEP, EVALUATION, START, SAVE, STEP, SAVE, EVALUATION)
SEED = 5


class KilledRun:
    """One run that is started and killed until it is done."""

    def __init__(self, runs: Runs, name: str, case: Case) -> None:
        self.folder, self.case, self.log = runs.folder / name, case, runs.folder / f"{name}.log"
        self.arguments = ["--config", runs.configure(name, Layout()), *SETTINGS, *case.arguments]
        self.random = random.Random(SEED)
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
        for path in self.folder.glob(".iter_*"):
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
        pauses = {START: (0, 6), SAVE: (0, 0.03), STEP: (0, 0.3), EVALUATION: (0, 0.05)}
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


@pytest.mark.parametrize("case", [Case(), pytest.param(Case(tp=2), marks=pytest.mark.slow)], ids=str)
def test_a_run_survives_any_number_of_kills(tmp_path: Path, tiny_tokenizer_dir: str, forks: Forks, case: Case) -> None:
    runs = Runs(tmp_path, tiny_tokenizer_dir, **VARIANTS["tied"])
    whole = KilledRun(runs, "whole", case)
    forks.start(whole.arguments, runs.folder / "whole.log", case.processes).finish()
    killed = KilledRun(runs, "killed", case)
    for number, moment in enumerate(MOMENTS):
        killed.suffer(moment, alone=case.processes > 1 and number % 2 == 0)
    come_so_far = newest(killed.folder)
    assert sum(killed.landed.values()) >= 10, killed.landed
    assert killed.landed[SAVE] >= 2, killed.landed
    assert come_so_far, "no kill but the last was survived"
    assert killed.start().wait(120) == 0, killed.log.read_text()[-3000:]
    assert clockless(killed.folder) == clockless(whole.folder)
    assert [row["iteration"] for row in clockless(killed.folder) if "loss" in row] == list(range(1, STEPS + 1))
    assert not killed.half_written()
    for iteration in range(2, STEPS + 1, 2):
        name = f"iter_{iteration:07d}"
        if iteration in (2, come_so_far, STEPS):
            assert "tensors equal" in verify(Verify(str(killed.folder / name), str(whole.folder / name)))
        assert (killed.folder / name / "metadata.json").exists()
