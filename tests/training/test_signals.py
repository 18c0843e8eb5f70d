"""A run that is asked to stop saves and stops within a micro-batch, whatever it is doing, and goes on later as if nothing
had happened. With two processes one of them hears of it, and never the first.

Micro-batches that sleep make a step long; how many of them begin after the request tells how soon it was obeyed, whatever
else keeps the machine busy.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from forks import TESTS, Forks, Job, until
from layout_cases import Case
from metrics_rows import clockless, newest, steps_taken
from tampering import sign_of, signs
from tiny_models import VARIANTS
from tiny_runs import Layout, Runs

from megatron_cpt.convert.config import Verify
from megatron_cpt.convert.verify import verify

STEPS, MICROBATCHES = 4, 16
SETTINGS = (
    f"--training.train_iters={STEPS}",
    "--training.micro_batch_size=1",
    f"--training.global_batch_size={MICROBATCHES}",
    "--validation.eval_interval=2",
)
SLOW = 0.4  # seconds of a slow micro-batch; processes tell each other within about a second
TOO_LONG = 3600.0  # what lasts so long has to be given up
LAYOUTS = [Case(), Case(pp=2), Case(tp=2)]


@dataclass(frozen=True)
class Phase:
    """Where a request arrives.

    Attributes:
        tamper: what makes that phase long
        pause: its length and when it begins
        reached: signs of the pause after which the request is sent
        rows: steps in metrics.jsonl by then
        saved: the last whole step, which the checkpoint has to be of; None: there is nothing to save
    """

    tamper: str
    pause: dict[str, Any]
    saved: int | None
    reached: int = 1
    rows: int = 0


PHASES = {
    "checks": Phase("slow_checks", {"seconds": 1.0}, None),
    "building": Phase("slow_start", {"seconds": 1.0}, None),
    "loading": Phase("slow_loading", {"seconds": 1.0}, None),
    "the first evaluation": Phase("slow_evaluation", {"seconds": SLOW}, None, reached=3),
    "the first step": Phase("slow_microbatches", {"seconds": SLOW}, None, reached=2),
    "a micro-batch": Phase("slow_microbatches", {"seconds": SLOW, "after": 3 * MICROBATCHES}, 3, reached=2),
    "waiting for data": Phase("slow_reads", {"seconds": TOO_LONG, "after": MICROBATCHES + 3}, 1, rows=1),
    "the update": Phase("slow_updates", {"seconds": 1.5, "after": 2}, 3),
    "an evaluation": Phase("slow_evaluation", {"seconds": SLOW, "after": 30}, 2),
    "a save": Phase("slow_saves", {"seconds": 1.5}, 2),
}


class Stopper:
    """Starts runs that are made slow, and compares what they come to in the end."""

    def __init__(self, runs: Runs, forks: Forks) -> None:
        self.runs, self.forks = runs, forks
        self.whole: dict[Case, Path] = {}

    def start(self, case: Case, name: str, *extra: str, **tamper: Any) -> Job:
        argv = ["--config", self.runs.configure(name, Layout()), *SETTINGS, *case.arguments, *extra]
        return self.forks.start(argv, self.runs.folder / f"{name}.log", case.processes, tamper)

    def undisturbed(self, case: Case) -> Path:
        if case not in self.whole:
            self.start(case, f"whole-{case}").finish()
            self.whole[case] = self.runs.folder / f"whole-{case}"
        return self.whole[case]

    def goes_on(self, case: Case, name: str) -> None:
        """Start it again, and compare with the run that was not disturbed, bit for bit."""
        self.start(case, name).finish()
        assert curve(self.runs.folder / name) == curve(self.undisturbed(case))
        assert "tensors equal" in verify(Verify(str(self.runs.folder / name), str(self.undisturbed(case))))
        assert status(self.runs.folder / name)["state"] == "finished"


@pytest.fixture(scope="module")
def stopper(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: str, forks: Forks) -> Stopper:
    return Stopper(
        Runs(tmp_path_factory.mktemp("signals"), tiny_tokenizer_dir, **VARIANTS["tied"], num_hidden_layers=2), forks
    )


def curve(folder: Path) -> list[dict[str, Any]]:
    """What has to be equal: every step and every evaluation is there once."""
    rows = clockless(folder)
    assert [row["iteration"] for row in rows if "loss" in row] == list(range(1, STEPS + 1))
    assert [row["iteration"] for row in rows if "validation" in row] == [0, 2, 4]
    return rows


def status(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "status.json").read_text()))


def assert_stopped(job: Job, folder: Path, saved: int | None, reason: str, timeout: float = 60.0) -> None:
    """All processes ended well; the checkpoint is that of the last whole step, and nothing unfinished lies about."""
    job.finish(timeout)
    assert newest(folder) == saved, job.text()
    assert not list(folder.glob(".iter_*"))
    if saved is None:
        assert status(folder) == status(folder) | {"state": "stopped", "iteration": 0}
        return
    assert status(folder) == status(folder) | {"state": "stopped", "iteration": saved, "reason": reason}


# Where a pipeline waits otherwise than tensor-parallel ranks do: always; the other phases take minutes more.
PIPELINE_PHASES = ("the first step", "a micro-batch", "an evaluation", "a save")


def phases_and_layouts() -> list[Any]:
    """Every phase in every layout; some are slow."""
    return [
        pytest.param(
            phase,
            case,
            id=f"{phase}-{case}",
            marks=() if case.pp == 1 or phase in PIPELINE_PHASES else pytest.mark.slow,
        )
        for phase in PHASES
        for case in LAYOUTS
    ]


@pytest.mark.parametrize(("phase", "case"), phases_and_layouts())
def test_sigterm(stopper: Stopper, phase: str, case: Case) -> None:
    name, where = f"{phase}-{case}".replace(" ", "-"), PHASES[phase]
    sign, last = str(stopper.runs.folder / f"{name}-signs"), case.processes - 1
    job = stopper.start(case, name, **{where.tamper: where.pause | {"sign": sign}})
    folder = stopper.runs.folder / name
    # Text is read ahead: that a read has begun does not mean that the steps before it are over.
    until(lambda: (signs(sign, last) >= where.reached and steps_taken(folder) >= (where.rows)) or job.poll())
    before = signs(sign, last)
    job.kill(signal.SIGTERM, last)
    assert_stopped(job, folder, where.saved, "SIGTERM")
    if where.pause["seconds"] == SLOW:
        allowed = 2 if case.processes == 1 else 6  # of 16: a step to its end would begin 14 more
        assert signs(sign, last) - before <= allowed
    stopper.goes_on(case, name)


LONG_STEP = {"seconds": SLOW, "after": 2 * MICROBATCHES}
REQUESTS = ["SIGUSR1", "SIGUSR2", "SIGTERM twice", "the file stop_now", "the time limit (training.exit_duration_in_mins)"]


@pytest.mark.parametrize("case", [Case(), Case(tp=2)], ids=str)
@pytest.mark.parametrize("request_", REQUESTS)
def test_other_requests_to_stop(stopper: Stopper, request_: str, case: Case) -> None:
    name = f"{request_.split('(')[0]}-{case}".replace(" ", "-")
    sign, last = str(stopper.runs.folder / f"{name}-signs"), case.processes - 1
    folder = stopper.runs.folder / name
    limit = ("--training.exit_duration_in_mins=0.15",) if "limit" in request_ else ()
    pause = {"seconds": SLOW, "after": (1 if limit else 2) * MICROBATCHES, "sign": sign}
    job = stopper.start(case, name, *limit, slow_microbatches=pause)
    if limit:
        job.finish()
        assert status(folder)["reason"] == request_
        assert newest(folder) == status(folder)["iteration"] or newest(folder) is None
        stopper.goes_on(case, name)
        return
    until(lambda: signs(sign, last) or job.poll())
    before = signs(sign, last)
    if request_.startswith("SIG"):
        for _ in range(2 if "twice" in request_ else 1):
            job.kill(signal.Signals[request_.split()[0]], last)
    else:
        (folder / "stop_now").touch()
    assert_stopped(job, folder, 2, request_.removesuffix(" twice"))
    assert signs(sign, last) - before <= 6
    assert not (folder / "stop_now").exists()
    stopper.goes_on(case, name)


@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_save_now_saves_and_goes_on(stopper: Stopper, case: Case) -> None:
    name = f"save-now-{case}"
    sign, folder = str(stopper.runs.folder / f"{name}-signs"), stopper.runs.folder / name
    job = stopper.start(case, name, slow_microbatches={"seconds": 0.15, "sign": sign})
    until(lambda: signs(sign) >= 2 or job.poll())
    (folder / "save_now").touch()
    job.finish()
    saved = sorted(int(path.name[5:]) for path in folder.glob("iter_*"))
    assert saved == [1, 2, 4]  # 2 and 4 are those of save_interval
    assert not (folder / "save_now").exists()
    assert curve(folder) == curve(stopper.undisturbed(case))


def test_a_stop_before_the_last_step_ends_nothing_twice(stopper: Stopper) -> None:
    """Asked to stop in the last step's update, the run is finished anyway: it evaluates, saves, and says so."""
    sign, name = str(stopper.runs.folder / "last-signs"), "last"
    job = stopper.start(Case(), name, slow_updates={"seconds": 1.0, "after": STEPS - 1, "sign": sign})
    until(lambda: signs(sign) or job.poll())
    job.kill(signal.SIGTERM)
    job.finish()
    assert newest(stopper.runs.folder / name) == STEPS
    stopper.start(Case(), name).finish()
    assert curve(stopper.runs.folder / name) == curve(stopper.undisturbed(Case()))


