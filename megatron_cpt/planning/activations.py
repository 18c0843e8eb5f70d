"""Bytes that one micro-batch leaves on a rank for its backward pass.

The accounting is that of Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models" (2022), for
what megatron-core saves of a Llama layer with our settings: fused rotary embedding and SwiGLU, flash attention, grouped
queries, no dropout, no biases. Each storage counts once. torch's layers have their norms apart; of Transformer Engine's
(2.20.2) the sources of each figure are named in `engine_layer_bytes`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from megatron_cpt.planning.layouts import Layout, ModelChunk, TrainingJob, chunks_of_stage


@dataclass(frozen=True)
class Sizes:
    """What a layer's tensors are made of, on one rank.

    Attributes:
        tokens: of a micro-batch; under context parallelism this rank's share of them
        local_tokens: tokens that norms and residuals see: a share of the former under sequence parallelism
        query, key, ffn, vocab: width of this rank's share of the query heads, of the key (or value) heads, of the MLP, of
            the vocabulary
    """

    tokens: int
    local_tokens: int
    hidden: int
    query: int
    key: int
    heads: int
    ffn: int
    vocab: int


def layer_sizes(job: TrainingJob, layout: Layout) -> Sizes:
    llama, tensor = job.llama, layout.tensor
    tokens = layout.micro_batch_size * job.seq_length // layout.context
    return Sizes(
        tokens=tokens,
        local_tokens=tokens // tensor if layout.parallel.sequence_parallel else tokens,
        hidden=llama.hidden_size,
        query=llama.num_attention_heads * llama.head_dim // tensor,
        key=llama.num_key_value_heads * llama.head_dim // tensor,
        heads=llama.num_attention_heads // tensor,
        ffn=llama.intermediate_size // tensor,
        vocab=llama.padded_vocab_size(tensor) // tensor,
    )


def layer_bytes(job: TrainingJob, layout: Layout, recomputed: frozenset[str] = frozenset()) -> dict[str, int]:
    """Saved for the backward pass of one layer, by part; `recomputed`: of core_attn, mlp, layernorm."""
    if job.has_transformer_engine(layout):
        return engine_layer_bytes(job, layout, recomputed)
    n, element = layer_sizes(job, layout), job.element_bytes
    residual = n.local_tokens * n.hidden * element
    norms = 2 * (residual + 4 * n.local_tokens)  # input, and fp32 reciprocal of the root mean square
    if "layernorm" not in recomputed:
        norms += 2 * residual  # outputs: inputs of linear_qkv and linear_fc1
    # The output of linear_qkv, of which the values are a view; queries and keys after rotation; what linear_proj reads.
    attention = n.tokens * (2 * n.query + 3 * n.key + n.query) * element
    # Log of the sum of exponentials, fp32; or, recomputed, the kind of mask, a tensor of one number.
    attention += 4 if "core_attn" in recomputed else 4 * n.tokens * n.heads
    # linear_fc1's gate and value, and what linear_fc2 reads.
    mlp = 0 if "mlp" in recomputed else 3 * n.tokens * n.ffn * element
    return {"norms": norms, "attention": attention, "mlp": mlp}


def engine_layer_bytes(job: TrainingJob, layout: Layout, recomputed: frozenset[str]) -> dict[str, int]:
    """Saved by a layer of Transformer Engine 2.20.2 (its tensorwise FP8 recipe), by part.

    norms: `_LayerNormLinear` (module/layernorm_linear.py) saves its input `inputmat`, the fp32 `rsigma` and the norm's
        output `ln_out`, which is in FP8 where it computes in FP8: by rows if backward gathers it (sequence parallelism), by
        columns if not (`update_usage(rowwise_usage=False)`), never both. A recomputed MLP includes its norm, and keeps the
        input alone.
    attention: query and key after rotation; of the values a copy, for they are no dense tensor (`get_qkv_layout` in
        attention/dot_product_attention/utils.py: "not_supported", so `contiguous()`), which frees the output of linear_qkv;
        the output, in bf16, which linear_proj does not quantize for keeps (`set_save_original_input` in megatron-core's
        attention.py); the fp32 log of the sum of exponentials. Recomputed (core_attn), its inputs are kept, and with the
        values the whole output of linear_qkv. Over several devices (`AttnFuncWithCPAndKVP2P`) as well: of a rank's share of
        the tokens.
    mlp: linear_fc1's gate and value in bf16 (megatron-core's `SwiGLUFunction`), and linear_fc2's input, which `_Linear`
        (module/linear.py) saves quantized: one byte in FP8.
    """
    n, element = layer_sizes(job, layout), job.element_bytes
    product = 1 if job.fp8 else element  # of what a matrix product reads
    residual = n.local_tokens * n.hidden * element
    kept_norms = 1 if "mlp" in recomputed else 2
    norms = 2 * residual + kept_norms * n.local_tokens * (n.hidden * product + 4)
    if "core_attn" in recomputed:
        attention = n.tokens * (2 * n.query + 3 * n.key + n.query) * element + 4
    else:
        attention = n.tokens * (2 * n.query + 2 * n.key) * element + 4 * n.tokens * n.heads
    mlp = 0 if "mlp" in recomputed else n.tokens * n.ffn * (2 * element + product)
    return {"norms": norms, "attention": attention, "mlp": mlp}


def recomputed_modules(layout: Layout) -> frozenset[str]:
    """Of selective recomputation; megatron-core's default is core_attn."""
    if layout.parallel.recompute_granularity != "selective":
        return frozenset()
    return frozenset(layout.parallel.recompute_modules or ["core_attn"])


