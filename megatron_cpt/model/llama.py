"""The Llama architecture, read from the config.json of a Hugging Face folder."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from typing import Any

from megatron_cpt.errors import InputError


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
        InputError: see `read_llama_config`
    """
    for name, value in ONLY.items():
        if fields.get(name, value) != value:
            raise InputError(f"{path}: {name} is {fields[name]!r}; supported is {value!r}")
    _check_known(path, fields)
    for name in ("attention_bias", "mlp_bias"):
        if not isinstance(fields.get(name, False), bool):
            raise InputError(f"{path}: {name} is {fields[name]!r}; use true or false")
    for name in ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size"):
        if not isinstance(fields.get(name), int) or fields[name] < 1:
            raise InputError(f"{path}: {name} is {fields.get(name)!r}; use a whole number above 0")
    heads = fields["num_attention_heads"]
    groups = fields.get("num_key_value_heads") or heads
    if heads % groups:
        raise InputError(f"{path}: num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}")
    rope_theta, rope_scaling = _rope(path, fields)
    return LlamaConfig(
        num_hidden_layers=fields["num_hidden_layers"],
        hidden_size=fields["hidden_size"],
        intermediate_size=fields["intermediate_size"],
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=fields.get("head_dim") or fields["hidden_size"] // heads,
        vocab_size=fields["vocab_size"],
        max_position_embeddings=fields.get("max_position_embeddings", 2048),
        rms_norm_eps=fields.get("rms_norm_eps", 1e-6),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        tie_word_embeddings=fields.get("tie_word_embeddings", False),
        dtype=fields.get("dtype") or fields.get("torch_dtype") or "float32",
        attention_bias=fields.get("attention_bias", False),
        mlp_bias=fields.get("mlp_bias", False),
    )


def _check_known(path: str, fields: dict[str, Any]) -> None:
    """Raise InputError for a field that may change the computation in a way that we do not know."""
    if "quantization_config" in fields:
        raise InputError(f"{path}: the weights are quantized (quantization_config); use the model in bf16, fp16 or fp32")
    architectures = fields.get("architectures") or ["LlamaForCausalLM"]
    if architectures != ["LlamaForCausalLM"]:
        raise InputError(f"{path}: architectures is {architectures}; supported is ['LlamaForCausalLM']")
    for name, value in fields.items():
        harmless = name in KNOWN or name in ONLY or name.startswith("_") or name.endswith("_token_id")
        if not harmless and value is not None and value is not False:
            unknown = f"{name} is {value!r}, a field that is not known here"
            raise InputError(f"{path}: {unknown}; remove it if the model computes the same without it")


def _read_json(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            fields = json.load(file)
    except OSError as error:
        raise InputError(f"model configuration {path}: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"model configuration {path} is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise InputError(f"model configuration {path} must be a JSON object, found {type(fields).__name__}")
    return fields


def _rope(path: str, fields: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """Rotary base and scaling; transformers 5 keeps both in rope_parameters, earlier ones in two fields."""
    scaling = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    theta = float(scaling.get("rope_theta") or fields.get("rope_theta") or 10000.0)
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise InputError(f"{path}: rope_type is {kind!r}; supported are 'default' and 'llama3'")
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    missing = [name for name in names if name not in scaling]
    if missing:
        raise InputError(f"{path}: rope scaling 'llama3' has no {missing[0]}")
    return theta, RopeScaling(**{name: scaling[name] for name in names})
