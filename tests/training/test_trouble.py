"""Training that goes wrong stops with one line, and leaves the newest checkpoint from before."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from tiny_models import run_tool, write_yaml
from tiny_runs import Layout, Runs

from megatron_cpt.checkpoint.convert import megatron_tensors
from megatron_cpt.config.run import CheckpointConfig, OptimizerConfig, RunConfig, TrainingConfig
from megatron_cpt.data.preprocess import PreprocessConfig, preprocess
from megatron_cpt.errors import InputError
from megatron_cpt.training import pretrain, step
from megatron_cpt.training.checks import check_run
from megatron_cpt.training.pretrain import setup


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: str) -> Runs:
    return Runs(tmp_path_factory.mktemp("trouble"), tiny_tokenizer_dir)


def config(runs: Runs, name: str, **optimizer: float) -> RunConfig:
    return RunConfig(
        mixture=runs.mixture,
        checkpoint=CheckpointConfig(load=str(runs.folder / "megatron"), save=str(runs.folder / name), save_interval=1),
        training=TrainingConfig(train_iters=4, micro_batch_size=2, global_batch_size=4),
        optimizer=OptimizerConfig(lr=1e-3, **optimizer),
    )


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_never_applied(runs: Runs, factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = 0

    def poisoned(model: torch.nn.Module, *args: object, **kwargs: object) -> object:
        nonlocal steps
        report = real(model, *args, **kwargs)
        steps += 1
        if steps == 3:
            for parameter in model.parameters():
                parameter.main_grad.mul_(factor)
        return report

    real = step.run_schedule
    monkeypatch.setattr(step, "run_schedule", poisoned)
    monkeypatch.setattr(pretrain, "evaluate", lambda *args: None)
    run = config(runs, f"poisoned-{factor}")
    with pytest.raises(FloatingPointError, match=r"the gradient norm is (nan|inf)"):
        setup(run)
    folder = Path(run.checkpoint.save)
    assert (folder / "latest_checkpointed_iteration.txt").read_text() == "2"
    tensors, _ = megatron_tensors(str(folder / "iter_0000002"))
    assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_a_loss_that_is_not_finite_stops_the_run_with_one_line(runs: Runs) -> None:
    runs.train("overflow", Layout(), "--optimizer.lr", "1e30", "--optimizer.min_lr", "1e30", check=False)
    assert runs.result.returncode == 1
    last = runs.result.stderr.strip().splitlines()[-1]
    assert last.startswith(("error: the loss is", "error: the gradient norm is"))


def test_norms_are_free_of_weight_decay_and_settings_hold_on_resume(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[float, tuple[float, float]]] = []

    def spy(optimizer: object, lr: float, settings: OptimizerConfig) -> None:
        real(optimizer, lr, settings)
        for group in optimizer.param_groups:  # type: ignore[attr-defined]
            dimensions = {parameter.ndim for parameter in group["params"]}
            seen.append((group["weight_decay"], group["betas"]))
            assert dimensions <= {1}  # shards of the distributed optimizer are flat: groups differ by wd_mult only

    real = step.apply_settings
    monkeypatch.setattr(step, "apply_settings", spy)
    monkeypatch.setattr(pretrain, "evaluate", lambda *args: None)
    run = config(runs, "decay", weight_decay=0.5)
    setup(run)
    assert {decay for decay, _ in seen} == {0.0, 0.5}
    seen.clear()
    changed = RunConfig(
        mixture=run.mixture,
        checkpoint=run.checkpoint,
        training=TrainingConfig(train_iters=5, micro_batch_size=2, global_batch_size=4),
        optimizer=OptimizerConfig(lr=1e-3, weight_decay=0.25, adam_beta1=0.8),
    )
    setup(changed)
    assert set(seen) == {(0.0, (0.8, 0.95)), (0.25, (0.8, 0.95))}


def test_another_job_in_a_used_folder_is_refused(runs: Runs) -> None:
    runs.train("used", Layout(), "--training.train_iters", "2", "--optimizer.lr_warmup_iters", "0")
    arguments = (
        "--config",
        str(runs.folder / "used.yaml"),
        "--training.train_iters",
        "2",
        "--optimizer.lr_warmup_iters",
        "0",
    )
    assert "nothing to do" in run_tool("pretrain_cpt.py", *arguments).stderr
    result = run_tool("pretrain_cpt.py", *arguments, "--checkpoint.load", str(runs.folder / "other"), check=False)
    assert result.returncode == 2
    assert "began with" in result.stderr


def test_corpora_of_another_vocabulary_are_refused(runs: Runs, tmp_path: Path) -> None:
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
        check_run(dataclasses.replace(config(runs, "foreign"), mixture=mixture), world_size=1)