def fully_recomputed(layout: Layout, layers: int) -> tuple[int, int]:
    """Of a chunk's layers under full recomputation: groups whose input is kept, layers in them."""
    if layout.parallel.recompute_granularity != "full":
        return 0, 0
    number = layout.parallel.recompute_num_layers or 1
    if layout.parallel.recompute_method == "block":
        return min(number, layers), min(number, layers)
    return -(-layers // number), layers


def chunk_bytes(job: TrainingJob, layout: Layout, chunk: ModelChunk) -> dict[str, int]:
    """Saved for the backward pass of one micro-batch through a model chunk, by part."""
    n, element = layer_sizes(job, layout), job.element_bytes
    groups, recomputed = fully_recomputed(layout, chunk.layers)
    saved = layer_bytes(job, layout, recomputed_modules(layout))
    parts = {name: (chunk.layers - recomputed) * size for name, size in saved.items()}
    parts["layer inputs"] = groups * n.local_tokens * n.hidden * element
    parts["rotary angles"] = 4 * job.seq_length // layout.context * job.llama.head_dim if chunk.layers else 0  # fp32, shared
    # Token ids, and under tensor parallelism which of them this rank's part of the vocabulary does not have.
    parts["embedding"] = n.tokens * (8 + (layout.tensor > 1)) if chunk.has_embedding else 0
    parts["output"] = 0
    if chunk.has_output:
        # Final norm, input of the output layer, and the fp32 probabilities of this rank's part of the vocabulary.
        parts["output"] = 2 * n.local_tokens * n.hidden * element + 4 * n.local_tokens
        parts["output"] += n.tokens * (4 * n.vocab + 9)  # with masks and ids of the targets
    return parts


def microbatches_in_flight(layout: Layout, stage: int) -> float:
    """Micro-batches whose activations a stage holds at most, in units of the whole stage.

    1F1B: one for each stage from this one on. Interleaved (Narayanan et al., "Efficient Large-Scale Language Model Training
    on GPU Clusters Using Megatron-LM", 2021): 2 (p - stage - 1) + (v - 1) p chunks run ahead, and one more is in work.
    """
    pipeline, virtual = layout.pipeline, layout.virtual
    if virtual == 1:
        return min(pipeline - stage, layout.num_microbatches)
    chunks = 2 * (pipeline - stage - 1) + (virtual - 1) * pipeline + 1
    return min(chunks, layout.num_microbatches * virtual) / virtual


def stage_bytes(job: TrainingJob, layout: Layout, stage: int) -> dict[str, int]:
    """Saved on a stage at the fullest moment, by part. Logits and probabilities exist for one micro-batch at a time."""
    parts: dict[str, float] = {}
    in_flight = microbatches_in_flight(layout, stage)
    for chunk, number in Counter(chunks_of_stage(job.llama, layout, stage)).items():
        for name, size in chunk_bytes(job, layout, chunk).items():
            parts[name] = parts.get(name, 0) + number * size * (1 if name == "output" else in_flight)
    return {name: int(size) for name, size in parts.items()}


def working_bytes(job: TrainingJob, layout: Layout, stage: int) -> int:
    """Held for a moment: gradients within a layer, the gathered input, a recomputed layer; on the last stage the logits."""
    n, element = layer_sizes(job, layout), job.element_bytes
    layer = (n.tokens * (n.hidden + 3 * n.ffn) + 2 * n.local_tokens * n.hidden) * element
    full = layer_bytes(job, layout)
    if layout.parallel.recompute_granularity == "full":
        number = 1 if layout.parallel.recompute_method == "block" else layout.parallel.recompute_num_layers or 1
        layer += number * sum(full.values())
    layer += sum(full[{"mlp": "mlp", "core_attn": "attention"}[m]] for m in recomputed_modules(layout) if m != "layernorm")
    # In bf16 the compiled loss holds the logits, and in fp32 what comes before the probabilities, which are among the saved;
    # in fp32 it works in place. Measured on one GPU (docs/planning.md).
    logits = n.tokens * n.vocab * (2 + 4) if element == 2 else 0
    return max(layer, logits if stage == layout.pipeline - 1 else 0)
