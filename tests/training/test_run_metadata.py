"""run.json says on what and with what a run ran, and nothing secret."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_cpt.training.run_metadata import git_state, hosts, relevant_environment, run_facts


def test_facts_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    facts = run_facts(lambda mine: [mine, mine])
    assert json.loads(json.dumps(facts)) == facts
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["hosts"] == [facts["hosts"][0] | {"ranks": [0, 1], "pids": [os.getpid()] * 2}]
    assert facts["hosts"][0]["devices"][0]
    assert facts["command"] == [sys.executable, *sys.argv]
    assert facts["environment"]["NCCL_DEBUG"] == "INFO"


def test_ranks_are_listed_by_host() -> None:
    processes = [{"hostname": h, "cpu_count": 8, "device": "chip", "pid": n} for n, h in enumerate(["a", "b", "a", "b"])]
    assert [(host["hostname"], host["ranks"], host["pids"]) for host in hosts(processes)] == [
        ("a", [0, 2], [0, 2]),
        ("b", [1, 3], [1, 3]),
    ]


def test_secrets_stay_out() -> None:
    kept = {
        "OMP_NUM_THREADS": "8",
        "CUDA_VISIBLE_DEVICES": "0",
        "SLURM_JOB_ID": "7",
        "TORCH_NCCL_BLOCKING_WAIT": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "WORLD_SIZE": "2",
    }
    left_out = (
        "WANDB_API_KEY",
        "HF_TOKEN",
        "SLURM_JWT",
        "AWS_SECRET_ACCESS_KEY",
        "TORCH_TOKEN",
        "OMP_API_KEY",
        "HOME",
        "PATH",
    )
    assert relevant_environment(kept | dict.fromkeys(left_out, "secret")) == dict(sorted(kept.items()))


def test_git_state(tmp_path: Path) -> None:
    package = tmp_path / "repository" / "package"
    package.mkdir(parents=True)
    assert git_state(str(package)) is None  # no repository
    environment = {"GIT_CONFIG_GLOBAL": "/dev/null", "PATH": os.environ["PATH"]}

    def git(*arguments: str) -> None:
        who = ("-c", "user.name=a", "-c", "user.email=a@example.com")
        subprocess.run(["git", "-C", str(package), *who, *arguments], check=True, capture_output=True, env=environment)

    git("init", str(package.parent))
    (package.parent / "README").write_text("another project\n")
    git("add", "../README")
    git("commit", "-m", "first")
    (package / "__init__.py").write_text("")
    assert git_state(str(package)) is None  # merely installed below somebody's repository
    git("add", ".")
    git("commit", "-m", "second")
    state = git_state(str(package))
    assert state is not None
    assert (len(state["commit"]), state["dirty"], state["changed_files"]) == (40, False, [])
    (package / "__init__.py").write_text("changed = True\n")
    state = git_state(str(package))
    assert state is not None
    assert (state["dirty"], state["changed_files"]) == (True, ["package/__init__.py"])
