"""A study as users run it: killed, gone on with, with learning rates that diverge; then fitted, drawn and chosen from."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import yaml
from fork_server import ENVIRONMENT
from tiny_models import command_of, read_rows, run_tool, write_yaml
from tiny_runs import Layout, Runs

from megatron_cpt.study.inputs import START_CHECKPOINT

TOKENS = 24 * 8 * 64  # 24 steps
# Something that depends on the weights: how far the embedding's mean is from zero.
SCORE = """
import json, sys
from safetensors.numpy import load_file  # which imports in less time than torch
weights = load_file(sys.argv[1] + "/model.safetensors")["model.embed_tokens.weight"]
scores = {"drift": 1e3 * abs(float(weights.mean())), "size": float(weights.std())}
json.dump(scores, open(sys.argv[2] + "/scores.json", "w"))
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: str) -> Runs:
    return Runs(tmp_path_factory.mktemp("study"), tiny_tokenizer_dir)


def write_study(runs: Runs, name: str, **changes: Any) -> Path:
    """study.yaml, and the base configuration beside it."""
    base = yaml.safe_load(Path(runs.configure(f"{name}-base", Layout())).read_text())
    base["training"] = {"train_tokens": TOKENS, "micro_batch_size": 8, "global_batch_size": 8}
    base["checkpoint"] |= {"save_interval": 12, "save_optim": True}
    base["validation"] = {"eval_interval": 6}
    fields = {
        "base": write_yaml(runs.folder / f"{name}-base.yaml", base),
        "folder": str(runs.folder / name),
        "almr": [0.2, 0.6],
        "lr": [1e-3, 4e-3, 10.0],
        "train_tokens": TOKENS,
        "parallel_runs": 2,
        "scores": {"command": [sys.executable, "-c", SCORE, "{hf}", "{output}"]},
    }
    return Path(write_yaml(runs.folder / f"{name}.yaml", fields | changes))


def study(command: str, path: Path, *options: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return run_tool("almr_study.py", command, "--config", str(path), *options, check=check)


@pytest.fixture(scope="module")
def whole(runs: Runs) -> Path:
    """2 x 2 runs and two that diverge; the first start is killed when a run is over and another is under way."""
    path = write_study(runs, "whole")
    planned = study("plan", path).stderr
    assert "6 runs of 24 steps" in planned
    assert "unknown until a run has finished" in planned
    folder = runs.folder / "whole"
    command = [*command_of("almr_study.py"), "run", "--config", str(path)]
    first = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=os.environ | ENVIRONMENT)
    deadline = time.monotonic() + 300
    while not list(folder.glob("runs/*/outcome.json")):
        assert first.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    first.send_signal(signal.SIGKILL)
    first.wait()
    before = {over: over.stat().st_mtime_ns for over in folder.glob("runs/*/outcome.json")}
    result = study("run", path)
    assert {over: over.stat().st_mtime_ns for over in before} == before, "a finished run was done again"
    assert result.stdout.strip() == str(folder / "results.parquet")
    return path


def test_every_run_is_done_once(whole: Path, runs: Runs) -> None:
    folder = runs.folder / "whole"
    outcomes = {over.parent.name: json.loads(over.read_text()) for over in folder.glob("runs/*/outcome.json")}
    assert len(outcomes) == 6
    for name, outcome in outcomes.items():
        assert outcome["kind"] == ("diverged" if "lr10_" in name else "finished"), (name, outcome)
        iterations = [row["iteration"] for row in read_rows(folder / "runs" / name) if "loss" in row]
        assert len(iterations) == len(set(iterations)), "a step is there twice"
        if outcome["kind"] == "finished":
            assert iterations == list(range(1, 25))
    assert not list(folder.glob("runs/*/iter_*")), "checkpoints are not kept"
    record = json.loads((folder / "inputs.json").read_text())
    started = [json.loads(path.read_text()) for path in folder.glob("runs/*/inputs.json")]
    assert started == [{START_CHECKPOINT: record[START_CHECKPOINT]}] * 6
    assert not list(folder.glob(".scores-*"))
    again = study("run", whole)
    assert "0 of 6 runs to do" in again.stderr


