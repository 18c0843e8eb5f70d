"""Transformer layers from plain torch operations: on CPU, and on a GPU without Transformer Engine.

Only the core attention and the norm differ from megatron-core's local spec; the parameter names in a checkpoint are the
same as with Transformer Engine's layers, so one checkpoint serves both.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import megatron_cpt.platforms.imported_megatron  # noqa: F401  isort: skip  (before megatron is imported)
import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig


class TorchRMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm, told about sequence parallelism (megatron-core's own wrapper refuses it).

    Under sequence parallelism each tensor-parallel rank norms its part of the sequence, so the weight's gradient has to
    be summed over them; megatron-core does that for parameters that carry the mark `sequence_parallel`.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class SdpaCoreAttention(torch.nn.Module):
    """Causal core attention on torch's scaled_dot_product_attention (grouped queries, no dropout).

    megatron-core's unfused DotProductAttention builds the whole score matrix and wants an explicit mask.
    """

    def __init__(self, config: TransformerConfig, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__()
        if config.attention_dropout:
            raise ValueError(f"attention_dropout is {config.attention_dropout}; this attention supports 0.0 only")
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """Causal attention over each sample, or over each document of a packed sequence.

        query [s, b, heads, dim], key and value [s, b, groups, dim] -> [s, b, heads * dim]; with `packed_seq_params`,
        query [tokens, heads, dim], key and value [tokens, groups, dim] -> [tokens, heads * dim].
        """
        if attention_mask is not None:
            raise ValueError("attention_mask must be None: samples and documents are told apart without one")
        if packed_seq_params is not None:
            return self.attend_within_documents(query, key, value, packed_seq_params)
        seq_length, batch, heads, head_dim = query.shape
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # -> [b, heads, s, dim]
        return self.attend(query, key, value).permute(2, 0, 1, 3).reshape(seq_length, batch, heads * head_dim)

    def attend_within_documents(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packing: PackedSeqParams
    ) -> torch.Tensor:
        """[tokens, heads or groups, dim] -> [tokens, heads * dim]; where torch has no kernel for it, document by document.

        Costs the sum of the squared lengths instead of the square of their sum, and no mask has to be stored.
        """
        if query.is_cuda and query.dtype == torch.bfloat16 and (kernel := packed_attention()) is not None:
            borders, longest = packing.cu_seqlens_q, packing.max_seqlen_q
            causal = {"window_size": (-1, 0), "scale": self.softmax_scale}
            output: torch.Tensor = kernel(query, key, value, borders, borders, longest, longest, **causal)
            return output.flatten(1)
        lengths = packing.cu_seqlens_q.diff().tolist()
        # Splitting once keeps the backward pass linear: each slice's own gradient would be as long as the whole.
        documents = zip(*(x.transpose(0, 1).split(lengths, dim=1) for x in (query, key, value)), strict=True)
        outputs = [self.attend(*(x.unsqueeze(0) for x in document)).squeeze(0) for document in documents]
        return torch.cat(outputs, dim=1).transpose(0, 1).flatten(1)

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """query [b, heads, s, dim], key and value [b, groups, s, dim] -> [b, heads, s, dim]."""
        if query.is_cuda and query.dtype == torch.float32:
            # torch has no fused kernel for grouped queries in fp32: it would keep all scores
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=self.softmax_scale, enable_gqa=key.shape[1] != query.shape[1]
        )


@functools.cache
def packed_attention() -> Callable[..., torch.Tensor] | None:
    """Flash attention over packed documents, of torch 2.11 and later (2.10 takes other arguments)."""
    try:
        varlen_attn: Callable[..., Any] = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    except ImportError:
        return None
    parameters = inspect.signature(varlen_attn).parameters
    if "window_size" not in parameters:
        return None
    return functools.partial(varlen_attn, enable_gqa=True) if "enable_gqa" in parameters else varlen_attn


def torch_block_spec(config: TransformerConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage: megatron-core's parallel linears with torch's attention and norm."""
    layer = get_gpt_layer_local_spec(normalization=config.normalization)
    layer.submodules.input_layernorm = TorchRMSNorm
    layer.submodules.pre_mlp_layernorm = TorchRMSNorm
    layer.submodules.self_attention.submodules.core_attention = SdpaCoreAttention
    num_layers = get_num_layers_to_build(config, vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=TorchRMSNorm)


def recompute_norms_without_fp8() -> None:
    """Recomputing norms asks Transformer Engine whether FP8 is on, unless told None: the default, False, counts as on."""
    import megatron.core.tensor_parallel.random as random

    random.CheckpointWithoutOutput.__init__.__defaults__ = (None,)
