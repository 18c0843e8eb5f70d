"""Llama's weights in Hugging Face and in Megatron's checkpoints: names, shapes, and who is a part of whom.

Megatron joins what HF keeps apart: linear_qkv holds, for each group of query heads, its queries, its key and its value;
linear_fc1 holds the gate, then the up projection. Only rows move, no number changes. A checkpoint has one tensor for all
layers, [layers, ...], in chunks of one layer; norms have the names that Transformer Engine's layers give them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from megatron_cpt.checkpoint.hf_files import HfTensors
from megatron_cpt.checkpoint.torch_dist import TensorChunk
from megatron_cpt.model.llama import LlamaConfig, check_shape, hf_shapes
from megatron_cpt.utils.errors import InputError

LAYERS = "decoder.layers."
QKV, FC1 = "self_attention.linear_qkv", "mlp.linear_fc1"
EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
# HF's name -> Megatron's, of what is the same in both: outside the layers, and below "model.layers.N."
MODEL_NAMES = {
    "model.embed_tokens.weight": EMBEDDING,
    "model.norm.weight": "decoder.final_layernorm.weight",
    "lm_head.weight": OUTPUT,
}
LAYER_NAMES = {
    "input_layernorm.weight": f"{QKV}.layer_norm_weight",
    "self_attn.o_proj.weight": "self_attention.linear_proj.weight",
    "self_attn.o_proj.bias": "self_attention.linear_proj.bias",
    "post_attention_layernorm.weight": f"{FC1}.layer_norm_weight",
    "mlp.down_proj.weight": "mlp.linear_fc2.weight",
    "mlp.down_proj.bias": "mlp.linear_fc2.bias",
}
# ... and of what is joined, with its place in the whole
JOINED_NAMES = {
    f"self_attn.{x}_proj.{kind}": (f"{QKV}.{kind}", i) for i, x in enumerate("qkv") for kind in ("weight", "bias")
}
JOINED_NAMES |= {
    f"mlp.{x}_proj.{kind}": (f"{FC1}.{kind}", i) for i, x in enumerate(("gate", "up")) for kind in ("weight", "bias")
}
# Megatron's names of norms in models without Transformer Engine
OTHER_NAMES = {
    f"{QKV}.layer_norm_weight": "input_layernorm.weight",
    f"{FC1}.layer_norm_weight": "pre_mlp_layernorm.weight",
}
WITH_EXTRA_STATE = ("self_attention.linear_proj", QKV, FC1, "mlp.linear_fc2")


def open_hf(folder: str, llama: LlamaConfig) -> HfTensors:
    """The tensors of a HF folder, without what old versions of transformers saved though it is computed or a copy.

    Raises:
        InputError: as HfTensors; or the copy is none
    """
    tensors = HfTensors(folder)
    tied = ("lm_head.weight", "model.embed_tokens.weight")
    if llama.tie_word_embeddings and all(name in tensors for name in tied):
        if not torch.equal(*(tensors[name] for name in tied)):
            raise InputError(f"{folder}: config.json ties the word embeddings, but {tied[0]} is not {tied[1]}")
        tensors.leave_out(tied[0])
    for name in [name for name in tensors if name.endswith("rotary_emb.inv_freq")]:
        tensors.leave_out(name)
    return tensors


def check_shapes(found: Mapping[str, tuple[int, ...]], llama: LlamaConfig, where: str) -> None:
    """Raise InputError for the first tensor that is missing, unexpected or of another shape than config.json says."""
    wanted = hf_shapes(llama)
    for name, shape in wanted.items():
        if name not in found:
            raise InputError(f"{where}: tensor {name} is missing")
        check_shape(where, name, found[name], shape)
    for name in found:
        if name not in wanted:
            raise InputError(f"{where}: tensor {name} does not belong to this architecture")


def join_qkv(parts: list[torch.Tensor], llama: LlamaConfig) -> torch.Tensor:
    """Queries [heads * dim, ...], keys and values [groups * dim, ...] -> all in one, group by group."""
    groups, columns = llama.num_key_value_heads, parts[0].shape[1:]
    return torch.cat([part.reshape(groups, -1, *columns) for part in parts], dim=1).reshape(-1, *columns)


def split_qkv(qkv: torch.Tensor, llama: LlamaConfig) -> list[torch.Tensor]:
    """The inverse of `join_qkv`."""
    groups, columns = llama.num_key_value_heads, qkv.shape[1:]
    rows = [llama.num_attention_heads // groups * llama.head_dim, llama.head_dim, llama.head_dim]
    return [part.reshape(-1, *columns) for part in qkv.reshape(groups, -1, *columns).split(rows, dim=1)]


@dataclass(frozen=True)
class WeightPiece:
    """A chunk of a Megatron checkpoint and the HF tensors that it is made of: one, or queries, keys and values."""

    chunk: TensorChunk
    sources: tuple[str, ...]

    def make(self, hf: Mapping[str, torch.Tensor], llama: LlamaConfig) -> torch.Tensor:
        """The chunk's numbers, in the dtype of the sources."""
        parts = [hf[name] for name in self.sources]
        return (parts[0] if len(parts) == 1 else join_qkv(parts, llama)).reshape(self.chunk.shape)


def pieces_of(llama: LlamaConfig, dtype: torch.dtype) -> list[WeightPiece]:
    """Everything a Megatron checkpoint of this architecture holds, in the chunks in which megatron-core would save it."""
    shapes, layers = hf_shapes(llama), llama.num_hidden_layers
    pieces = []
    for name, key in MODEL_NAMES.items():
        if name in shapes:
            whole = shapes[name]
            pieces.append(WeightPiece(TensorChunk(key, whole, (0,) * len(whole), whole, dtype), (name,)))
    places: list[tuple[tuple[int, int], tuple[int], tuple[str, ...]]]  # first layer and row, rows, sources
    for layer in range(layers):
        below = f"model.layers.{layer}."
        joined: dict[str, list[str]] = {}
        for name in (name.removeprefix(below) for name in shapes if name.startswith(below)):
            key = JOINED_NAMES[name][0] if name in JOINED_NAMES else LAYER_NAMES[name]
            joined.setdefault(key, []).append(below + name)
        for key, sources in joined.items():
            rows = [shapes[source][0] for source in sources]
            columns = shapes[sources[0]][1:]
            whole = (layers, sum(rows), *columns)
            if key.startswith(FC1):  # a chunk for each part
                places = [
                    ((layer, sum(rows[:i])), (row,), (source,))
                    for i, (row, source) in enumerate(zip(rows, sources, strict=True))
                ]
            else:
                places = [((layer, 0), (sum(rows),), (*sources,))]
            for start, length, parts in places:
                chunk = TensorChunk(LAYERS + key, whole, (*start, *(0 for _ in columns)), (1, *length, *columns), dtype)
                pieces.append(WeightPiece(chunk, parts))
    return pieces


def extra_states(llama: LlamaConfig) -> list[str]:
    """Keys of the states that megatron-core looks for beside the weights; they are empty without FP8."""
    layers = llama.num_hidden_layers
    return [
        f"{LAYERS}{module}._extra_state/shard_{layer}_{layers}" for layer in range(layers) for module in WITH_EXTRA_STATE
    ]
