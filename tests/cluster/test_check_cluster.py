"""tools/check_cluster.py: what holds passes, and where one process computes something else the right rows fail."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fork_server import ENVIRONMENT
from tiny_models import command_of

from megatron_cpt.cluster.check import CheckFailedError
from megatron_cpt.cluster.job import free_port
from megatron_cpt.cluster.training_runs import FP32, STEPS, ClusterRun, judge_training

TAMPER = """
import os, sys
words = " ".join(sys.orig_argv)
if os.environ.get("RANK") == "1" and "pretrain_cpt.py" in words:
    import torch
    attention = torch.nn.functional.scaled_dot_product_attention
    torch.nn.functional.scaled_dot_product_attention = lambda *a, **k: 1.01 * attention(*a, **k)
if os.environ.get("RANK") == "1" and "measure_links" in words:
    import torch.distributed as dist
    reduce = dist.all_reduce
    def wrong(tensor, *a, **k):
        work = reduce(tensor, *a, **k)
        tensor += 1
        return work
    dist.all_reduce = wrong
"""


def check(
    folder: Path, *words: str, processes: int = 1, tampered: bool = False
) -> tuple[subprocess.CompletedProcess[str], Any]:
    """Run the tool; what it has written, or None."""
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)] if processes > 1 else []
    if launcher:
        launcher += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    environment = os.environ | ENVIRONMENT
    if tampered:
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(TAMPER)
        environment["PYTHONPATH"] = str(folder)
    python, tool = command_of("check_cluster.py")
    result = subprocess.run(
        [python, *launcher, tool, "--folder", str(folder), *words],
        capture_output=True,
        text=True,
        timeout=900,
        env=environment,
    )
    report = folder / "check_cluster.json"
    return result, json.loads(report.read_text()) if report.exists() else None


def states(report: Any) -> dict[str, str]:
    """Of each check."""
    return {row["name"]: row["state"] for row in report["checks"]}


def test_one_process_is_told_what_needs_several(tmp_path: Path) -> None:
    result, report = check(tmp_path, "--only", "versions", "clocks", "file system", "links")
    assert result.returncode == 0, result.stderr
    assert states(report) == {"versions": "passed", "clocks": "skipped", "file system": "passed", "links": "skipped"}
    assert report["processes"] == 1
    assert result.stdout.strip() == str(tmp_path / "check_cluster.json")
    assert "2 passed, 0 failed, 2 skipped" in result.stderr


def test_processes_that_a_launcher_of_slurm_starts(tmp_path: Path) -> None:
    """As srun starts them: without torchrun, whose store others join, the first process makes it, on the job's address."""
    tool = [*command_of("check_cluster.py"), "--folder", str(tmp_path), "--only", "clocks", "versions"]
    joined = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environment = os.environ | ENVIRONMENT | joined
    ranks = [subprocess.Popen(tool, env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(2)]
    try:
        assert [rank.wait(180) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    assert states(json.loads((tmp_path / "check_cluster.json").read_text())) == {"versions": "passed", "clocks": "passed"}


def test_a_word_in_no_name(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    result, report = check(folder, "--only", "TP2", "nonsense")
    assert result.returncode == 2
    assert report is None
    assert "only is TP2, which is in no check's name; expected one of 'versions', 'clocks'," in result.stderr
    assert "'logits', 'logits, Transformer Engine'," in result.stderr
    assert not folder.exists()
    assert "Traceback" not in result.stderr


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result, _ = check(tmp_path / "file")
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: folder is {tmp_path / 'file'}; expected a folder to write to, ")
    assert "Traceback" not in result.stderr


def test_a_rank_that_computes_something_else(tmp_path: Path) -> None:
    """It is the second: what one process does, and the file system, stay as they are."""
    folder = tmp_path / "here"
    result, report = check(folder, "--only", "DP2", "links", "file system", processes=2, tampered=True)
    assert result.returncode == 1
    found = states(report)
    assert found["one process"] == found["file system"] == "passed", result.stderr
    assert found["links"] == found["TP1 PP1 DP2"] == "failed"
    row = next(row for row in report["checks"] if row["name"] == "TP1 PP1 DP2")
    assert row["said"].startswith("the loss is ")
    assert "NCCL_ALGO=Ring" in row["advice"]
    assert "sums are wrong on rank 1" in result.stderr


@pytest.mark.parametrize("step", [None, 1, 2])
def test_packed_documents_are_told_apart_by_any_step(step: int | None, tmp_path: Path) -> None:
    """All samples of the first step may lie within a document each, and its loss is then the one without packing."""
    for name, changed in (("one process", None), ("one process, packed", step)):
        folder = tmp_path / "runs" / ClusterRun(name).folder_name
        folder.mkdir(parents=True)
        rows = [{"iteration": i, "loss": 6.0 - i + 0.1 * (i == changed), "grad_norm": 1.0} for i in range(1, STEPS + 1)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    job, found = SimpleNamespace(folder=tmp_path), [{"seconds": 1.0, "log": "a.log"}]
    run = ClusterRun("one process, packed")
    if step is None:
        with pytest.raises(CheckFailedError, match="documents are not told apart"):
            judge_training(run, job, found)  # type: ignore[arg-type]
    else:
        assert judge_training(run, job, found)[0].startswith("loss ")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "off", "holds"), [("grad_norm", 2e-5, True), ("grad_norm", 2e-4, False), ("loss", 2e-5, False)]
)
def test_what_a_layout_may_differ_by(name: str, off: float, holds: bool, tmp_path: Path) -> None:
    """A healthy machine was failed for 1.6e-5 of a gradient norm after five steps."""
    for run, factor in (("one process", 1.0), ("TP2", 1 + off)):
        folder = tmp_path / "runs" / ClusterRun(run).folder_name
        folder.mkdir(parents=True)
        rows = [{"iteration": i, "loss": 6.0 - i, "grad_norm": 2.0} for i in range(1, STEPS + 1)]
        rows[-1][name] *= factor
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    job, found = SimpleNamespace(folder=tmp_path), [{"seconds": 1.0, "log": "a.log"}]
    run = ClusterRun("TP2", like="one process", tolerance=FP32)
    if holds:
        assert judge_training(run, job, found)[0].startswith("like one process to ")  # type: ignore[arg-type]
    else:
        with pytest.raises(CheckFailedError, match=r"expected at most (0\.0001|1e-05)"):
            judge_training(run, job, found)  # type: ignore[arg-type]


def test_a_report_in_a_folder_that_is_made_for_it(tmp_path: Path) -> None:
    target = tmp_path / "not" / "there" / "yet.json"
    result, _ = check(tmp_path / "here", "--only", "versions", "--report", str(target))
    assert result.returncode == 0, result.stderr
    assert states(json.loads(target.read_text())) == {"versions": "passed"}


@pytest.mark.slow
def test_every_row_of_four_processes(tmp_path: Path) -> None:
    result, report = check(tmp_path, "--minutes", "14", processes=4)
    assert result.returncode == 0, result.stderr
    found = states(report)
    skipped = {row["name"]: row["said"] for row in report["checks"] if row["state"] == "skipped"}
    assert set(skipped.values()) <= {"needs a GPU", "needs a GPU and Transformer Engine"}
    layouts = {"TP1 PP1 DP4", "TP2 PP1 DP2", "TP1 PP2 DP2", "TP2 PP2 DP1", "TP1 PP2 VP2 DP2", "TP1 PP4 DP1", "TP4 PP1 DP1"}
    resumed = {
        "resume, bit for bit",
        "resume in TP2 PP1 DP2",
        "resume TP2 PP1 DP2 in DP4",
        "resume TP2 PP1 DP2 in one process",
    }
    others = {"versions", "clocks", "devices", "file system", "links", "logits", "asynchronous save", "SIGTERM"}
    assert layouts | resumed | others <= {name for name, state in found.items() if state == "passed"}


def test_a_rank_that_dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its row fails soon, with what it said."""
    died = 'import os, sys\nif os.environ.get("RANK") == "1" and "measure_links" in " ".join(sys.orig_argv):\n'
    (tmp_path / "sitecustomize.py").write_text(f'{died}    sys.exit("no such link")\n')
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    result, report = check(tmp_path, "--only", "links", "versions", processes=2)
    assert result.returncode == 1
    assert states(report) == {"versions": "passed", "links": "failed"}
    assert "no such link" in result.stderr
    assert report["seconds"] < 120