def test_requests_after_the_last_step_do_not_wait_for_the_next_start(stopper: Stopper) -> None:
    """They would stop it before its first step."""
    folder = stopper.runs.folder / "too-late"
    job = stopper.start(Case(), "too-late", late_requests=str(folder))
    job.finish()
    assert status(folder)["state"] == "finished"
    assert not [name for name in ("stop_now", "save_now") if (folder / name).exists()]
    assert "stop_now came when there was nothing left to do, and is removed" in job.text()


@pytest.mark.parametrize("end", ["finished", "stopped"])
def test_processes_that_leave_late_are_no_trouble(stopper: Stopper, end: str) -> None:
    """The store that processes talk through is gone with the first of them: who leaves later must not miss it."""
    name, sign = f"late-{end}", str(stopper.runs.folder / f"late-{end}-signs")
    case = Case(tp=2)
    tamper: dict[str, Any] = {"slow_end": {"seconds": 3.0, "sign": f"{sign}-end", "ranks": [1]}}
    if end == "stopped":
        tamper["slow_updates"] = {"seconds": 1.0, "after": 1, "sign": sign}
    job = stopper.start(case, name, **tamper)
    if end == "stopped":
        until(lambda: signs(sign) or job.poll())
        job.kill(signal.SIGTERM)
    assert job.wait() == [0, 0], job.text()
    assert status(stopper.runs.folder / name)["state"] == end


def test_under_torchrun(stopper: Stopper) -> None:
    """The real thing: a worker of a torchrun job gets SIGTERM, the job saves and exits with 0."""
    name, folder = "torchrun", stopper.runs.folder / "torchrun"
    sign = str(stopper.runs.folder / "torchrun-signs")
    tamper = {"slow_microbatches": LONG_STEP | {"sign": sign}, "tell_pid": f"{sign}-pid"}
    config = stopper.runs.configure(name, Layout())
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d"]
    command += ["--rdzv_endpoint", "localhost:0", str(TESTS / "tampered_tool.py"), "--config", config]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TAMPER": json.dumps(tamper)}
    with open(stopper.runs.folder / "torchrun.log", "w", encoding="utf-8") as log:
        job = subprocess.Popen([*command, *SETTINGS, *Case(pp=2).arguments], stdout=log, stderr=log, env=environment)
        until(lambda: signs(sign, 1) >= 2 or job.poll() is not None, 120)
        os.kill(int(sign_of(f"{sign}-pid", 1).read_text()), signal.SIGTERM)
        assert job.wait(60) == 0, Path(log.name).read_text()
    assert newest(folder) == 2
    assert signs(sign, 1) <= 10
    stopper.goes_on(Case(pp=2), name)
