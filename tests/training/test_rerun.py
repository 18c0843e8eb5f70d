"""A step whose loss is not finite is computed once more: a fault on the way is told from one that comes again."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import pytest
from tiny_models import read_rows
from tiny_runs import Runs

from megatron_cpt.config.run import CheckpointConfig, LossSpikesConfig, OptimizerConfig, RunConfig, TrainingConfig
from megatron_cpt.training import step
from megatron_cpt.training.pretrain import setup


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: str) -> Runs:
    return Runs(tmp_path_factory.mktemp("rerun"), tiny_tokenizer_dir)


def train(runs: Runs, name: str, reruns: bool) -> list[dict[str, float]]:
    setup(
        RunConfig(
            mixture=runs.mixture,
            checkpoint=CheckpointConfig(load=str(runs.folder / "megatron"), save=str(runs.folder / name)),
            training=TrainingConfig(train_iters=4, micro_batch_size=2, global_batch_size=4),
            optimizer=OptimizerConfig(lr=1e-3),
            loss_spikes=LossSpikesConfig(rerun_skipped_steps=reruns),
        )
    )
    return [row for row in read_rows(Path(runs.folder / name)) if "loss" in row]


def spoil(monkeypatch: pytest.MonkeyPatch, calls: set[int]) -> None:
    """The summed loss of these calls of the schedule (without validation's) is NaN."""
    real, made = step.run_schedule, 0

    def spoiled(*args: object, **kwargs: object) -> object:
        nonlocal made
        report, skipped = real(*args, **kwargs)  # type: ignore[arg-type]
        if not kwargs.get("forward_only"):
            made += 1
            if made in calls:
                report[0] = math.nan  # type: ignore[index]
        return report, skipped

    monkeypatch.setattr(step, "run_schedule", spoiled)


def test_a_fault_that_does_not_come_again_costs_nothing(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    undisturbed = train(runs, "undisturbed", reruns=False)
    spoil(monkeypatch, {3})
    with caplog.at_level(logging.WARNING):
        rows = train(runs, "transient", reruns=True)
    assert [row["loss"] for row in rows] == [row["loss"] for row in undisturbed]
    assert not any(row["skipped"] for row in rows)
    assert "not reproducible" in caplog.text


def test_what_comes_again_is_skipped(runs: Runs, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    spoil(monkeypatch, {3, 4})
    with caplog.at_level(logging.WARNING):
        rows = train(runs, "persistent", reruns=True)
    assert [bool(row["skipped"]) for row in rows] == [False, False, True, False]
    assert "First rerun: unexpected result is reproducible" in caplog.text
