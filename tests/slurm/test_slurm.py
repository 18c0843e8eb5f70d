"""The scripts of examples/slurm_quickstart, and a study, on a real SLURM whose nodes have nothing but files in common."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from metrics_rows import clockless, newest, steps_taken
from slurm_cluster import Cluster
from tampering import sign_of, signs
from tiny_models import ROOT, read_rows, run_tool, write_yaml
from tiny_runs import STEPS, Layout, Runs

pytestmark = pytest.mark.slurm
SCRIPTS = ROOT / "examples" / "slurm_quickstart"
LAYOUT = Layout(tp=2, dp=2)
MICROBATCHES = 2  # of a step, on each rank
FOREVER = 3600.0
LAUNCHERS = ["srun", pytest.param("torchrun", marks=pytest.mark.slow)]  # it differs in how ranks hear and end, not when


@dataclass
class Jobs:
    """Runs of the tiny model through cpt.sh, on 2 nodes x 2 ranks."""

    cluster: Cluster
    runs: Runs

    def submit(self, name: str, **variables: str) -> str:
        variables = {
            "CONFIG": self.runs.configure(name, LAYOUT),
            "SAVE": str(self.runs.folder / name),
            "LOGS": str(self.runs.folder / "logs"),
            "JOB_NAME": name,
            "CHECK": "0",  # takes as long as the run, and has a test of its own
        } | variables
        return self.cluster.submit(str(SCRIPTS / "cpt.sh"), **variables)

    def tampered(self, name: str, until: int, wishes: dict[str, Any], **variables: str) -> str:
        return self.submit(
            name,
            TOOL=str(Path(__file__).parent / "tampered_until.py"),
            TAMPER=json.dumps(wishes),
            TAMPER_UNTIL=str(until),
            **variables,
        )

    def stuck_in_step(self, step: int, name: str, until: int, **variables: str) -> tuple[str, str]:
        """A job whose ranks all wait for data forever in a step; returns it, and where the ranks say so."""
        sign = str(self.runs.folder / f"{name}.sign")
        pause = {"sign": sign, "seconds": FOREVER, "after": (step - 1) * MICROBATCHES + 1}
        return self.tampered(name, until, {"slow_reads": pause}, **variables), sign

    def finished(self, name: str) -> list[dict[str, Any]]:
        """The rows of a run that went to its end."""
        folder = self.runs.folder / name
        assert json.loads((folder / "status.json").read_text())["state"] == "finished"
        rows = clockless(folder)
        assert [row["iteration"] for row in rows if "loss" in row] == list(range(1, STEPS + 1))
        return rows


@pytest.fixture(scope="module")
def jobs(cluster: Cluster, runs: Runs) -> Jobs:
    return Jobs(cluster, runs)


@pytest.fixture(scope="module")
def undisturbed(jobs: Jobs) -> list[dict[str, Any]]:
    """A run in one job, a task for each rank."""
    job = jobs.submit("undisturbed", CHECK="1")
    assert jobs.cluster.wait(job)["JobState"] == "COMPLETED", jobs.cluster.log(job)
    return jobs.finished("undisturbed")


def hosts_of(folder: Path) -> set[str]:
    return {
        line.split(" on ")[1].split(",")[0] for log in folder.glob("logs/*") for line in log.read_text().splitlines()[:1]
    }


def test_a_task_for_each_rank(undisturbed: list[dict[str, Any]], jobs: Jobs) -> None:
    assert hosts_of(jobs.runs.folder / "undisturbed") == {"n1", "n2"}
    logs = {log.name for log in (jobs.runs.folder / "logs").glob("undisturbed_*/start_0/n*.log")}
    assert logs == {"n1.log", "n2.log"}


def test_torchrun_on_each_node(undisturbed: list[dict[str, Any]], jobs: Jobs) -> None:
    """The same ranks on the same nodes, so the same bits."""
    job = jobs.submit("torchrun", LAUNCHER="torchrun")
    assert jobs.cluster.wait(job)["JobState"] == "COMPLETED", jobs.cluster.log(job)
    assert jobs.finished("torchrun") == undisturbed
    assert hosts_of(jobs.runs.folder / "torchrun") == {"n1", "n2"}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_time_limit_in_mid_run(launcher: str, undisturbed: list[dict[str, Any]], jobs: Jobs) -> None:
    """In step 4, which would never end. Step 3 is saved because SLURM asked: the run saves after steps 2 and 4."""
    name = f"limit-{launcher}"
    limits = {"TIME": "2", "SIGNAL_SECONDS": "45", "MAX_STALLED_RESTARTS": "5"}
    job, sign = jobs.stuck_in_step(4, name, until=3, LAUNCHER=launcher, **limits)
    over = jobs.cluster.wait(job)
    log = jobs.cluster.log(job)
    assert over["JobState"] == "COMPLETED", log
    assert int(over["Restarts"]) >= 1
    assert signs(sign) > 0
    assert "queued again, to go on from step 3" in log
    assert jobs.finished(name) == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "partition"), [("srun", "spare"), ("torchrun", "spare"), ("srun", "spare_at_once")])
def test_preemption_in_mid_run(launcher: str, partition: str, undisturbed: list[dict[str, Any]], jobs: Jobs) -> None:
    """With a grace time, and without one, where KillWait has to do. In step 4, as above."""
    name = f"preempted-{launcher}-{partition}"
    job, sign = jobs.stuck_in_step(4, name, until=3, LAUNCHER=launcher, PARTITION=partition)
    folder = jobs.runs.folder / name
    jobs.cluster.wait_for(lambda: bool(signs(sign, 3)) and steps_taken(folder) == 3, job)  # reading is ahead of training
    jobs.cluster.preempt()
    over = jobs.cluster.wait(job)
    log = jobs.cluster.log(job)
    assert (over["JobState"], over["Restarts"]) == ("COMPLETED", "1"), log
    assert ("queued again, to go on from step 3" in log) == (partition == "spare"), log
    assert "start 1 of job" in log
    assert "from step 3; logs: " in log
    assert "failed with status" not in log
    assert jobs.finished(name) == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize(("then", "state"), [("", "COMPLETED"), ("raise ArithmeticError('broken on purpose')\n", "FAILED")])
def test_preemption_before_a_rank_can_save(then: str, state: str, jobs: Jobs, tmp_path: Path) -> None:
    """It ends by SLURM's signal, and not as one that fails; one that fails after that does."""
    (tmp_path / "starting.py").write_text(STARTING + then)
    name = f"starting-{state}"
    job = jobs.submit(name, TOOL=str(tmp_path / "starting.py"), PARTITION="spare", BEGUN=str(tmp_path / "begun"))
    jobs.cluster.wait_for((tmp_path / "begun").exists, job)
    jobs.cluster.preempt()
    over = jobs.cluster.wait(job)
    assert (over["JobState"], over["Restarts"]) == (state, "1"), jobs.cluster.log(job)


