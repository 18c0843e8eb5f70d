"""The learning rate of every step, for any kind and length of schedule, and how runs that go on keep it."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_cpt.config.lr import LrConfig
from megatron_cpt.config.run import CheckpointConfig, OptimizerConfig, RunConfig, TrainingConfig
from megatron_cpt.training.pretrain import extension_note
from megatron_cpt.training.schedule import (
    LearningRate,
    continue_schedule,
    learning_rate_table,
    make_schedule,
    run_length,
)
from megatron_cpt.utils.errors import InputError

SEQ_LENGTH = 64
STYLES = ("linear", "cosine", "WSD", "constant")
WSD_STYLES = ("linear", "cosine", "minus_sqrt", "exponential")


def run_config(train_iters: int | None, batch: int = 1, lr: float = 1.0, min_lr: float = 0.0, **changes: Any) -> RunConfig:
    length = {name: changes.pop(name) for name in ("train_samples", "train_tokens") if name in changes}
    return RunConfig(
        mixture="m.yaml",
        checkpoint=CheckpointConfig(load="a", save="RUN"),
        training=TrainingConfig(train_iters, global_batch_size=batch, **length),
        optimizer=OptimizerConfig(lr=lr, min_lr=min_lr),
        lr=LrConfig(**changes),
    )


def rates(config: RunConfig) -> list[float]:
    """The rate of every step of a run from its beginning."""
    length, batch = run_length(config.training, SEQ_LENGTH), config.training.global_batch_size
    schedule = make_schedule(config, SEQ_LENGTH, length)
    return [schedule.at(step * batch) for step in range(1, length.train_iters + 1)]


@st.composite
def configs(draw: st.DrawFn) -> RunConfig:
    """Whatever can be asked for."""
    train_iters, batch = draw(st.integers(1, 300)), draw(st.sampled_from([1, 3, 8]))
    lr = draw(st.floats(1e-8, 1.0))
    min_lr = draw(st.one_of(st.just(0.0), st.just(lr), st.floats(0, 1).map(lambda part: part * lr)))
    warmup = draw(st.integers(0, train_iters - 1))
    style = draw(st.sampled_from(STYLES))
    more: dict[str, Any] = {}
    if style == "WSD":
        more = {
            "wsd_decay_style": draw(st.sampled_from(WSD_STYLES)),
            "wsd_decay_iters": draw(st.integers(0, train_iters - warmup)),
        }
    return run_config(train_iters, batch, lr, min_lr, decay_style=style, warmup_iters=warmup, **more)


@given(configs())
def test_bounds_warm_up_peak_and_end(config: RunConfig) -> None:
    run, lr, min_lr = rates(config), config.optimizer.lr, config.optimizer.min_lr
    warmup = config.lr.warmup_iters or 0
    peak = max(warmup - 1, 0)
    for iteration in range(warmup):
        assert run[iteration] == pytest.approx(lr * (iteration + 1) / warmup, rel=1e-12)
    assert run[peak] == pytest.approx(lr, rel=1e-12)
    assert max(run) <= lr * (1 + 1e-12)
    assert all(rate >= min_lr - 1e-12 * lr for rate in run[peak:])
    assert run[0] > 0  # the first step is not wasted
    decays = config.lr.decay_style != "constant" and config.lr.wsd_decay_iters != 0
    if len(run) - 1 > peak and decays:
        assert run[-1] == pytest.approx(min_lr, rel=1e-9, abs=1e-12 * lr)
    if config.lr.decay_style == "constant":
        assert set(run[peak:]) == {lr}
    assert all(a >= b - 1e-12 * lr for a, b in pairwise(run[peak:]))


@given(configs(), st.sampled_from([2, 5]))
def test_what_counts_is_samples(config: RunConfig, factor: int) -> None:
    """The same schedule in steps of other sizes passes through the same points."""
    batch, iters = config.training.global_batch_size, config.training.train_iters or 0
    amounts = {"warmup_samples": (config.lr.warmup_iters or 0) * batch, "warmup_iters": None}
    if config.lr.wsd_decay_iters is not None:
        amounts |= {"wsd_decay_samples": config.lr.wsd_decay_iters * batch, "wsd_decay_iters": None}
    lr = dataclasses.replace(config.lr, **amounts)
    training = TrainingConfig(train_samples=iters * batch, global_batch_size=batch)
    same = dataclasses.replace(config, lr=lr, training=training)
    assert rates(same) == rates(config)
    if config.lr.warmup_iters and config.lr.warmup_iters >= factor:  # otherwise the first step is another one
        finer = dataclasses.replace(same, training=dataclasses.replace(training, train_samples=iters * batch * factor))
        finer = dataclasses.replace(finer, training=dataclasses.replace(finer.training, global_batch_size=batch * factor))
        scaled = {name: value and value * factor for name, value in amounts.items()}
        finer = dataclasses.replace(finer, lr=dataclasses.replace(config.lr, **scaled))
        assert rates(finer) == pytest.approx(rates(config), rel=1e-9)


def test_linear_by_hand() -> None:
    assert rates(run_config(8, min_lr=0.2, warmup_iters=4)) == pytest.approx([0.25, 0.5, 0.75, 1.0, 0.8, 0.6, 0.4, 0.2])
    assert rates(run_config(5)) == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0])


def test_cosine_by_hand() -> None:
    half = (1 + math.cos(math.pi / 3)) / 2
    assert rates(run_config(4, decay_style="cosine")) == pytest.approx([1.0, half, 1 - half, 0.0])


@pytest.mark.parametrize(
    ("style", "decay"),
    [
        ("linear", [0.75, 0.5, 0.25, 0.0]),
        ("cosine", [(1 + math.cos(math.pi * p)) / 2 for p in (0.25, 0.5, 0.75, 1.0)]),
        ("minus_sqrt", [0.5, 1 - math.sqrt(0.5), 1 - math.sqrt(0.75), 0.0]),
        ("exponential", [2 * 0.5**p - 1 for p in (0.25, 0.5, 0.75, 1.0)]),
    ],
)
def test_wsd_by_hand(style: str, decay: list[float]) -> None:
    config = run_config(10, decay_style="WSD", warmup_iters=2, wsd_decay_iters=4, wsd_decay_style=style)
    assert rates(config) == pytest.approx([0.5, 1.0, 1.0, 1.0, 1.0, 1.0, *decay])


def test_wsd_agrees_with_megatron_core() -> None:
    """Its scheduler counts a step's position before the step, ours after it: shift by one, and begin after the peak."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    group = {"lr": 0.0, "max_lr": 1.0, "min_lr": 0.1, "weight_decay": 0.0}
    optimizer = SimpleNamespace(param_groups=[group])
    for style in WSD_STYLES:
        theirs = OptimizerParamScheduler(
            *(optimizer, 0.0, 1.0, 0.1, 0, 100, "WSD", 0.0, 0.0, 100, "constant"),
            wsd_decay_steps=20,
            lr_wsd_decay_style=style,
            use_checkpoint_opt_param_scheduler=False,
        )
        config = run_config(100, min_lr=0.1, decay_style="WSD", wsd_decay_style=style, wsd_decay_iters=20)
        for rate in rates(config):
            theirs.step(1)
            assert group["lr"] == pytest.approx(rate, rel=1e-12)


