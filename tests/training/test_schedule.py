"""The learning rate of every step, for any length of run."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_cpt.config.run import OptimizerConfig
from megatron_cpt.training.schedule import learning_rate


@st.composite
def schedules(draw: st.DrawFn) -> tuple[int, OptimizerConfig]:
    """(iterations of the run, its optimizer settings), as RunConfig allows them."""
    train_iters = draw(st.integers(1, 300))
    lr = draw(st.floats(1e-8, 1.0))
    min_lr = draw(st.one_of(st.just(0.0), st.just(lr), st.floats(0, 1).map(lambda part: part * lr)))
    warmup = draw(st.integers(0, train_iters - 1))
    return train_iters, OptimizerConfig(lr=lr, min_lr=min_lr, lr_warmup_iters=warmup)


def rates(train_iters: int, config: OptimizerConfig) -> list[float]:
    return [learning_rate(iteration, train_iters, config) for iteration in range(train_iters)]


@given(schedules())
def test_bounds_peak_and_ends(schedule: tuple[int, OptimizerConfig]) -> None:
    train_iters, config = schedule
    run = rates(train_iters, config)
    peak = max(config.lr_warmup_iters - 1, 0)
    assert run[peak] == pytest.approx(config.lr, rel=1e-12)
    assert max(run) <= config.lr * (1 + 1e-12)
    assert min(run) >= 0
    assert run[0] == pytest.approx(config.lr / max(config.lr_warmup_iters, 1), rel=1e-12)
    assert run[0] > 0  # the first step is not wasted
    if train_iters > 1:
        assert run[-1] == pytest.approx(config.min_lr, rel=1e-9, abs=1e-12 * config.lr)
    else:
        assert run == [config.lr]


@given(schedules())
def test_warm_up_is_linear_then_decay_is_linear(schedule: tuple[int, OptimizerConfig]) -> None:
    train_iters, config = schedule
    run = rates(train_iters, config)
    peak = max(config.lr_warmup_iters - 1, 0)
    rounding = 1e-12 * config.lr
    for iteration in range(config.lr_warmup_iters):
        assert run[iteration] == pytest.approx(config.lr * (iteration + 1) / config.lr_warmup_iters, rel=1e-12)
    assert all(a < b for a, b in pairwise(run[: peak + 1]))
    decay = run[peak:]
    assert all(a >= b - rounding for a, b in pairwise(decay))
    if config.min_lr < 0.9 * config.lr:
        assert all(a > b for a, b in pairwise(decay))
    steps = [a - b for a, b in pairwise(decay)]
    assert all(step == pytest.approx((config.lr - config.min_lr) / len(steps), abs=rounding) for step in steps)


def test_by_hand() -> None:
    config = OptimizerConfig(lr=1.0, min_lr=0.2, lr_warmup_iters=4)
    wanted = [0.25, 0.5, 0.75, 1.0, 0.8, 0.6, 0.4, 0.2]
    assert rates(8, config) == pytest.approx(wanted)
    assert rates(5, OptimizerConfig(lr=1.0)) == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0])


def test_past_the_end_the_rate_stays() -> None:
    assert learning_rate(1000, 10, OptimizerConfig(lr=1.0, min_lr=0.1)) == pytest.approx(0.1)