def test_a_node_that_is_killed_in_mid_run(undisturbed: list[dict[str, Any]], jobs: Jobs) -> None:
    """The job goes on from its last checkpoint, on the nodes that are left. The script itself was on another node."""
    job, sign = jobs.stuck_in_step(4, "killed", until=2)
    folder = jobs.runs.folder / "killed"
    jobs.cluster.wait_for(lambda: bool(signs(sign, 3)) and newest(folder) == 2, job)  # reading is ahead of training
    assert jobs.cluster.show(job)["BatchHost"] == "n1"
    jobs.cluster.kill_node(2)
    try:
        over = jobs.cluster.wait(job)
    finally:
        jobs.cluster.start_node(2)
    log = jobs.cluster.log(job)
    assert over["JobState"] == "COMPLETED", log
    assert over["NodeList"] == "n[1,3]"
    assert "on n1 n3, from step 2" in log
    assert jobs.finished("killed") == undisturbed


@pytest.mark.slow
def test_a_node_that_is_gone_before_slurm_knows(jobs: Jobs, tmp_path: Path) -> None:
    """The ranks cannot be started: the script must not take that for a failure of theirs, which would end the job."""
    (tmp_path / "nothing.py").write_text("")
    jobs.cluster.kill_node(2)
    try:
        job = jobs.submit("gone", TOOL=str(tmp_path / "nothing.py"), ANSWER_SECONDS="5")
        over = jobs.cluster.wait(job)
    finally:
        jobs.cluster.start_node(2)
    log = jobs.cluster.log(job)
    assert (over["JobState"], over["NodeList"]) == ("COMPLETED", "n[1,3]"), log
    assert "a node does not answer: waiting for SLURM" in log


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_rank_that_fails(launcher: str, jobs: Jobs) -> None:
    name = f"failing-{launcher}"
    sign = str(jobs.runs.folder / f"{name}.sign")
    job = jobs.tampered(name, 99, {"fail_in_step": {"rank": 3, "step": 2, "sign": sign}}, LAUNCHER=launcher)
    over = jobs.cluster.wait(job)
    assert (over["JobState"], over["Restarts"]) == ("FAILED", "0")
    ended = time.mktime(time.strptime(over["EndTime"], "%Y-%m-%dT%H:%M:%S"))
    assert ended - os.stat(sign_of(sign, 3)).st_mtime < 60, "the others waited for a rank that was gone"
    summary = jobs.cluster.log(job).partition(f"--- job {job} failed with status ")[2].splitlines()
    assert summary[1] == "rank 3 failed: ArithmeticError: broken on purpose"
    trace = [line.partition("3: ")[2] for line in summary if line.lstrip("0").startswith("3: ")]
    assert trace[0] == "Traceback (most recent call last):"
    assert "ArithmeticError: broken on purpose" in trace


