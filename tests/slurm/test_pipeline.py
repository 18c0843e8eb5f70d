"""The chains of examples/llama3_8b and of the quickstart: their own scripts and paths, a tiny model, on a real SLURM."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from slurm_cluster import Cluster
from tiny_models import ROOT, make_tiny_llama

pytestmark = pytest.mark.slurm
RECIPE = "examples/llama3_8b"
TEXT = {"en": "The quick brown fox jumps over the lazy dog. ", "zh": "今天天气很好，我们去公园散步。"}


@pytest.fixture
def project(tmp_path: Path, chat_tokenizer_dir: str) -> Path:
    """The repository as the chain sees it, with little text and a tiny model where the recipe expects a large one."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    (tmp_path / "tools").symlink_to(ROOT / "tools")
    make_tiny_llama(tmp_path / "models/Meta-Llama-3-8B", chat_tokenizer_dir, vocab_size=406)
    for corpus in ("en_dolma", "zh_zhihu", "en_valid", "zh_valid"):
        rows = [{"text": f"{corpus} {i}: {TEXT[corpus[:2]] * (i % 5 + 3)}"} for i in range(40)]
        write_lines(tmp_path / f"raw/{corpus}/text.jsonl", rows)
        write_lines(tmp_path / f"raw/valid/{corpus[:2]}.jsonl", rows[:5])
    messages = [
        [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "好" * (i % 3 + 1)}] for i in range(24)
    ]
    write_lines(tmp_path / "data/sft.jsonl", [{"messages": turns} for turns in messages])
    pairs = [{"instruction": f"{i}?", "chosen": "好", "rejected": "dog"} for i in range(24)]
    write_lines(tmp_path / "data/dpo.jsonl", pairs)
    shrink(tmp_path / RECIPE)
    return tmp_path


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def shrink(recipe: Path) -> None:
    """Batches, lengths and lists of data; no path from one stage to the next, and no layout."""
    changes: dict[str, dict[str, Any]] = {
        "mixture": {"seq_length": 64, "general": [corpus("en_dolma")], "additional": [corpus("zh_zhihu")]},
        "cpt": {
            "training": {"train_tokens": 3 * 8 * 64, "micro_batch_size": 2, "global_batch_size": 8, "params_dtype": "fp32"},
            "lr": {"warmup_tokens": 8 * 64},
            "validation": {"eval_interval": 2, "eval_samples": 4},
        },
        "sft": {"data": {"sources": [{"path": "data/sft.jsonl", "language": "zh"}], "max_length": 160}},
        "dpo": {"data": {"sources": [{"path": "data/dpo.jsonl", "language": "zh"}], "max_length": 160}},
        "evaluate": {"suite": None, "max_length": 64},
        "evaluate_chat": {
            "suite": None,
            "apply_chat_template": False,
            "prompts": [{"path": "data/sft.jsonl", "language": "zh", "max_prompts": 2}],
            "max_new_tokens": 4,
        },
    }
    for name in ("sft", "dpo"):
        changes[name]["training"] = {"epochs": 1, "micro_batch_size": 1, "global_batch_size": 8, "params_dtype": "fp32"}
    for name, sections in changes.items():
        path = recipe / f"{name}.yaml"
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
        for section, values in sections.items():
            old = fields.get(section)
            fields[section] = old | values if isinstance(old, dict) and isinstance(values, dict) else values
        path.write_text(yaml.safe_dump(fields, allow_unicode=True), encoding="utf-8")


def corpus(name: str) -> dict[str, str]:
    return {"prefix": f"../../data/llama3/{name}"}