def test_a_tenth_of_the_run_decays_by_default() -> None:
    run = rates(run_config(50, decay_style="WSD", wsd_decay_style="linear"))
    assert run == pytest.approx([1.0] * 45 + [0.8, 0.6, 0.4, 0.2, 0.0])


def test_tokens_are_rounded_up_to_samples_and_samples_to_steps() -> None:
    length = run_length(TrainingConfig(train_tokens=10 * SEQ_LENGTH + 1, global_batch_size=4), SEQ_LENGTH)
    assert (length.end, length.train_iters, length.run_samples) == (11, 3, 12)
    assert run_length(TrainingConfig(train_samples=11, global_batch_size=4), SEQ_LENGTH) == length
    warm = run_config(None, 4, train_samples=11, warmup_tokens=3 * SEQ_LENGTH + 1)
    assert make_schedule(warm, SEQ_LENGTH, length).warmup == 4
    assert rates(warm)[-1] == 0.0  # the last step goes beyond the end, the rate does not


def test_a_run_that_changes_its_batch_ends_where_it_was_asked_to() -> None:
    at = {"iteration": 5, "consumed_samples": 20}
    assert run_length(TrainingConfig(10, global_batch_size=8), SEQ_LENGTH, **at).run_samples == 20 + 5 * 8
    by_samples = run_length(TrainingConfig(train_samples=40, global_batch_size=8), SEQ_LENGTH, **at)
    assert (by_samples.train_iters, by_samples.run_samples, by_samples.end) == (8, 44, 40)


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"warmup_iters": 10}, r"lr\.warmup_iters leaves nothing to decay in: warm-up takes 40 samples, the schedule 40"),
        ({"warmup_samples": 41}, r"lr\.warmup_samples leaves nothing to decay in"),
        (
            {"decay_style": "WSD", "warmup_iters": 4, "wsd_decay_iters": 7},
            "lr: the warm-up takes 16 samples and the decay 28; expected at most 40 together",
        ),
    ],
)
def test_schedules_that_do_not_fit(changes: dict[str, Any], wanted: str) -> None:
    config = run_config(10, 4, **changes)
    with pytest.raises(InputError, match=wanted):
        make_schedule(config, SEQ_LENGTH, run_length(config.training, SEQ_LENGTH))


