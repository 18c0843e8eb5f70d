"""The Llama architecture, read from the config.json of a Hugging Face folder."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_cpt.config.partial import partly
from megatron_cpt.utils.errors import InputError, Refusals, brief
from megatron_cpt.utils.input_files import load_json


@dataclass(frozen=True)
class RopeScaling:
    """Llama-3.1's frequency scaling (rope_type "llama3")."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class LlamaConfig:
    """What of a HF LlamaConfig decides the computation, with HF's names."""

    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    tie_word_embeddings: bool
    dtype: str  # of the saved weights: float32, bfloat16 or float16
    attention_bias: bool = False
    mlp_bias: bool = False

    def padded_vocab_size(self, tensor_model_parallel_size: int) -> int:
        """Rows of the embedding and the output layer when they are split: the last ones may be padding."""
        return -(-self.vocab_size // tensor_model_parallel_size) * tensor_model_parallel_size


# No model comes near: beyond, a number would be taken for the size of something that no memory holds
MOST, MOST_LAYERS, MOST_FLOAT = 1 << 31, 10_000, 1e15
MOST_NAMED = 8  # of fields that are not known
DTYPES = ("float32", "bfloat16", "float16")
# Fields with one value that we compute; anything else would silently be another model.
ONLY = {
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "partial_rotary_factor": 1.0,
}
# Fields that change nothing here: what we read, what initialises or describes, and what is for generation or other tasks.
KNOWN = {field.name for field in dataclasses.fields(LlamaConfig)} | {
    "architectures",
    "chunk_size_feed_forward",
    "id2label",
    "initializer_range",
    "is_decoder",
    "is_encoder_decoder",
    "is_llama_config",
    "label2id",
    "max_length",
    "max_sequence_length",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "pretraining_tp",
    "problem_type",
    "return_dict",
    "rope_parameters",
    "temperature",
    "tokenizer_class",
    "top_p",
    "torch_dtype",
    "transformers.js_config",
    "transformers_version",
    "unsloth_fixed",
    "unsloth_version",
    "use_cache",
}


def read_llama_config(folder: str) -> LlamaConfig:
    """Read FOLDER/config.json.

    Raises:
        InputError: no such file, not a Llama model, or a setting that changes the computation in a way we do not know
    """
    path = os.path.join(folder, "config.json")
    return llama_from(_read_json(path), path)


def llama_from(fields: dict[str, Any], path: str) -> LlamaConfig:
    """The architecture that the fields of a config.json describe; `path` names them in errors.

    Raises:
        InputError: see `read_llama_config`; InputErrors: for several reasons
    """
    _check_only(path, fields, "model_type")  # of another model nothing else can be said
    refusals = Refusals()
    for name in ONLY:
        with refusals.noted():
            _check_only(path, fields, name)
    for name in [name for name, value in fields.items() if not _is_known(name, value)][:MOST_NAMED]:
        refusals.add(_unknown(path, name, fields[name]))
    llama: LlamaConfig = partly(
        LlamaConfig,
        refusals,
        num_hidden_layers=lambda: _count(path, fields, "num_hidden_layers"),
        hidden_size=lambda: _count(path, fields, "hidden_size"),
        intermediate_size=lambda: _count(path, fields, "intermediate_size"),
        num_attention_heads=lambda: _count(path, fields, "num_attention_heads"),
        num_key_value_heads=lambda: _groups(path, fields),
        head_dim=lambda: _head_dim(path, fields),
        vocab_size=lambda: _count(path, fields, "vocab_size"),
        max_position_embeddings=lambda: _count(path, {"max_position_embeddings": 2048} | fields, "max_position_embeddings"),
        rms_norm_eps=lambda: _positive(path, {"rms_norm_eps": 1e-6} | fields, "rms_norm_eps"),
        rope_theta=lambda: _rope(path, fields)[0],
        rope_scaling=lambda: _rope(path, fields)[1],
        tie_word_embeddings=lambda: _switch(path, fields, "tie_word_embeddings"),
        dtype=lambda: _dtype(path, fields),
        attention_bias=lambda: _switch(path, fields, "attention_bias"),
        mlp_bias=lambda: _switch(path, fields, "mlp_bias"),
    )
    refusals.raise_any()
    return llama


def hf_shapes(llama: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor a HF checkpoint of this architecture holds, with its shape, in transformers' order."""
    hidden, ffn = llama.hidden_size, llama.intermediate_size
    queries, keys = llama.num_attention_heads * llama.head_dim, llama.num_key_value_heads * llama.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (llama.vocab_size, hidden)}
    projections = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }
    for layer in range(llama.num_hidden_layers):
        below = f"model.layers.{layer}."
        for name, shape in projections.items():
            shapes[f"{below}{name}.weight"] = shape
            if llama.attention_bias if name.startswith("self_attn") else llama.mlp_bias:
                shapes[f"{below}{name}.bias"] = shape[:1]
        shapes |= {below + "input_layernorm.weight": (hidden,), below + "post_attention_layernorm.weight": (hidden,)}
    shapes["model.norm.weight"] = (hidden,)
    if not llama.tie_word_embeddings:
        shapes["lm_head.weight"] = (llama.vocab_size, hidden)
    return shapes


def check_shape(where: str, name: str, found: Sequence[int], wanted: Sequence[int]) -> None:
    """Raise InputError for a tensor of another shape than config.json says."""
    if tuple(found) != tuple(wanted):
        raise InputError(f"{where}: tensor {name} has shape {list(found)}; config.json asks for {list(wanted)}")