def test_runs_of_a_study_differ_in_what_it_varies_only(whole: Path, runs: Runs) -> None:
    configs = [yaml.safe_load(p.read_text()) for p in (runs.folder / "whole" / "configs").glob("*seed1.yaml")]
    mixtures = [yaml.safe_load(p.read_text()) for p in (runs.folder / "whole" / "configs").glob("*.mixture.yaml")]
    assert {(c["optimizer"]["lr"], round(c["optimizer"]["min_lr"] / c["optimizer"]["lr"], 6)) for c in configs} == {
        (lr, 0.033333) for lr in (1e-3, 4e-3, 10.0)
    }
    for config in configs:
        del config["mixture"], config["checkpoint"]["save"], config["optimizer"]
    assert all(config == configs[0] for config in configs)
    assert sorted({m.pop("almr") for m in mixtures}) == [0.2, 0.6]
    assert all(mixture == mixtures[0] for mixture in mixtures)


def test_results_have_a_row_for_each_evaluation(whole: Path, runs: Runs) -> None:
    folder = runs.folder / "whole"
    rows = pyarrow.parquet.read_table(folder / "results.parquet").to_pylist()
    with open(folder / "results.csv", encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == len(rows)
    one = [row for row in rows if row["run"] == "almr0.6_lr0.004_seed1"]
    assert [row["iteration"] for row in one] == [0, 6, 12, 18, 24]
    assert [row["tokens"] for row in one] == [512 * n for n in (0, 6, 12, 18, 24)]
    assert [row["last"] for row in one] == [False, False, False, False, True]
    last, metrics = one[-1], read_rows(folder / "runs" / "almr0.6_lr0.004_seed1")
    sets = [row for row in metrics if "validation" in row][-1]["validation"]
    assert (last["general"], last["additional"]) == (sets["en"]["loss"], sets["zh"]["loss"])
    assert last["mixed"] == pytest.approx(0.4 * sets["en"]["loss"] + 0.6 * sets["zh"]["loss"])
    assert [row["mean_metric"] is not None for row in one] == [True, False, True, False, True]
    assert last["mean_metric"] == pytest.approx((last["drift"] + last["size"]) / 2)
    assert {row["outcome"] for row in rows if row["lr"] == 10.0} == {"diverged"}
    assert (folder / "scores" / "start" / "iter_0000000.json").exists()


def test_fit_plot_and_choose(whole: Path, runs: Runs) -> None:
    folder = runs.folder / "whole"
    fitted = study("fit", whole)
    assert "2 runs diverged and left out" in fitted.stderr
    found = json.loads((folder / "fit.json").read_text())
    assert found["surfaces"]["additional"]["runs"] == 4
    assert "9 or more support a surface" in found["surfaces"]["additional"]["refused"]
    chosen = study("choose", whole, "--goal", "additional", "--max_general_rise", "0.5")
    assert "Only measured pairs were compared" in chosen.stderr
    assert chosen.stdout.strip() == str(folder / "chosen.yaml")
    choice = json.loads((folder / "choice.json").read_text())
    config = yaml.safe_load((folder / "chosen.yaml").read_text())
    assert config["optimizer"]["lr"] == choice["lr"]
    assert yaml.safe_load(Path(config["mixture"]).read_text())["almr"] == choice["almr"]
    page = Path(study("plot", whole).stdout.strip()).read_text()
    assert page.count("data:image/png;base64,") == 4
    for name in ("contours", "languages", "trajectories", "pareto"):
        assert (folder / f"{name}.png").stat().st_size > 20_000
    checked = run_tool("pretrain_cpt.py", "--config", str(folder / "chosen.yaml"), "--check_only")
    assert checked.returncode == 0


def test_results_of_a_part_do_not_replace_those_of_the_whole(whole: Path, runs: Runs) -> None:
    results = runs.folder / "whole" / "results.parquet"
    before = results.read_bytes()
    results.unlink()
    part = study("fit", whole, "--lr", "[0.001,0.004]")
    assert "has more runs than are asked for here: results.parquet is left as it is" in part.stderr
    assert not results.exists()
    study("fit", whole)
    assert results.read_bytes() == before


def test_the_plan_knows_what_was_done_and_proposes_more(whole: Path) -> None:
    folder = Path(yaml.safe_load(whole.read_text())["folder"])
    refused = study("plan", whole, "--adaptive", "2", "--limits.runs", "7", check=False)
    assert "the study takes runs 8; limits.runs is 7" in refused.stderr
    assert not (folder / "proposed.json").exists()
    planned = " ".join(study("plan", whole, "--adaptive", "2").stderr.split())
    assert "8 runs of 24 steps" in planned
    assert planned.count(" * ") == 2
    outcomes = [json.loads(path.read_text()) for path in folder.glob("runs/*/outcome.json")]
    timed = [o for o in outcomes if o["kind"] == "finished" and o["wall_seconds"] is not None]
    assert 2 <= len(timed) <= 4  # the first start did two runs at a time, and was killed perhaps while it measured both
    assert all(outcome["wall_seconds"] > outcome["seconds"] for outcome in timed)  # with start, evaluations, scores
    assert f"mean of {len(timed)} runs that have finished" in planned
    assert "1 diverged" in planned
    # What was proposed beyond a part of the ranges is not of that part
    assert "2 runs of 24 steps" in study("plan", whole, "--almr", "[0.6]", "--lr", "[0.001,0.004]").stderr
    proposed = json.loads((folder / "proposed.json").read_text())
    (folder / "proposed.json").unlink()
    assert len(proposed) == 2


@pytest.mark.slow
def test_a_study_that_begins_with_a_part_of_its_grid(runs: Runs) -> None:
    """The corners, killed and gone on with; then a pair where it tells most, as often as one likes."""
    grid = {"almr": [0.2, 0.4, 0.6], "lr": [1e-3, 2e-3, 4e-3], "starting_pairs": 4}
    path = write_study(runs, "adaptive", scores=None, train_tokens=TOKENS // 4, **grid)
    folder = runs.folder / "adaptive"
    command = [*command_of("almr_study.py"), "run", "--config", str(path)]
    first = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=os.environ | ENVIRONMENT)
    deadline = time.monotonic() + 300
    while not list(folder.glob("runs/*/outcome.json")):
        assert first.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    first.send_signal(signal.SIGKILL)
    first.wait()
    study("run", path)
    assert {over.parent.name for over in folder.glob("runs/*/outcome.json")} == {
        f"almr{almr}_lr{lr}_seed1" for almr in (0.2, 0.6) for lr in (0.001, 0.004)
    }
    for number in (5, 6):
        assert f"{number} runs of 6 steps" in study("plan", path, "--adaptive", "1").stderr
        assert f"1 of {number} runs to do" in study("run", path).stderr
    assert "0 of 6 runs to do" in study("run", path).stderr


def test_scores_asked_for_too_late_are_said_to_be_missing(runs: Runs) -> None:
    path = write_study(runs, "late", almr=[0.5], lr=[1e-3], scores=None)
    study("run", path)
    path = write_study(runs, "late", almr=[0.5], lr=[1e-3])
    late = study("run", path)
    assert "1 run finished without scores, and the checkpoints are gone; the first is almr0.5_lr0.001_seed1" in late.stderr


def test_another_base_is_another_study(whole: Path, runs: Runs) -> None:
    fields = yaml.safe_load(whole.read_text())
    base = yaml.safe_load(Path(fields["base"]).read_text())
    base["optimizer"]["weight_decay"] = 0.3
    other = write_yaml(runs.folder / "other-base.yaml", base)
    result = study("run", whole, "--base", other, check=False)
    assert result.returncode == 2
    assert "optimizer.weight_decay is " in result.stderr
    assert "use another folder" in result.stderr


def test_wrong_studies_are_refused(runs: Runs) -> None:
    path = write_study(runs, "wrong")

    def refused(*options: str) -> str:
        result = study("plan", path, *options, check=False)
        assert result.returncode == 2, result.stderr
        assert result.stderr.count("error: ") == 1
        return result.stderr

    assert "lr.min is 0.1; expected a number above 0 and below lr.max 0.01" in refused(
        "--lr", "{min: 0.1, max: 0.01, number: 3}"
    )
    assert "configuration nowhere.yaml: No such file" in refused("--base", "nowhere.yaml")
    both = study("plan", path, "--base", "nowhere.yaml", "--folder", str(path), check=False).stderr
    assert "configuration nowhere.yaml: No such file" in both
    assert f"folder is {path}; expected a folder to write to, or a name for a new one ({path} is no folder)" in both
    assert "lr.warmup_iters" in refused("--train_tokens", "10")  # which the check of a run says
    assert not (runs.folder / "wrong").exists()


def test_an_interrupted_study_saves_its_runs(runs: Runs) -> None:
    """SIGTERM: the run under way saves and ends; the same command goes on from there."""
    path = write_study(runs, "stopped", almr=[0.5], lr=[1e-3], train_tokens=10 * TOKENS, scores=None)
    command = [*command_of("almr_study.py"), "run", "--config", str(path)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | ENVIRONMENT)
    folder = runs.folder / "stopped" / "runs" / "almr0.5_lr0.001_seed1"
    deadline = time.monotonic() + 120
    while not (folder / "metrics.jsonl").exists() or not any("loss" in row for row in read_rows(folder)):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "the runs have saved; the same command goes on" in errors
    assert json.loads((folder / "status.json").read_text())["state"] == "stopped"
    assert (folder / "latest_checkpointed_iteration.txt").exists()
    # Its folder may be moved meanwhile
    moved = runs.folder / "moved"
    os.rename(runs.folder / "stopped", moved)
    study("run", path, "--folder", str(moved))
    folder = moved / "runs" / folder.name
    assert json.loads((folder / "outcome.json").read_text())["kind"] == "finished"
    assert [row["iteration"] for row in read_rows(folder) if "loss" in row] == list(range(1, 24 * 10 + 1))
    assert not (runs.folder / "stopped").exists()


# Does the array's tasks one after another, as SLURM would in some order.
SBATCH = """#!/usr/bin/env bash
set -euo pipefail
[ "$#" = 1 ] || exit 3
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\)%2$/\\1/p' "$1")
for task in $(seq "$last" -1 0); do SLURM_ARRAY_TASK_ID=$task bash "$1"; done >&2
echo "Submitted batch job 7"
"""


@pytest.mark.slow
def test_a_job_array_does_the_same(whole: Path, runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every task of the array, through a sbatch that runs them here; the results are those of the local study."""
    (tmp_path / "sbatch").write_text(SBATCH)
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    path = write_study(runs, "array", almr=[0.6], lr=[1e-3, 4e-3], executor="slurm")
    submitted = study("run", path, "--slurm.sbatch", '["--partition=gpu"]')
    assert "Submitted batch job 7" in submitted.stderr
    script = Path(submitted.stdout.strip()).read_text()
    assert "#SBATCH --partition=gpu\n" in script
    assert "names=(start almr0.6_lr0.001_seed1 almr0.6_lr0.004_seed1)" in script
    for name in ("almr0.6_lr0.001_seed1", "almr0.6_lr0.004_seed1"):
        ours, theirs = (read_rows(runs.folder / folder / "runs" / name) for folder in ("whole", "array"))
        assert [row["loss"] for row in ours if "loss" in row] == [row["loss"] for row in theirs if "loss" in row]
    assert (runs.folder / "array" / "scores" / "start" / "iter_0000000.json").exists()
    again = study("run", path)
    assert "0 of 2 runs to do" in again.stderr


def test_without_slurm(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    path = write_study(runs, "none", executor="slurm")
    result = study("run", path, check=False)
    assert (result.returncode, result.stderr.count("error: sbatch is not there")) == (2, 1)
    dry = study("run", path, "--slurm.dry_run")
    assert Path(dry.stdout.strip()).name == "study.sbatch"
