"""Shapes of the Llama-3 family, and of a model on disk."""

from __future__ import annotations

import os

from megatron_cpt.model.llama import LlamaConfig, RopeScaling, read_llama_config
from megatron_cpt.utils.errors import InputError


def llama3(layers: int, hidden: int, intermediate: int, heads: int, tied: bool = False, head_dim: int = 128) -> LlamaConfig:
    """A Llama-3.1 or 3.2 text model: 8 key-value heads, 128,256 tokens, 131,072 positions."""
    return LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=head_dim,
        vocab_size=128256,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling=RopeScaling(32.0 if tied else 8.0, 1.0, 4.0, 8192),
        tie_word_embeddings=tied,
        dtype="bfloat16",
    )


MODELS = {
    "1B": llama3(16, 2048, 8192, 32, tied=True, head_dim=64),
    "3B": llama3(28, 3072, 8192, 24, tied=True),
    "8B": llama3(32, 4096, 14336, 32),
    "70B": llama3(80, 8192, 28672, 64),
    "405B": llama3(126, 16384, 53248, 128),
}


def find_model(name: str) -> LlamaConfig:
    """A model by preset name (any case), or from a Hugging Face or Megatron checkpoint folder.

    Raises:
        InputError: neither a preset nor a folder with a Llama config.json
    """
    if name.upper() in MODELS:
        return MODELS[name.upper()]
    if not os.path.isdir(name):
        raise InputError(f"model is {name!r}; expected {', '.join(MODELS)}, or a Hugging Face or Megatron checkpoint folder")
    for folder in (name, os.path.join(name, "hf"), os.path.join(name, "release", "hf")):
        if os.path.exists(os.path.join(folder, "config.json")):
            llama = read_llama_config(folder)
            if llama.attention_bias or llama.mlp_bias:
                raise InputError(
                    f"{folder}/config.json: the model has biases, which the estimates leave out; plan it without"
                )
            return llama
    raise InputError(f"model {name}: neither config.json nor hf/config.json is there")
