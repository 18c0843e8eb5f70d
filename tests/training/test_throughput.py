"""Throughput and utilisation, by hand."""

from __future__ import annotations

import pytest

from megatron_cpt.training.throughput import step_throughput


def test_utilisation_by_both_formulas() -> None:
    # 8 devices of 100 TFLOP/s; 40,000 tokens in 2 s are 2,500 per second and device
    values = step_throughput(2.0, 40_000, 8, (2e10, 1.6e10), 100.0)
    assert values == {
        "tokens_per_second": 20_000.0,
        "tokens_per_second_per_device": 2_500.0,
        "mfu": pytest.approx(0.5),
        "mfu_causal": pytest.approx(0.4),
    }


def test_without_a_peak_there_is_no_utilisation() -> None:
    assert step_throughput(2.0, 100, 2, (1.0, 1.0), None) == {
        "tokens_per_second": 50.0,
        "tokens_per_second_per_device": 25.0,
    }
