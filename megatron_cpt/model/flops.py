"""Floating-point operations of training, by the two formulas in use; MFU figures compare only within one of them."""

from __future__ import annotations

from megatron_cpt.model.llama import LlamaConfig


def flops_per_token(llama: LlamaConfig, seq_length: int, causal: bool) -> float:
    """Operations of forward and backward pass per token (a multiply-add is two; recomputation does not count).

    6 for each weight of a matrix product (the output layer's included, embeddings and norms not) and, for the attention
    scores, 12 layers heads head_dim seq_length: torchtitan's formula (after Chowdhery et al., PaLM, 2022, appendix B).
    `causal` counts half of the latter, what a causal kernel computes: Megatron-LM's and Megatron-Bridge's.
    """
    attention = 12 * llama.num_hidden_layers * llama.num_attention_heads * llama.head_dim * seq_length
    return 6.0 * matmul_weights(llama) + attention * (0.5 if causal else 1.0)


def utilisation(tokens_per_second: float, flops: float, peak_tflops: float) -> float:
    """MFU: the share of a device's dense bf16 peak that model FLOPs are, a part of 1.

    Of the bf16 peak in every precision, so that figures of runs in fp32, bf16 and FP8 compare.

    Args:
        tokens_per_second: of one device
        flops: operations per token (flops_per_token)
        peak_tflops: dense bf16 peak of the device, 1e12 operations per second
    """
    return tokens_per_second * flops / (peak_tflops * 1e12)


def matmul_weights(llama: LlamaConfig) -> int:
    """Weights that take part in matrix products."""
    heads, groups = llama.num_attention_heads * llama.head_dim, llama.num_key_value_heads * llama.head_dim
    attention = llama.hidden_size * (2 * heads + 2 * groups)
    mlp = 3 * llama.hidden_size * llama.intermediate_size
    return llama.num_hidden_layers * (attention + mlp) + llama.hidden_size * llama.vocab_size