def start(script: Path, cluster: Cluster, **variables: str) -> str:
    """As a user would, from another folder; returns what it prints."""
    done = subprocess.run(
        [script],
        cwd=script.parent,
        env=os.environ | cluster.environment | variables,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def submit(cluster: Cluster, project: Path, **variables: str) -> dict[str, str]:
    """All stages of the recipe over two nodes; returns stage -> job."""
    sizes = {"NODES": "2", "RANKS_PER_NODE": "1", "GPUS_PER_NODE": "0", "CPUS_PER_RANK": "1", "TIME": "30", "DEVICE": ""}
    sizes |= {"PARTS": "2", "CORPORA": "en_dolma zh_zhihu en_valid zh_valid", "SIGNAL_SECONDS": "60"}
    printed = start(project / RECIPE / "pipeline.sh", cluster, **sizes | variables)
    return dict(re.findall(r"^(\w+) +(\d+)", printed, flags=re.M))


def test_the_chain(cluster: Cluster, project: Path) -> None:
    """From text to reports; every stage begins when those before it are done, and finds what they have left."""
    jobs = submit(cluster, project)
    assert len(jobs) == 8
    facts = {}
    for stage, job in jobs.items():
        facts[stage] = cluster.wait(job, 1200)
        assert facts[stage]["JobState"] == "COMPLETED", f"{stage}\n{cluster.log(job)}"
    order = [("preprocess", "cpt"), ("convert", "cpt"), ("cpt", "export"), ("export", "sft"), ("sft", "dpo")]
    for before, after in [*order, ("export", "evaluate"), ("dpo", "evaluate_chat")]:
        assert facts[before]["EndTime"] <= facts[after]["StartTime"], (before, after)
    runs = project / "runs/llama3-8b"
    for stage in ("cpt", "cpt-sft", "cpt-dpo"):
        assert json.loads((runs / stage / "status.json").read_text())["state"] == "finished"
    assert json.loads((runs / "cpt/run.json").read_text())["layout"]["data_parallel_size"] == 1, "TP 2 over two nodes"
    report = json.loads((runs / "cpt-evaluation/report.json").read_text())
    assert set(report["models"]) == {"Llama-3-8B", "CPT"}
    assert report["models"]["CPT"]["text"]["zh"]["bits_per_byte"] > 0
    assert set(json.loads((runs / "cpt-evaluation-chat/report.json").read_text())["models"]) == {"C-SFT", "C-DPO"}
    logs = list((project / "runs/slurm").glob(f"sft_{jobs['sft']}/start_0/n*.log"))
    assert {log.name for log in logs} == {"n1.log", "n2.log"}, "accelerate started ranks on both nodes"


def test_what_waits_for_a_stage_that_fails_is_cancelled(cluster: Cluster, project: Path) -> None:
    """Preprocessing, by a damaged file."""
    (project / "raw/en_dolma/text.jsonl").rename(project / "raw/en_dolma/text.jsonl.gz")
    jobs = submit(cluster, project, STAGES="preprocess cpt export", PARTS="1", CORPORA="en_dolma")
    assert [cluster.wait(job, 300)["JobState"] for job in jobs.values()] == ["CANCELLED"] * 3


@pytest.mark.slow  # test_the_chain has the same parts
def test_the_quickstart(cluster: Cluster, tmp_path: Path, tiny_tokenizer_dir: str) -> None:
    """On 2 nodes x 2 ranks, with inputs that are there already, and smaller."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    (tmp_path / "tools").symlink_to(ROOT / "tools")
    (tmp_path / "examples/quickstart/fetch.py").write_text("")
    inputs = tmp_path / "runs/slurm_quickstart/inputs"
    make_tiny_llama(inputs / "hf", tiny_tokenizer_dir)
    for corpus in ("en_train", "en_valid", "zh_train", "zh_valid"):
        write_lines(inputs / f"{corpus}.jsonl", [{"text": f"{corpus} {i}: {TEXT[corpus[:2]] * 20}"} for i in range(40)])
    path = tmp_path / "examples/slurm_quickstart/cpt.yaml"
    fields = yaml.safe_load(path.read_text())
    fields["training"]["train_iters"] = 3
    fields["lr"] = {"warmup_iters": 1}
    fields["validation"] = {"eval_interval": 3, "eval_samples": 4}
    del fields["parallel"]["num_layers_in_first_pipeline_stage"]
    path.write_text(yaml.safe_dump(fields))
    job = start(tmp_path / "examples/slurm_quickstart/quickstart.sh", cluster).split()[-1]
    assert cluster.wait(job, 1200)["JobState"] == "COMPLETED", cluster.log(job)
    manifest = json.loads((tmp_path / "runs/slurm_quickstart/hf-cpt/manifest.json").read_text())
    assert manifest["source"].endswith("/iter_0000003")
