"""SFT by the recipe's script, accelerate on two nodes of a real SLURM: stopped and queued again, it has the same bits."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from slurm_cluster import Cluster
from tampering import signs
from tiny_models import ROOT, make_tiny_llama, read_rows, write_yaml

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
STEPS, HELD = 4, 2


@dataclass
class Jobs:
    """Runs of the tiny model, on 2 nodes with a rank each."""

    cluster: Cluster
    folder: Path

    def submit(self, name: str, **variables: str) -> str:
        sizes = {"NODES": "2", "RANKS_PER_NODE": "1", "GPUS_PER_NODE": "0", "CPUS_PER_RANK": "1", "TIME": "", "DEVICE": ""}
        files = {"FROM": str(self.folder / "hf"), "CONFIG": str(self.folder / "sft.yaml"), "SAVE": str(self.folder / name)}
        logs = {"LOGS": str(self.folder / "logs"), "JOB_NAME": name, "CHECK": "0"}
        return self.cluster.submit(str(ROOT / "examples/llama3_8b/sft.sh"), **(sizes | files | logs | variables))

    def held(self, name: str, **variables: str) -> str:
        """A job whose ranks wait after step HELD until they are told to stop."""
        tool = {
            "TOOL": str(Path(__file__).parent / "held_sft.py"),
            "HELD": str(HELD),
            "SIGN": self.sign(name),
        }
        return self.submit(name, **(tool | variables))

    def sign(self, name: str) -> str:
        """Where ranks say that they wait."""
        return str(self.folder / f"{name}.sign")

    def all_held(self, name: str) -> bool:
        return all(signs(self.sign(name), rank) for rank in range(2))

    def finished(self, name: str) -> tuple[list[dict[str, Any]], bytes]:
        """What a run that went to its end says of its steps, without the clock and TRL's own averages, and its weights."""
        folder = self.folder / name
        assert json.loads((folder / "status.json").read_text())["state"] == "finished"
        rows = [
            {key: row[key] for key in ("iteration", "loss", "grad_norm", "learning_rate")}
            for row in read_rows(folder)
            if "loss" in row
        ]
        assert [row["iteration"] for row in rows] == list(range(1, STEPS + 1))
        return rows, (folder / "hf/model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def jobs(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory, chat_tokenizer_dir: str) -> Jobs:
    folder = tmp_path_factory.mktemp("sft")
    make_tiny_llama(folder / "hf", chat_tokenizer_dir, vocab_size=406)
    turns = [[{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "好" * (i % 5 + 1)}] for i in range(24)]
    (folder / "zh.jsonl").write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns))
    config = {
        "model": "",
        "save": "",
        "data": {
            "sources": [{"path": str(folder / "zh.jsonl"), "language": "zh"}],
            "max_length": 160,
            "chat_template": "llama3",
        },
        "packing": False,
        "training": {"max_steps": STEPS, "micro_batch_size": 1, "global_batch_size": 8},
        "optimizer": {"lr": 3e-3},
    }
    write_yaml(folder / "sft.yaml", config)
    return Jobs(cluster, folder)


@pytest.fixture(scope="module")
def undisturbed(jobs: Jobs) -> tuple[list[dict[str, Any]], bytes]:
    job = jobs.submit("undisturbed")
    assert jobs.cluster.wait(job)["JobState"] == "COMPLETED", jobs.cluster.log(job)
    return jobs.finished("undisturbed")


def assert_went_on(jobs: Jobs, job: str, name: str, undisturbed: tuple[list[dict[str, Any]], bytes]) -> None:
    over, log = jobs.cluster.wait(job), jobs.cluster.log(job)
    assert over["JobState"] == "COMPLETED", log
    assert int(over["Restarts"]) >= 1
    assert f"queued again, to go on from step {HELD}" in log
    assert "failed with status" not in log
    assert jobs.finished(name) == undisturbed


def test_a_time_limit(jobs: Jobs, undisturbed: tuple[list[dict[str, Any]], bytes]) -> None:
    """Of three minutes, in a run that would never end."""
    job = jobs.held("limit", TIME="3", SIGNAL_SECONDS="100", MAX_STALLED_RESTARTS="5")
    assert_went_on(jobs, job, "limit", undisturbed)
    assert "USR1: the ranks are told to save" in jobs.cluster.log(job)


def test_preemption(jobs: Jobs, undisturbed: tuple[list[dict[str, Any]], bytes]) -> None:
    """With a grace time: the ranks are told with SIGTERM, and so is the launcher, which ends with a status of its own."""
    job = jobs.held("preempted", PARTITION="spare")
    jobs.cluster.wait_for(lambda: jobs.all_held("preempted"), job)
    jobs.cluster.preempt()
    assert_went_on(jobs, job, "preempted", undisturbed)