def test_a_rank_that_is_killed(jobs: Jobs, tmp_path: Path) -> None:
    """It says nothing, and what others say of it is not the cause."""
    (tmp_path / "killed.py").write_text(
        "import os, signal, time\n"
        "if os.environ['RANK'] == '1':\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "time.sleep(2)\n"
        "raise ConnectionError('rank 0 failed: connection closed by peer')\n"
    )
    job = jobs.submit("shot", TOOL=str(tmp_path / "killed.py"))
    assert jobs.cluster.wait(job)["JobState"] == "FAILED"
    summary = jobs.cluster.log(job).partition(f"--- job {job} failed with status ")[2].splitlines()
    assert summary[1] == "error: n1: task 1: Killed"


STARTING = """
import os, time
if os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
    open(os.environ["BEGUN"], "w").close()
    time.sleep(3600)
"""
BROKEN = """
import os, sys, time
if os.environ["RANK"] == "2":
    sys.exit("error: a broken driver")
time.sleep(3600)
"""


def test_restarts_without_progress_come_to_an_end(jobs: Jobs, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text(BROKEN)
    broken = {"TOOL": str(tmp_path / "broken.py"), "REQUEUE_ON_FAILURE": "1"}
    job = jobs.submit("stalled", MAX_STALLED_RESTARTS="1", **broken)
    over = jobs.cluster.wait(job)
    assert (over["JobState"], over["Restarts"]) == ("FAILED", "1")
    log = jobs.cluster.log(job)
    assert log.count("queued again, to go on from step 0") == 1
    assert "not queued again: the run is still at step 0 after 1 restarts" in log
    assert "2: error: a broken driver" in log


def test_a_cancelled_job_stays_cancelled(jobs: Jobs, tmp_path: Path) -> None:
    (tmp_path / "sleep.py").write_text(f"import time; open({str(tmp_path / 'started')!r}, 'w'); time.sleep(3600)")
    job = jobs.submit("cancelled", TOOL=str(tmp_path / "sleep.py"))
    jobs.cluster.wait_for((tmp_path / "started").exists, job)
    jobs.cluster.run("scancel", job)
    over = jobs.cluster.wait(job)
    assert (over["JobState"], over["Restarts"]) == ("CANCELLED", "0")


def test_preprocessing_as_an_array(cluster: Cluster, runs: Runs, tiny_tokenizer_dir: str, tmp_path: Path) -> None:
    """Then merged: the bytes of one local run."""
    variables = {
        "INPUTS": str(runs.folder),
        "OUTPUT": str(tmp_path / "data"),
        "CORPORA": "en_train zh_train",
        "PARTS": "3",
        "TOKENIZER": tiny_tokenizer_dir,
        "LOGS": str(tmp_path / "logs"),
    }
    job = cluster.submit(str(SCRIPTS / "preprocess.sh"), **variables)
    assert cluster.wait(job)["JobState"] == "COMPLETED", cluster.log(job)
    assert len(list((tmp_path / "logs").glob("preprocess_*"))) == 6
    for corpus in ("en_train", "zh_train"):
        for kind in ("bin", "idx"):
            ours, theirs = (folder / f"{corpus}.{kind}" for folder in (tmp_path / "data", runs.folder))
            assert ours.read_bytes() == theirs.read_bytes(), f"{corpus}.{kind}"


def test_curation_as_arrays(cluster: Cluster, tmp_path: Path) -> None:
    """One for each step, and a job that joins what they leave: the files of a local run."""
    english = "The old farmer walked to the market and bought bread with the money that his brother had given him. "
    chinese = "年轻的老师给图书馆写了一封信，因为城市决定修建一座新的桥梁。"
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        lines = [json.dumps({"text": f"{name} {i}. " + text * 5}) for i in range(5) for text in (english, chinese)]
        (tmp_path / "in" / f"{name}.jsonl").write_text("\n".join(lines))
    curate = ["python", str(ROOT / "tools" / "curate_data.py"), "--input", str(tmp_path / "in"), "--keep_languages", "en"]
    curate += ["--filters", "none", "--deduplicate", "false", "--compression", "none", "--output_folder"]
    cluster.run(*curate, str(tmp_path / "local"), "--workers", "1")
    array = [*curate, str(tmp_path / "array"), "--executor", "slurm", "--slurm.partition", "main"]
    cluster.run(*array)
    jobs = json.loads((tmp_path / "array" / ".curation" / "slurm" / "jobs.json").read_text())
    for job in jobs:
        cluster.wait(job)
        assert cluster.states(job) == {"COMPLETED"}, cluster.log(job)
    assert (tmp_path / "array" / ".curation" / "report.json").exists()
    ours, theirs = (
        {file.name: file.read_text() for file in (tmp_path / folder / "en").iterdir()} for folder in ("array", "local")
    )
    assert ours == theirs
    assert sum(text.count("old farmer") for text in ours.values()) == 50


def test_a_study_as_an_array(cluster: Cluster, runs: Runs) -> None:
    base = yaml.safe_load(Path(runs.configure("study-base", Layout())).read_text())
    base["training"] = {"train_tokens": 4 * 8 * 64, "micro_batch_size": 8, "global_batch_size": 8}
    fields = {
        "base": write_yaml(runs.folder / "study-base.yaml", base),
        "folder": str(runs.folder / "study"),
        "almr": [0.2, 0.6],
        "lr": [1e-3, 4e-3],
        "train_tokens": 4 * 8 * 64,
        "parallel_runs": 4,
        "executor": "slurm",
        "slurm": {"sbatch": ["--nodes=1", "--time=20"]},
    }
    path = write_yaml(runs.folder / "study.yaml", fields)
    tool = ["python", str(ROOT / "tools" / "almr_study.py"), "run", "--config", path]
    submitted = cluster.run(*tool).stderr
    job = submitted.partition("Submitted batch job ")[2].split()[0]
    cluster.wait(job)
    logs = "".join(log.read_text() for log in (runs.folder / "study" / "slurm").glob("*.log"))
    assert cluster.states(job) == {"COMPLETED"}, logs
    again = run_tool("almr_study.py", "run", "--config", path)
    assert "0 of 4 runs to do" in again.stderr
    for outcome in (runs.folder / "study").glob("runs/*/outcome.json"):
        assert json.loads(outcome.read_text())["kind"] == "finished"
        assert [row["iteration"] for row in read_rows(outcome.parent) if "loss" in row] == [1, 2, 3, 4]
    assert len(list((runs.folder / "study").glob("runs/*/outcome.json"))) == 4
