"""The names and shapes of Llama's weights in Hugging Face and in megatron-core (unsplit, TP1 x PP1).

Megatron joins what HF keeps apart: linear_qkv holds, for each group of query heads, its queries, its key and its value;
linear_fc1 holds the gate, then the up projection. Only rows move, no number changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from megatron_cpt.errors import InputError
from megatron_cpt.model.llama import LlamaConfig

# HF's name below "model.layers.N." -> Megatron's below "decoder.layers.N.", in a model of torch layers. (In a checkpoint
# the norms have the names that Transformer Engine gives them; megatron-core renames them on the way.)
LAYER_NAMES = {
    "input_layernorm.weight": "input_layernorm.weight",
    "self_attn.o_proj.weight": "self_attention.linear_proj.weight",
    "post_attention_layernorm.weight": "pre_mlp_layernorm.weight",
    "mlp.down_proj.weight": "mlp.linear_fc2.weight",
}
MODEL_NAMES = {
    "model.embed_tokens.weight": "embedding.word_embeddings.weight",
    "model.norm.weight": "decoder.final_layernorm.weight",
}
OUTPUT_NAMES = {"lm_head.weight": "output_layer.weight"}


def model_names(llama: LlamaConfig) -> dict[str, str]:
    """HF -> Megatron names outside the layers; with tied embeddings the output layer is the embedding."""
    return MODEL_NAMES if llama.tie_word_embeddings else MODEL_NAMES | OUTPUT_NAMES


def join_qkv(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, llama: LlamaConfig) -> torch.Tensor:
    """[heads * dim, h], [groups * dim, h], [groups * dim, h] -> [(heads + 2 * groups) * dim, h], group by group."""
    groups, columns = llama.num_key_value_heads, q.shape[1]
    parts = [x.reshape(groups, -1, columns) for x in (q, k, v)]
    return torch.cat(parts, dim=1).reshape(-1, columns)


def split_qkv(qkv: torch.Tensor, llama: LlamaConfig) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The inverse of `join_qkv`."""
    groups, columns = llama.num_key_value_heads, qkv.shape[1]
    rows = [llama.num_attention_heads // groups * llama.head_dim, llama.head_dim, llama.head_dim]
    q, k, v = qkv.reshape(groups, -1, columns).split(rows, dim=1)
    return q.reshape(-1, columns), k.reshape(-1, columns), v.reshape(-1, columns)


def megatron_from_hf(hf: Mapping[str, torch.Tensor], llama: LlamaConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """HF tensors -> (Megatron name, tensor), one at a time, each HF tensor read once."""
    for hf_name, name in model_names(llama).items():
        yield name, hf[hf_name]
    for layer in range(llama.num_hidden_layers):
        source, target = f"model.layers.{layer}.", f"decoder.layers.{layer}."
        for hf_name, name in LAYER_NAMES.items():
            yield target + name, hf[source + hf_name]
        q, k, v = (hf[f"{source}self_attn.{x}_proj.weight"] for x in "qkv")
        yield target + "self_attention.linear_qkv.weight", join_qkv(q, k, v, llama)
        gate, up = hf[source + "mlp.gate_proj.weight"], hf[source + "mlp.up_proj.weight"]
        yield target + "mlp.linear_fc1.weight", torch.cat([gate, up])


def hf_from_megatron(megatron: Mapping[str, torch.Tensor], llama: LlamaConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """The inverse of `megatron_from_hf`: Megatron tensors -> (HF name, tensor)."""
    for hf_name, name in model_names(llama).items():
        yield hf_name, megatron[name]
    for layer in range(llama.num_hidden_layers):
        source, target = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        for hf_name, name in LAYER_NAMES.items():
            yield target + hf_name, megatron[source + name]
        qkv = split_qkv(megatron[source + "self_attention.linear_qkv.weight"], llama)
        for x, weight in zip("qkv", qkv, strict=True):
            yield f"{target}self_attn.{x}_proj.weight", weight
        gate, up = megatron[source + "mlp.linear_fc1.weight"].chunk(2)
        yield target + "mlp.gate_proj.weight", gate
        yield target + "mlp.up_proj.weight", up


def hf_shapes(llama: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor a HF checkpoint of this architecture holds, with its shape."""
    hidden, ffn = llama.hidden_size, llama.intermediate_size
    queries, keys = llama.num_attention_heads * llama.head_dim, llama.num_key_value_heads * llama.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (llama.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not llama.tie_word_embeddings:
        shapes["lm_head.weight"] = (llama.vocab_size, hidden)
    for layer in range(llama.num_hidden_layers):
        shapes |= {
            f"model.layers.{layer}.{name}": shape
            for name, shape in {
                "input_layernorm.weight": (hidden,),
                "self_attn.q_proj.weight": (queries, hidden),
                "self_attn.k_proj.weight": (keys, hidden),
                "self_attn.v_proj.weight": (keys, hidden),
                "self_attn.o_proj.weight": (hidden, queries),
                "post_attention_layernorm.weight": (hidden,),
                "mlp.gate_proj.weight": (ffn, hidden),
                "mlp.up_proj.weight": (ffn, hidden),
                "mlp.down_proj.weight": (hidden, ffn),
            }.items()
        }
    return shapes


def check_shapes(found: Mapping[str, tuple[int, ...]], llama: LlamaConfig, where: str) -> None:
    """Raise InputError for the first tensor that is missing, unexpected or of another shape than config.json says."""
    wanted = hf_shapes(llama)
    for name, shape in wanted.items():
        if name not in found:
            raise InputError(f"{where}: tensor {name} is missing")
        if tuple(found[name]) != shape:
            raise InputError(f"{where}: tensor {name} has shape {list(found[name])}; config.json asks for {list(shape)}")
    extra = sorted(set(found) - set(wanted))
    if extra:
        raise InputError(f"{where}: tensor {extra[0]} does not belong to this architecture")
