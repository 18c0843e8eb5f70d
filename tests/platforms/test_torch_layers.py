"""Core attention on torch's scaled_dot_product_attention, against the definition of attention."""

from __future__ import annotations

import math
from itertools import pairwise
from types import SimpleNamespace

import megatron_cpt.platforms.imported_megatron  # noqa: F401  isort: skip  (before megatron is imported)
import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_cpt.platforms.torch_layers import SdpaCoreAttention

HEAD_DIM = 8


def attention() -> SdpaCoreAttention:
    return SdpaCoreAttention(SimpleNamespace(attention_dropout=0.0))


def random_inputs(tokens: int, heads: int, groups: int) -> list[torch.Tensor]:
    """Query [tokens, heads, dim], key and value [tokens, groups, dim], in double precision, that collect gradients."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(tokens, heads, HEAD_DIM), (tokens, groups, HEAD_DIM), (tokens, groups, HEAD_DIM)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def defined(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seqlens: list[int]) -> torch.Tensor:
    """[tokens, heads * dim] from the whole score matrix and an explicit mask."""
    tokens, heads, _ = query.shape
    key, value = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))
    allowed = torch.zeros(tokens, tokens, dtype=torch.bool)
    for begin, end in pairwise(cu_seqlens):
        allowed[begin:end, begin:end] = torch.ones(end - begin, end - begin, dtype=torch.bool).tril()
    scores = torch.einsum("qhd,khd->hqk", query, key) / math.sqrt(HEAD_DIM)
    weights = scores.masked_fill(~allowed, -math.inf).softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, value).flatten(1)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("cu_seqlens", [[0, 5, 6, 7, 20], [0, 20], list(range(21))], ids=["some", "one", "single tokens"])
def test_packed_attention_stays_within_documents(cu_seqlens: list[int], groups: int) -> None:
    inputs = random_inputs(20, 4, groups)
    packing = PackedSeqParams(qkv_format="thd", cu_seqlens_q=torch.tensor(cu_seqlens, dtype=torch.int32))
    found, wanted = attention()(*inputs, packed_seq_params=packing), defined(*inputs, cu_seqlens)
    assert found.shape == (20, 4 * HEAD_DIM)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    gradients = [torch.autograd.grad((output * weights).sum(), inputs) for output in (found, wanted)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_unpacked_attention_is_causal_over_each_sample() -> None:
    inputs = random_inputs(20, 4, 2)
    samples = [x.unflatten(0, (2, 10)).transpose(0, 1) for x in inputs]  # [s, b, heads, dim]
    found = attention()(*samples)
    assert found.shape == (10, 2, 4 * HEAD_DIM)
    torch.testing.assert_close(found.transpose(0, 1).flatten(0, 1), defined(*inputs, [0, 10, 20]), rtol=0, atol=1e-12)


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(ValueError, match="attention_mask must be None"):
        attention()(*random_inputs(4, 2, 2), attention_mask=torch.ones(4, 4))
    with pytest.raises(ValueError, match=r"attention_dropout is 0\.1"):
        SdpaCoreAttention(SimpleNamespace(attention_dropout=0.1))