def saved(config: RunConfig) -> dict[str, Any]:
    """What a checkpoint says of the schedule it was trained with."""
    return dataclasses.asdict(make_schedule(config, SEQ_LENGTH, run_length(config.training, SEQ_LENGTH)))


def resumed(before: RunConfig, now: RunConfig, iteration: int = 6) -> LearningRate:
    consumed = iteration * before.training.global_batch_size
    return continue_schedule(saved(before), now, SEQ_LENGTH, run_length(now.training, SEQ_LENGTH, iteration, consumed))


def test_an_unchanged_schedule_goes_on_whatever_is_said() -> None:
    for style in STYLES:
        config = run_config(10, 4, warmup_iters=3, decay_style=style)
        for on_continue in (None, "restart", "continue"):
            now = dataclasses.replace(config, lr=dataclasses.replace(config.lr, on_continue=on_continue))
            assert dataclasses.asdict(resumed(config, now)) == saved(config)


def test_another_batch_keeps_a_schedule_that_was_given_in_samples() -> None:
    before = run_config(None, 4, train_samples=40, warmup_samples=12)
    now = dataclasses.replace(before, training=TrainingConfig(train_samples=40, global_batch_size=8))
    assert dataclasses.asdict(resumed(before, now)) == saved(before)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"optimizer": OptimizerConfig(lr=2.0)}, r"lr was 1\.0 and is 2\.0"),
        ({"optimizer": OptimizerConfig(lr=1.0, min_lr=0.5)}, r"min_lr was 0\.0 and is 0\.5"),
        ({"training": TrainingConfig(20, global_batch_size=4)}, "end was 40 and is 80"),
        ({"lr": LrConfig(decay_style="cosine", warmup_iters=3)}, "decay_style was linear and is cosine"),
        ({"lr": LrConfig(warmup_iters=4)}, "warmup was 12 and is 16"),
    ],
)
def test_another_schedule_is_an_error_that_names_what_changed(change: dict[str, Any], named: str) -> None:
    before = run_config(10, 4, warmup_iters=3)
    with pytest.raises(InputError, match=rf"RUN: the learning-rate schedule is not .*{named}.*lr\.on_continue restart"):
        resumed(before, dataclasses.replace(before, **change))


def test_continue_is_where_the_new_schedule_would_be() -> None:
    before = run_config(10, warmup_iters=2)
    longer = run_config(20, warmup_iters=2, on_continue="continue")
    schedule = resumed(before, longer)
    assert [schedule.at(n) for n in range(1, 21)] == rates(run_config(20, warmup_iters=2))


def test_restart_warms_up_and_decays_again_from_here() -> None:
    schedule = resumed(run_config(10, warmup_iters=2), run_config(16, warmup_iters=2, on_continue="restart"))
    assert [schedule.at(n) for n in range(7, 17)] == pytest.approx(rates(run_config(10, warmup_iters=2)))
    # A kill after that: the next start finds the restarted schedule in its checkpoint and keeps it.
    again = continue_schedule(
        dataclasses.asdict(schedule),
        run_config(16, warmup_iters=2, on_continue="restart"),
        SEQ_LENGTH,
        run_length(TrainingConfig(16), SEQ_LENGTH, 9, 9),
    )
    assert again == schedule


