"""Steps that go wrong do not change the weights; too many in a row stop the run, with a checkpoint from before.

Gradients and losses are broken on purpose in chosen steps (`tampering.poison`).
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from forks import Forks, Job, until
from layout_cases import Case
from metrics_rows import clockless, newest
from tampering import sign_of, signs
from tiny_models import VARIANTS, run_tool, write_yaml
from tiny_runs import Layout, Runs

from megatron_cpt.config.run import CheckpointConfig, OptimizerConfig, RunConfig, TrainingConfig
from megatron_cpt.convert.config import Verify
from megatron_cpt.convert.verify import verify
from megatron_cpt.corpus.preprocess import PreprocessConfig, preprocess
from megatron_cpt.training import pretrain, step
from megatron_cpt.training.pretrain import setup
from megatron_cpt.training.validate_config import check_run
from megatron_cpt.utils.errors import InputError

STEPS = 8
SETTINGS = (
    f"--training.train_iters={STEPS}",
    "--training.global_batch_size=4",
    "--training.micro_batch_size=1",
    "--checkpoint.save_interval=1",
)
SINGLE = Case()
LAYOUTS = [SINGLE, Case(dp=2), Case(tp=2), Case(pp=2), Case(pp=2, virtual=2, dp=2, dtype="bf16")]


class Trouble:
    """Starts runs with something broken in them."""

    def __init__(self, runs: Runs, forks: Forks) -> None:
        self.runs, self.forks = runs, forks

    def start(self, name: str, *extra: str, case: Case = SINGLE, **tamper: Any) -> Job:
        argv = ["--config", self.runs.configure(name, Layout()), *SETTINGS, *case.arguments, *extra]
        return self.forks.start(argv, self.runs.folder / f"{name}.log", case.processes, tamper)

    def finish(self, name: str, *extra: str, case: Case = SINGLE, **tamper: Any) -> Path:
        self.start(name, *extra, case=case, **tamper).finish()
        return self.runs.folder / name


@pytest.fixture(scope="module")
def trouble(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: str, forks: Forks) -> Trouble:
    return Trouble(Runs(tmp_path_factory.mktemp("trouble"), tiny_tokenizer_dir, **VARIANTS["tied"]), forks)


def poison(what: str, factor: float | str, first: int, last: int | None = None) -> dict[str, Any]:
    return {"what": what, "factor": factor, "first": first, "last": last or first}


def skipped(folder: Path) -> dict[int, str]:
    """Step -> why it did not change the weights."""
    return {row["iteration"]: row["skipped"] for row in clockless(folder) if row.get("skipped")}


def state_after_steps(trouble: Trouble, name: str, rank: int) -> list[str]:
    """Checksums, after steps 1, 2, ..."""
    return sign_of(str(trouble.runs.folder / f"{name}-state"), rank).read_text().splitlines()


KINDS = [("loss", "nan"), ("loss", "inf"), ("gradient", "nan"), ("gradient", "inf")]
BROKEN = [(*kind, SINGLE) for kind in KINDS] + [(*kind, case) for case in LAYOUTS[1:] for kind in (KINDS[0], KINDS[3])]


@pytest.mark.parametrize(("what", "factor", "case"), BROKEN, ids=str)
def test_a_step_that_is_not_finite_changes_nothing(trouble: Trouble, what: str, factor: str, case: Case) -> None:
    name = f"{what}-{factor}-{case}"
    folder = trouble.finish(
        name, case=case, poison=poison(what, factor, 3), tell_state=str(trouble.runs.folder / f"{name}-state")
    )
    assert list(skipped(folder)) == [3]
    assert skipped(folder)[3].startswith("the loss is" if what == "loss" else "the gradient norm is")
    assert f"step 3 is skipped: {skipped(folder)[3]}" in (trouble.runs.folder / f"{name}.log").read_text()
    rows = {row["iteration"]: row for row in clockless(folder) if "loss" in row}
    assert rows[3]["loss" if what == "loss" else "grad_norm"] is None
    assert rows[4]["consumed_samples"] == 16  # its samples count as read
    assert not (folder / "iter_0000003").exists()
    for rank in range(case.processes):
        states = state_after_steps(trouble, name, rank)
        assert len(states) == STEPS
        assert states[1] == states[2]
        assert len(set(states)) == STEPS - 1


@pytest.mark.parametrize("case", [Case(), Case(pp=2)], ids=str)
def test_too_many_in_a_row_stop_the_run(trouble: Trouble, case: Case) -> None:
    name = f"too-many-{case}"
    limit = "--loss_spikes.max_skipped_steps=2"
    job = trouble.start(name, limit, case=case, poison=poison("gradient", "nan", 4, 7))
    assert job.wait() == [1] * case.processes
    folder = trouble.runs.folder / name
    assert "error: 3 steps in a row did not change the weights (loss_spikes.max_skipped_steps 2); at step 6" in job.text()
    assert newest(folder) == 3
    assert list(skipped(folder)) == [4, 5, 6]
    status = json.loads((folder / "status.json").read_text())
    assert (status["state"], status["iteration"]) == ("failed", 3)
    assert "the gradient norm is" in status["reason"]
    whole = trouble.finish(f"{name}-whole", limit, case=case)
    assert trouble.finish(name, limit, case=case) == folder  # the trouble is over
    assert clockless(folder) == clockless(whole)
    assert "tensors equal" in verify(Verify(str(folder), str(whole)))


def test_as_many_as_allowed_do_not(trouble: Trouble) -> None:
    folder = trouble.finish("allowed", "--loss_spikes.max_skipped_steps=2", poison=poison("loss", "nan", 4, 5))
    assert list(skipped(folder)) == [4, 5]
    assert newest(folder) == STEPS


def test_none_is_allowed(trouble: Trouble) -> None:
    job = trouble.start("none-allowed", "--loss_spikes.max_skipped_steps=0", poison=poison("loss", "nan", 2))
    assert job.wait() == [1]
    assert newest(trouble.runs.folder / "none-allowed") == 1


SPIKES = ("--loss_spikes.spike_sigmas=6", "--loss_spikes.spike_window=3")


def test_a_loss_far_above_the_last_ones_is_a_spike(trouble: Trouble) -> None:
    folder = trouble.finish("spike", *SPIKES, poison=poison("loss", 3.0, 5))
    assert list(skipped(folder)) == [5]
    assert "the loss" in skipped(folder)[5]
    assert "6 standard deviations" in skipped(folder)[5]
    early = trouble.finish("spike-early", *SPIKES, poison=poison("loss", 3.0, 3))
    assert skipped(early) == {}  # too early to know what is usual
    off = trouble.finish("spike-off", poison=poison("loss", 3.0, 5))
    assert skipped(off) == {}


def test_a_gradient_norm_above_the_limit_is_a_spike(trouble: Trouble) -> None:
    limit = "--loss_spikes.spike_grad_norm=100"
    folder = trouble.finish("norm", limit, case=Case(tp=2), poison=poison("gradient", 1000.0, 4))
    assert list(skipped(folder)) == [4]
    assert "loss_spikes.spike_grad_norm 100" in skipped(folder)[4]


@pytest.mark.parametrize("stop_after", [3, 5])
def test_a_resume_decides_alike(trouble: Trouble, stop_after: int) -> None:
    """What is usual and how many steps were skipped in a row travels with the checkpoint."""
    wishes = {"poison": poison("loss", 3.0, 5, 6)}
    whole = trouble.finish(f"alike-whole-{stop_after}", *SPIKES, **wishes)
    assert list(skipped(whole)) == [5, 6]
    name = f"alike-{stop_after}"
    sign = str(trouble.runs.folder / f"{name}-signs")
    pause = {"seconds": 1.0, "after": stop_after - 1, "sign": sign}
    job = trouble.start(name, *SPIKES, slow_steps=pause, **wishes)
    until(lambda: signs(sign) or job.poll())
    job.kill(signal.SIGTERM)
    job.finish()
    assert newest(trouble.runs.folder / name) == stop_after
    assert clockless(trouble.finish(name, *SPIKES, **wishes)) == clockless(whole)


def test_skipped_steps_before_and_after_a_resume_add_up(trouble: Trouble) -> None:
    name, wishes = "add-up", {"poison": poison("gradient", "nan", 4, STEPS)}
    sign = str(trouble.runs.folder / f"{name}-signs")
    job = trouble.start(name, slow_steps={"seconds": 1.0, "after": 4, "sign": sign}, **wishes)
    until(lambda: signs(sign) or job.poll())
    job.kill(signal.SIGTERM)
    job.finish()
    folder = trouble.runs.folder / name
    assert newest(folder) == 5  # with two skipped steps
    again = trouble.start(name, **wishes)
    assert again.wait() == [1]
    assert "4 steps in a row did not change the weights (loss_spikes.max_skipped_steps 3); at step 7" in again.text()
    assert newest(folder) == 3


@pytest.mark.parametrize("case", [Case(dp=2), Case(tp=2, dp=2), Case(pp=2, dp=2, dtype="bf16")], ids=str)
def test_replicas_that_differ_are_found(trouble: Trouble, case: Case) -> None:
    name, last = f"replicas-{case}", case.processes - 1
    checking = "--loss_spikes.check_weight_hash_across_dp_replicas_interval=2"
    job = trouble.start(name, checking, case=case, corrupt_weights={"rank": last, "step": 4})
    assert job.wait() == [1] * case.processes
    assert "error: after step 4 data-parallel replicas hold different weights" in job.text()
    assert newest(trouble.runs.folder / name) == 3
    trouble.finish(f"{name}-sound", checking, case=case)


def test_deterministic_runs_are_equal(trouble: Trouble) -> None:
    one, other = (trouble.finish(name, "--training.deterministic=true", case=Case(tp=2)) for name in ("one", "other"))
    assert clockless(one) == clockless(other)


def config(runs: Runs, name: str, **optimizer: float) -> RunConfig:
    return RunConfig(
        mixture=runs.mixture,
        checkpoint=CheckpointConfig(load=str(runs.folder / "megatron"), save=str(runs.folder / name), save_interval=1),
        training=TrainingConfig(train_iters=4, micro_batch_size=2, global_batch_size=4),
        optimizer=OptimizerConfig(lr=1e-3, **optimizer),
    )


def test_norms_are_free_of_weight_decay_and_settings_hold_on_resume(
    trouble: Trouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[float, tuple[float, float]]] = []

    def spy(optimizer: object, lr: float, settings: OptimizerConfig) -> None:
        real(optimizer, lr, settings)
        for group in optimizer.param_groups:  # type: ignore[attr-defined]
            dimensions = {parameter.ndim for parameter in group["params"]}
            seen.append((group["weight_decay"], group["betas"]))
            assert dimensions <= {1}  # shards of the distributed optimizer are flat: groups differ by wd_mult only

    real = step.apply_settings
    monkeypatch.setattr(step, "apply_settings", spy)
    monkeypatch.setattr(pretrain, "validate_all", lambda *args: None)
    run = config(trouble.runs, "decay", weight_decay=0.5)
    setup(dataclasses.replace(run, training=dataclasses.replace(run.training, train_samples=16, train_iters=None)))
    assert {decay for decay, _ in seen} == {0.0, 0.5}
    seen.clear()
    shutil.rmtree(Path(run.checkpoint.save) / "iter_0000004")  # resumes from the newest that is there
    changed = dataclasses.replace(run, optimizer=OptimizerConfig(lr=1e-3, weight_decay=0.25, adam_beta1=0.8))
    setup(changed)
    assert set(seen) == {(0.0, (0.8, 0.95)), (0.25, (0.8, 0.95))}


def test_another_job_in_a_used_folder_is_refused(trouble: Trouble) -> None:
    trouble.finish("used", "--training.train_iters=2", "--lr.warmup_iters=0")
    arguments = ["--config", str(trouble.runs.folder / "used.yaml"), "--training.train_iters=2", "--lr.warmup_iters=0"]
    assert "nothing to do" in run_tool("pretrain_cpt.py", *arguments).stderr
    other = f"--checkpoint.load={trouble.runs.folder / 'other'}"
    result = run_tool("pretrain_cpt.py", *arguments, other, check=False)
    assert result.returncode == 2
    assert "began with" in result.stderr


def test_corpora_of_another_vocabulary_are_refused(trouble: Trouble, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["completely different words make completely different merges"] * 3, trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "text.txt").write_text("different words " * 200)
    preprocess(
        PreprocessConfig(
            str(tmp_path / "text.txt"), str(tmp_path), str(tmp_path / "en"), "en", eos_token="<|endoftext|>", workers=1
        )
    )
    mixture = write_yaml(tmp_path / "mixture.yaml", {"seq_length": 64, "seed": 1, "almr": 0, "general": [{"prefix": "en"}]})
    with pytest.raises(InputError, match=r"mixture\.yaml: the corpora were made with tokenizer .* has another vocabulary"):
        check_run(dataclasses.replace(config(trouble.runs, "foreign"), mixture=mixture), world_size=1)
