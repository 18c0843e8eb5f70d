"""A run needs no folder that may go: neither old checkpoints, the one it resumed from among them, nor checkpoint.load."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from forks import Forks, Job, until
from metrics_rows import clockless
from recipes import SAVING_RECIPES, distinct, saving_as
from tampering import signs
from tiny_models import VARIANTS
from tiny_runs import Layout, Runs

from megatron_cpt.convert.config import Verify
from megatron_cpt.convert.verify import verify

STEPS = 5
SETTINGS = (f"--training.train_iters={STEPS}", "--training.global_batch_size=4", "--checkpoint.save_retry_seconds=0")
KEEP_ONE = ("--checkpoint.save_interval=1", "--checkpoint.keep_last=1")


class Retention:
    """Runs that keep the newest checkpoints only."""

    def __init__(self, runs: Runs, forks: Forks) -> None:
        self.runs, self.forks = runs, forks
        self.start("whole", "--checkpoint.save_interval=1").finish()

    def start(self, name: str, *extra: str, **tamper: Any) -> Job:
        argv = ["--config", self.runs.configure(name, Layout()), *SETTINGS, *extra]
        return self.forks.start(argv, self.runs.folder / f"{name}.log", tamper=tamper)

    def sign(self, name: str) -> str:
        return str(self.runs.folder / f"{name}.sign")

    def kill_after(self, steps: int, name: str, *extra: str) -> Path:
        """A run killed with kill -9 in the step after those; returns its folder."""
        job = self.start(name, *extra, slow_steps={"sign": self.sign(name), "seconds": 60, "after": steps})
        until(lambda: signs(self.sign(name)))
        job.kill(signal.SIGKILL)
        assert job.wait() == [-signal.SIGKILL]
        return self.runs.folder / name

    def saved(self, name: str) -> list[str]:
        return sorted(path.name for path in (self.runs.folder / name).glob("iter_*"))

    def check_as_undisturbed(self, name: str) -> None:
        """The last checkpoint, HF files included, and all rows are those of a run that nothing happened to."""
        folder, whole = self.runs.folder / name, self.runs.folder / "whole"
        last = f"iter_{STEPS:07d}"
        assert clockless(folder) == clockless(whole)
        assert "tensors equal" in verify(Verify(str(folder / last), str(whole / last)))
        for path in (whole / last / "hf").iterdir():
            assert (folder / last / "hf" / path.name).read_bytes() == path.read_bytes()


@pytest.fixture(scope="module")
def retention(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: str, forks: Forks) -> Retention:
    return Retention(Runs(tmp_path_factory.mktemp("retention"), tiny_tokenizer_dir, **VARIANTS["tied"]), forks)


def test_a_run_killed_after_two_saves_goes_on_and_keeps_one_checkpoint(retention: Retention) -> None:
    retention.kill_after(2, "killed", *KEEP_ONE)
    assert retention.saved("killed") == ["iter_0000002"]
    retention.start("killed", *KEEP_ONE).finish()
    assert retention.saved("killed") == [f"iter_{STEPS:07d}"]
    retention.check_as_undisturbed("killed")


@pytest.mark.parametrize("recipe", distinct(SAVING_RECIPES))
def test_recipes_survive_a_kill(retention: Retention, recipe: str) -> None:
    name = recipe.replace("/", "-")
    retention.kill_after(3, name, *saving_as(recipe, save_interval=1))
    retention.start(name, *saving_as(recipe, save_interval=1)).finish()
    assert retention.saved(name)[-2:] == [f"iter_{STEPS - 1:07d}", f"iter_{STEPS:07d}"]
    retention.check_as_undisturbed(name)


def test_a_resumed_run_whose_first_saves_fail_saves_later(retention: Retention) -> None:
    retention.kill_after(2, "retried", *KEEP_ONE)
    job = retention.start("retried", *KEEP_ONE, first_saves_fail=2)
    job.finish()
    assert job.text().count("broken on purpose") == 2
    retention.check_as_undisturbed("retried")


def test_what_a_run_started_from_may_be_deleted_once_it_is_loaded(retention: Retention) -> None:
    first = retention.runs.folder / "first"
    shutil.copytree(retention.runs.folder / "megatron", first)
    start = (*KEEP_ONE, f"--checkpoint.load={first}")
    job = retention.start("orphan", *start, slow_steps={"sign": retention.sign("orphan"), "seconds": 0.5})
    until(lambda: signs(retention.sign("orphan")))
    shutil.rmtree(first)
    job.finish()
    retention.check_as_undisturbed("orphan")