def _check_only(path: str, fields: Mapping[str, Any], name: str) -> None:
    if fields.get(name, ONLY[name]) != ONLY[name]:
        raise InputError(f"{path}: {name} is {brief(fields[name])}; supported is {ONLY[name]!r}")


def _groups(path: str, fields: Mapping[str, Any]) -> int:
    """Heads of keys and values."""
    heads = _count(path, fields, "num_attention_heads")
    groups = _count(path, fields, "num_key_value_heads", heads)
    if heads % groups:
        raise InputError(f"{path}: num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}")
    return groups


def _head_dim(path: str, fields: Mapping[str, Any]) -> int:
    if fields.get("head_dim") is not None:
        return _count(path, fields, "head_dim")
    return _count(
        path, fields, "head_dim", _count(path, fields, "hidden_size") // _count(path, fields, "num_attention_heads")
    )


def _dtype(path: str, fields: Mapping[str, Any]) -> str:
    dtype = fields.get("dtype") or fields.get("torch_dtype") or "float32"
    if dtype not in DTYPES:
        raise InputError(f"{path}: dtype is {brief(dtype)}; expected float32, bfloat16 or float16")
    return str(dtype)


def _count(path: str, fields: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """A whole number above 0; `default` where there is none, or null."""
    value = default if fields.get(name) is None else fields[name]
    most = MOST_LAYERS if name == "num_hidden_layers" else MOST
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{path}: {name} is {brief(fields.get(name))}; expected a whole number above 0")
    if value > most:
        raise InputError(f"{path}: {name} is {brief(value)}; expected at most {most}")
    return value


def check_size(path: str, name: str, value: Any) -> None:
    """Raise InputError for a number of a config.json that no model has: lists as long as that would be made of it."""
    most = MOST_LAYERS if name == "num_hidden_layers" else MOST
    if isinstance(value, int | float) and not -most <= value <= most:
        raise InputError(f"{path}: {name} is {brief(value)}; expected at most {most}")


def _positive(path: str, fields: Mapping[str, Any], name: str) -> float:
    """A number above 0."""
    value = fields.get(name)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value <= MOST_FLOAT:
        raise InputError(f"{path}: {name} is {brief(value)}; expected a number above 0, at most {MOST_FLOAT:g}")
    return value


def _switch(path: str, fields: Mapping[str, Any], name: str) -> bool:
    """True or false; false where there is none."""
    value = fields.get(name, False)
    if not isinstance(value, bool):
        raise InputError(f"{path}: {name} is {brief(value)}; expected true or false")
    return value


def _is_known(name: str, value: Any) -> bool:
    """Whether a field changes nothing in the computation, or in a way that we know."""
    if name == "quantization_config":
        return value is None
    if name == "architectures":
        return not value or value == ["LlamaForCausalLM"]
    off = value is None or value is False or value in ({}, [])
    return off or name in KNOWN or name in ONLY or name.startswith("_") or name.endswith("_token_id")


def _unknown(path: str, name: str, value: Any) -> InputError:
    if name == "quantization_config":
        return InputError(f"{path}: the weights are quantized (quantization_config); use the model in bf16, fp16 or fp32")
    if name == "architectures":
        return InputError(f"{path}: architectures is {brief(value)}; supported is ['LlamaForCausalLM']")
    unknown = f"{name} is {brief(value)}, a field that is not known here"
    return InputError(f"{path}: {unknown}; remove it if the model computes the same without it")


def _read_json(path: str) -> dict[str, Any]:
    fields = load_json(path, "model configuration")
    if not isinstance(fields, dict):
        raise InputError(f"model configuration {path} must be a JSON object, found {type(fields).__name__}")
    return fields


def _rope(path: str, fields: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """Rotary base and scaling; transformers 5 keeps both in rope_parameters, earlier ones in two fields."""
    given = {name: _rope_of(path, name, fields) for name in ("rope_parameters", "rope_scaling") if fields.get(name)}
    if not given:
        return _rope_of(path, "rope_parameters", fields | {"rope_parameters": {}})
    first, *others = given.values()
    if any(other != first for other in others):
        raise InputError(f"{path}: {' and '.join(given)} are both there and say different things; keep the one that is true")
    return first


def _rope_of(path: str, name: str, fields: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """What one of the two fields says."""
    scaling = fields[name]
    if not isinstance(scaling, dict):
        raise InputError(f"{path}: {name} is {brief(scaling)}; expected an object such as {{'rope_type': 'default'}}")
    if scaling.get("partial_rotary_factor", 1.0) != 1.0:
        raise InputError(
            f"{path}: {name}: partial_rotary_factor is {brief(scaling['partial_rotary_factor'])}; supported is 1.0"
        )
    place, theta = (f"{path}: {name}", scaling) if scaling.get("rope_theta") is not None else (path, fields)
    base = float(_positive(place, theta, "rope_theta")) if theta.get("rope_theta") is not None else 10000.0
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return base, None
    if kind != "llama3":
        raise InputError(f"{path}: rope_type is {brief(kind)}; supported are 'default' and 'llama3'")
    names = ("factor", "low_freq_factor", "high_freq_factor")
    missing = [name for name in (*names, "original_max_position_embeddings") if name not in scaling]
    if missing:
        raise InputError(f"{path}: rope scaling 'llama3' has no {missing[0]}")
    factors = {name: _positive(path, scaling, name) for name in names}
    length = _count(path, scaling, "original_max_position_embeddings")
    return base, RopeScaling(**factors, original_max_position_embeddings=length)
