"""A run that is saved in one layout goes on in another as if nothing had happened; in the same layout, bit for bit."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from forks import Forks
from layout_cases import BF16, FP32, Case
from metrics_rows import clockless
from tiny_models import ROOT, VARIANTS, read_rows, run_tool, write_yaml
from tiny_runs import SAVE_INTERVAL, Layout, Runs

from megatron_cpt.convert.config import Verify
from megatron_cpt.convert.verify import verify

STEPS = 4
SINGLE = Case()
PLAIN = Case(pp=2)
INTERLEAVED = Case(pp=2, virtual=2)
REDUCE_AND_GATHER = ("--parallel.overlap_grad_reduce=true", "--parallel.overlap_param_gather=true")


class Trainer:
    """Runs to the end in one layout (once for each), and on from their first checkpoint in another."""

    def __init__(self, runs: Runs, forks: Forks) -> None:
        self.runs, self.forks = runs, forks
        self.finished: dict[Case, Path] = {}

    def run(self, case: Case, name: str, *extra: str) -> Path:
        argv = ["--config", self.runs.configure(name, Layout()), f"--training.train_iters={STEPS}", *case.arguments, *extra]
        log = self.runs.folder / f"{name}.log"
        self.forks.start(argv, log, case.processes).finish()
        return self.runs.folder / name

    def whole(self, case: Case) -> Path:
        """The undisturbed run."""
        if case not in self.finished:
            self.finished[case] = self.run(case, f"whole-{case}")
        return self.finished[case]

    def resumed(self, saved: Case, case: Case, *extra: str) -> Path:
        """A run in `case` from the first checkpoint of that in `saved`, which had come one step further."""
        name = "-".join([f"{saved}-then-{case}", *(word.split("=")[-1] for word in extra)])
        self.runs.interrupted(self.whole(saved), name)
        return self.run(case, name, *extra)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: str, forks: Forks) -> Trainer:
    return Trainer(Runs(tmp_path_factory.mktemp("resume"), tiny_tokenizer_dir, **VARIANTS["tied"]), forks)


def steps(folder: Path) -> dict[int, dict[str, Any]]:
    """The rows of steps by iteration, without what depends on the clock."""
    rows = [row for row in clockless(folder) if "loss" in row]
    assert [row["iteration"] for row in rows] == list(range(1, len(rows) + 1))
    return {row["iteration"]: row for row in rows}


def assert_goes_on(resumed: Path, whole: Path, tolerance: dict[str, float]) -> None:
    """Equal until the checkpoint; then within the tolerance."""
    found, wanted = steps(resumed), steps(whole)
    assert len(found) == len(wanted) == STEPS
    for iteration, row in wanted.items():
        for key in ("consumed_samples", "lr", "skipped", "corpus_tokens"):
            assert found[iteration][key] == row[key], (iteration, key)
        for key, relative in tolerance.items():
            relative = relative if iteration > SAVE_INTERVAL else 0
            assert found[iteration][key] == pytest.approx(row[key], rel=relative, abs=0), (iteration, key)
    (before,), (after,) = (
        [row["validation"] for row in read_rows(f) if row.get("validation")][-1:] for f in (resumed, whole)
    )
    for name, result in after.items():
        assert before[name]["tokens"] == result["tokens"]
        assert before[name]["loss"] == pytest.approx(result["loss"], rel=tolerance["loss"], abs=0)


PAIRS = [
    (INTERLEAVED, PLAIN),
    (PLAIN, INTERLEAVED),
    (INTERLEAVED, SINGLE),
    (SINGLE, INTERLEAVED),
    (Case(tp=2, sp=True), PLAIN),
    (PLAIN, Case(dp=2)),
    (Case(dp=2), Case(tp=2)),
    (Case(tp=2, pp=2), Case(dp=2, recompute="full")),
    (Case(dp=2, extra=REDUCE_AND_GATHER), Case(pp=4)),
    (Case(pp=2, extra=("--parallel.num_layers_in_first_pipeline_stage=3",)), replace(INTERLEAVED, dp=2)),
    (Case(dp=2, dtype="bf16"), Case(tp=2, dtype="bf16")),
    (replace(INTERLEAVED, dtype="bf16"), Case(dp=2, dtype="bf16")),
    (Case(pp=2, packed=True), Case(dp=2, packed=True)),
]


@pytest.mark.parametrize(("saved", "case"), PAIRS, ids=str)
def test_resume_in_another_layout(trainer: Trainer, saved: Case, case: Case) -> None:
    tolerance = BF16 if case.dtype == "bf16" else FP32
    assert_goes_on(trainer.resumed(saved, case), trainer.whole(saved), tolerance)


SAME = [
    SINGLE,
    INTERLEAVED,
    Case(dp=2, extra=REDUCE_AND_GATHER),
    Case(tp=2, sp=True, dp=2),
    Case(dp=2, dtype="bf16"),
    replace(INTERLEAVED, dtype="bf16", dp=2, extra=REDUCE_AND_GATHER),
]


@pytest.mark.parametrize("case", SAME, ids=str)
def test_resume_in_the_same_layout_is_bit_equal(trainer: Trainer, case: Case) -> None:
    resumed, whole = trainer.resumed(case, case), trainer.whole(case)
    assert steps(resumed) == steps(whole)
    assert "tensors equal" in verify(Verify(str(resumed), str(whole)))


SAMPLES = ("--training.global_batch_size=4", "--training.train_iters=null", "--training.train_samples=32")


@pytest.mark.parametrize("choice", ["continue", "restart"])
def test_another_global_batch_size_and_layout(trainer: Trainer, choice: str) -> None:
    """Two steps of 8 samples, then four of 4 in three layouts: the same text, the same learning rates, the same losses."""
    go_on = (*SAMPLES, f"--lr.on_continue={choice}")
    folders = [trainer.resumed(Case(dp=2), case, *go_on) for case in (Case(dp=2), Case(tp=2), INTERLEAVED)]
    wanted = steps(folders[0])
    assert [row["consumed_samples"] for row in wanted.values()] == [8, 16, 20, 24, 28, 32]
    schedule = json.loads((folders[0] / "iter_0000006" / "manifest.json").read_text())["training"]["lr_schedule"]
    if choice == "restart":  # 8 samples of warm-up, then 8 of decay, from sample 16 on
        assert [row["lr"] for row in wanted.values()][2:] == pytest.approx([1.5e-3, 3e-3, 1.55e-3, 1e-4], rel=1e-9)
    else:  # 8 samples of warm-up, then 24 of decay, from the beginning
        decayed = [1e-4 + 2.9e-3 * (32 - n) / 24 for n in (20, 24, 28, 32)]
        assert [row["lr"] for row in wanted.values()][2:] == pytest.approx(decayed, rel=1e-9)
    assert schedule["start"] == (16 if choice == "restart" else 0)
    for folder in folders[1:]:
        for iteration, row in steps(folder).items():
            for key in ("consumed_samples", "lr", "corpus_tokens"):
                assert row[key] == wanted[iteration][key], (iteration, key)
            for key, relative in FP32.items():
                assert row[key] == pytest.approx(wanted[iteration][key], rel=relative, abs=0), (iteration, key)


def test_what_a_resumed_run_refuses_is_said_at_once_and_without_torch(trainer: Trainer) -> None:
    """Another batch size without a word on the learning rate, another order of the texts, another model, ..."""
    name = "refused"
    trainer.runs.interrupted(trainer.whole(SINGLE), name)
    mixture = yaml.safe_load(Path(trainer.runs.mixture).read_text())
    other = write_yaml(trainer.runs.folder / "other_seed.yaml", mixture | {"seed": 8})
    argv = ["--config", trainer.runs.configure(name, Layout()), *SAMPLES, "--mixture", other]
    argv += [
        "--checkpoint.load",
        str(trainer.runs.folder / "hf"),
        "--logging.profile_step_start=99",
        "--optimizer.clip_grad=-1",
    ]
    lines = refused_without_torch(*argv)
    for said in (
        "lr.on_continue",
        "other_seed.yaml",
        "began with",
        "logging.profile_step_start is 99 but the run ends with step 6",
        "optimizer.clip_grad is -1.0",
    ):
        assert [said in line for line in lines].count(True) == 1, (said, lines)
    assert len(lines) == 5


def refused_without_torch(*argv: str) -> list[str]:
    """The lines with which a run's configuration is refused, before torch is imported."""
    command = [sys.executable, "-B", "-X", "importtime", str(ROOT / "tools" / "pretrain_cpt.py"), *argv]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert not re.search(r"\| +(torch|megatron)$", done.stderr, re.MULTILINE)
    return [line for line in done.stderr.splitlines() if not line.startswith("import time:")]


