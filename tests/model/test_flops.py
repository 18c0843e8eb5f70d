"""Operations per token, counted by hand and position by position."""

from __future__ import annotations

import pytest

from megatron_cpt.model.flops import flops_per_token, matmul_weights
from megatron_cpt.planning.presets import MODELS

LENGTH = 8192


def test_weights_of_matrix_products() -> None:
    """Of Llama-3-8B's 8,030,261,248 all but the embeddings and 65 norms of 4,096."""
    assert matmul_weights(MODELS["8B"]) == 8_030_261_248 - 128_256 * 4096 - 65 * 4096


def scores(keys: list[int]) -> float:
    """Per token, 32 layers: products of 32 heads of 128 with so many keys and values at each position; 3: gradients."""
    return 3 * 32 * sum(2 * 2 * 32 * 128 * many for many in keys) / len(keys)


def test_full_attention() -> None:
    weights = 6 * matmul_weights(MODELS["8B"])
    assert flops_per_token(MODELS["8B"], LENGTH, causal=False) == weights + scores([LENGTH] * LENGTH)


def test_causal_attention() -> None:
    """The formula counts half; a causal kernel computes half and one product a position."""
    weights = 6 * matmul_weights(MODELS["8B"])
    formula = flops_per_token(MODELS["8B"], LENGTH, causal=True) - weights
    assert formula == pytest.approx(scores([i + 1 for i in range(LENGTH)]), rel=1.01 / LENGTH)
    assert formula == scores([LENGTH] * LENGTH) / 2
