"""Shapes of real models, and of one that is small."""

from __future__ import annotations

from dataclasses import replace

from megatron_cpt.model.llama import LlamaConfig, RopeScaling

SIZES = {
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}
SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
LLAMA_3_1_8B = LlamaConfig(
    **SIZES,
    head_dim=128,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
    rope_scaling=RopeScaling(**SCALING),
    tie_word_embeddings=False,
    dtype="bfloat16",
)
SMOLLM = replace(  # 9 heads in 3 groups: no even split
    LLAMA_3_1_8B,
    num_hidden_layers=30,
    hidden_size=576,
    intermediate_size=1536,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    vocab_size=49152,
    max_position_embeddings=2048,
)
TINY = {  # config.json of a model that nobody loads
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 400,
    "max_position_embeddings": 256,
}