def test_the_table_has_first_last_and_ten_points_and_is_what_is_used() -> None:
    config = run_config(1000, 4, warmup_iters=100, decay_style="cosine")
    length = run_length(config.training, SEQ_LENGTH)
    table = learning_rate_table(make_schedule(config, SEQ_LENGTH, length), length, 4)
    assert len(table) == 13  # and where warm-up ends
    assert max(row["lr"] for row in table) == config.optimizer.lr
    assert [table[0]["iteration"], table[-1]["iteration"]] == [1, 1000]
    run = rates(config)
    assert all(row["lr"] == run[int(row["iteration"]) - 1] for row in table)
    short = run_length(TrainingConfig(3), SEQ_LENGTH)
    assert [row["iteration"] for row in learning_rate_table(make_schedule(run_config(3), SEQ_LENGTH, short), short, 1)] == [
        1,
        2,
        3,
    ]


def extended(style: str, iteration: int, **lr: Any) -> tuple[LearningRate, RunConfig, RunConfig]:
    """A run of 10 steps of 4 samples that is extended to 16 after `iteration` steps: its rate, the old and new settings."""
    before = run_config(10, 4, decay_style=style, **lr)
    now = dataclasses.replace(before, training=dataclasses.replace(before.training, extend_to=16))
    return resumed(before, now, iteration), before, now


@pytest.mark.parametrize("style", ["linear", "cosine"])
def test_an_extended_run_warms_up_again_once_it_decays(style: str) -> None:
    found, before, now = extended(style, 10, warmup_iters=2)
    assert (found.start, found.end, found.at(44), found.at(48)) == (40, 64, 0.5, 1.0)
    assert found.at(64) == before.optimizer.min_lr
    # A checkpoint of it goes on without another word, and a job that is queued again has the same configuration.
    length = run_length(now.training, SEQ_LENGTH, 12, 48)
    assert continue_schedule(dataclasses.asdict(found), now, SEQ_LENGTH, length) == found


@pytest.mark.parametrize(("style", "iteration"), [("WSD", 9), ("constant", 10), ("linear", 2)])
def test_an_extended_run_goes_on_where_it_has_not_begun_to_decay(style: str, iteration: int) -> None:
    found, before, _ = extended(style, iteration, warmup_iters=2)
    assert (found.start, found.end) == (0, 64)
    assert found.at(4 * iteration) == make_schedule(before, SEQ_LENGTH, run_length(before.training, SEQ_LENGTH)).at(
        4 * iteration
    )


def test_extending_a_run_changes_nothing_else() -> None:
    before = run_config(10, 4, decay_style="linear")
    training = dataclasses.replace(before.training, extend_to=16)
    now = dataclasses.replace(before, training=training, optimizer=OptimizerConfig(lr=0.5, min_lr=0.0))
    with pytest.raises(InputError, match=r"lr was 1\.0 and is 0\.5"):
        resumed(before, now, 10)
    with pytest.raises(InputError, match=r"^extend_to is 10; .*more than training\.train_iters, 10"):
        TrainingConfig(train_iters=10, extend_to=10)


def test_a_run_that_is_made_longer_by_less_than_its_warmup() -> None:
    """It has decayed, so it warms up anew: the message says so, and what to do."""
    before = run_config(10, 4, warmup_iters=3)
    now = dataclasses.replace(before, training=dataclasses.replace(before.training, extend_to=12))
    wanted = (
        r"the schedule warms up and decays anew from sample 40, .*: expected a later end \(training\.extend_to\), a shorter"
    )
    with pytest.raises(InputError, match=wanted):
        resumed(before, now, iteration=10)


@pytest.mark.parametrize(
    ("style", "restarted", "said"),
    [
        ("linear", True, "warms up again and decays from here to the new end"),
        ("WSD", False, "goes on as scheduled and decays to the new end"),
        ("constant", False, "goes on as scheduled and stays constant to the new end"),
    ],
)
def test_what_is_said_of_an_extended_run(style: str, restarted: bool, said: str) -> None:
    config = run_config(10, 4, decay_style=style)
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, extend_to=16))
    length, schedule = SimpleNamespace(consumed_samples=40, train_iters=16), SimpleNamespace(start=40 if restarted else 0)
    run: Any = SimpleNamespace(config=config, length=length, schedule=schedule)
    assert extension_note(run).endswith(
        f"train_iters was planned as 10 and is extended to 16: the learning rate {said}, step 16"
    )
