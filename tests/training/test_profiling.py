"""The profiler traces the steps it is asked for, on the ranks it is asked for, and is not there otherwise."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest
import torch

from megatron_cpt.config.run import LoggingConfig
from megatron_cpt.training.profiling import NoWindow, profiling


def train(folder: Path, config: LoggingConfig, first: int, last: int, rank: int = 0) -> int:
    """Steps `first` to `last`, each with as many products of its number + 1 rows; how often a profiler was on."""
    on = 0
    with profiling(config, rank, str(folder), first - 1) as window:
        for iteration in range(first, last + 1):
            on += torch.autograd.profiler._is_profiler_enabled
            torch.ones(iteration + 1, 2) @ torch.ones(2, 3)
            window.step(iteration)
    return on


def products(path: Path) -> set[int]:
    """Rows of the matrix products in a trace, less one: the steps that made them."""
    with gzip.open(path) as file:
        events = json.load(file)["traceEvents"]
    return {event["args"]["Input Dims"][0][0] - 1 for event in events if event.get("name") == "aten::mm"}


def test_a_window_of_steps(tmp_path: Path) -> None:
    on = train(tmp_path, LoggingConfig(profile_step_start=4, profile_step_end=5), 1, 9)
    assert sorted(os.listdir(tmp_path / "profile")) == ["rank_00000_steps_4-5.json.gz", "rank_00000_steps_4-5.txt"]
    assert products(tmp_path / "profile" / "rank_00000_steps_4-5.json.gz") == {4, 5}
    assert "aten::mm" in (tmp_path / "profile" / "rank_00000_steps_4-5.txt").read_text()
    assert on <= 3  # a step of warm-up and the window


@pytest.mark.parametrize(("first", "last", "traced"), [(1, 3, {1}), (3, 8, {3})], ids=["from the first", "resumed within"])
def test_one_step_and_no_room_for_warm_up(tmp_path: Path, first: int, last: int, traced: set[int]) -> None:
    train(tmp_path, LoggingConfig(profile_step_start=min(traced)), first, last)
    (trace,) = (tmp_path / "profile").glob("*.json.gz")
    assert products(trace) == traced


def test_a_run_that_ends_within_keeps_what_it_has(tmp_path: Path) -> None:
    train(tmp_path, LoggingConfig(profile_step_start=3, profile_step_end=9), 1, 5)
    assert products(tmp_path / "profile" / "rank_00000_steps_3-5.json.gz") == {3, 4, 5}


@pytest.mark.parametrize(
    ("config", "rank", "first"),
    [
        (LoggingConfig(), 0, 1),
        (LoggingConfig(profile_step_start=3), 1, 1),
        (LoggingConfig(profile_step_start=3, profile_step_end=4), 0, 5),
    ],
    ids=["not asked for", "another rank", "behind it"],
)
def test_otherwise_there_is_no_profiler(tmp_path: Path, config: LoggingConfig, rank: int, first: int) -> None:
    with profiling(config, rank, str(tmp_path), first - 1) as window:
        assert isinstance(window, NoWindow)
    assert train(tmp_path, config, first, first + 5, rank) == 0
    assert not (tmp_path / "profile").exists()


def test_other_ranks_when_asked_for(tmp_path: Path) -> None:
    train(tmp_path, LoggingConfig(profile_step_start=2, profile_ranks=[3]), 1, 3, rank=3)
    assert (tmp_path / "profile" / "rank_00003_steps_2-2.json.gz").exists()