def test_a_fork_of_a_finished_run_is_refused_together_with_other_mistakes(trainer: Trainer) -> None:
    fork = ["--checkpoint.load", str(trainer.whole(SINGLE)), "--checkpoint.load_state=all"]
    argv = ["--config", trainer.runs.configure("forked", Layout()), f"--training.train_iters={STEPS}", *fork]
    lines = refused_without_torch(*argv, "--parallel.tensor_model_parallel_size=2")
    assert [f"is of step {STEPS} and the run ends with step {STEPS}" in line for line in lines].count(True) == 1
    assert any("tensor_model_parallel_size" in line for line in lines)
    assert len(lines) == 2


def test_what_megatrons_order_cannot_have_is_refused_without_building_it(trainer: Trainer) -> None:
    mixture = yaml.safe_load(Path(trainer.runs.mixture).read_text())
    stages = [{"name": "first", "tokens": 512, "almr": 0.2}, {"name": "last", "almr": 0.4}]
    other = write_yaml(
        trainer.runs.folder / "two_stages.yaml", {k: v for k, v in mixture.items() if k != "almr"} | {"stages": stages}
    )
    argv = ["--config", trainer.runs.configure("staged", Layout()), "--mixture", other, "--data.order=megatron"]
    (line,) = refused_without_torch(*argv)
    assert "data.order megatron knows one almr for the whole run; found 2 stages" in line
    trainer.runs.interrupted(trainer.whole(SINGLE), "reordered")
    argv = ["--config", trainer.runs.configure("reordered", Layout()), f"--training.train_iters={STEPS}"]
    reordered = refused_without_torch(*argv, "--data.order=megatron", "--logging.profile_step_start=99")
    assert any("cannot begin, end or change within a run" in line for line in reordered), reordered
    assert len(reordered) == 2


@pytest.mark.parametrize("moved", [False, True])
def test_a_run_knows_what_it_began_with_from_any_folder(
    trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moved: bool
) -> None:
    """checkpoint.load is often a relative path; run and beginning may be moved together."""
    for name in ("megatron", "hf"):
        shutil.copytree(trainer.runs.folder / name, tmp_path / "a" / name)
    config = trainer.runs.configure("began", Layout())
    argv = ["--config", config, "--checkpoint.load=megatron", "--checkpoint.save=run", "--training.train_iters=1"]
    (tmp_path / "a" / "below").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    assert run_tool("pretrain_cpt.py", *argv, "--lr.warmup_iters=0", "--checkpoint.keep_last=1").returncode == 0
    if moved:
        (tmp_path / "a").rename(tmp_path / "b")
        monkeypatch.chdir(tmp_path / "b")
        assert "nothing to do" in run_tool("pretrain_cpt.py", *argv, "--lr.warmup_iters=0").stderr
        return
    again = [word.replace("=megatron", "=../megatron").replace("=run", "=../run") for word in argv]
    monkeypatch.chdir("below")
    assert "nothing to do" in run_tool("pretrain_cpt.py", *again, "--lr.warmup_iters=0").stderr
    shutil.copytree(tmp_path / "a" / "megatron", "megatron")
    wrong = [word.replace("=run", "=../run") for word in argv]
    refused = run_tool("pretrain_cpt.py", *wrong, "--lr.warmup_iters=0", check=False)
    assert f"checkpoint.load is megatron but the run in ../run began with {tmp_path}/a/megatron;" in refused.stderr
