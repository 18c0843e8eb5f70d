"""The Llama configuration in checkpoints of Megatron-LM (`args` in common.pt) and Megatron-Bridge (run_config.yaml)."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_cpt.checkpoint.checkpoint_pickles import Opaque, load_settings
from megatron_cpt.checkpoint.common_state import find_common_state
from megatron_cpt.model.llama import MOST_FLOAT
from megatron_cpt.utils.errors import InputError, brief
from megatron_cpt.utils.input_files import load_yaml, plain_number

# megatron-core's rope scaling has one free number, the factor; these are fixed in it (rotary_pos_embedding.py)
ROPE_SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@dataclass(frozen=True)
class Names:
    """What the two call the same settings; `wanted` has those of which a Llama model has one value only."""

    norm_epsilon: str
    max_length: str
    rope_scaling: str
    wanted: Mapping[str, Any]


COMMON = {
    "apply_residual_connection_post_layernorm": False,
    "attention_output_gate": False,
    "activation_func_clamp_value": None,
    "attn_logit_softcapping": None,
    "experimental_attention_variant": None,
    "final_logit_softcapping": None,
    "glu_linear_offset": 0.0,
    "linear_attention_freq": None,
    "mrope_section": None,
    "no_rope_freq": None,
    "normalization": "RMSNorm",
    "position_embedding_type": "rope",
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "qk_l2_norm": False,
    "qk_layernorm": False,
    "softmax_scale": None,
    "softmax_type": "vanilla",
    "use_mup": False,
    "layernorm_zero_centered_gamma": False,
    "add_qkv_bias": False,
    "num_moe_experts": None,
    "multi_latent_attention": False,
    "window_size": None,
}
MEGATRON_LM = Names(
    "norm_epsilon",
    "max_position_embeddings",
    "use_rope_scaling",
    COMMON
    | {
        "apply_layernorm_1p": False,
        "hybrid_override_pattern": None,
        "num_experts": None,
        "openai_gelu": False,
        "rotary_seq_len_interpolation_factor": None,
        "squared_relu": False,
        "swiglu": True,
    },
)
BRIDGE = Names(
    "layernorm_epsilon",
    "seq_length",
    "rope_scaling",
    COMMON | {"gated_linear_unit": True, "seq_len_interpolation_factor": None},
)


def foreign_config(folder: str, vocab_size: int | None) -> dict[str, Any]:
    """config.json of the Llama model in a checkpoint of Megatron-LM or Megatron-Bridge.

    Args:
        vocab_size: of the tokenizer; None takes what the checkpoint says, which may count rows of padding

    Raises:
        InputError: the checkpoint does not describe its model, or it is no Llama model
    """
    bridge = os.path.join(folder, "run_config.yaml")
    if os.path.exists(bridge):
        return llama_fields(bridge, bridge_settings(bridge), BRIDGE, vocab_size)
    common, place = find_common_state(folder)
    args = load_settings(common, place).get("args")
    if args is None:
        places = f"hf/config.json, run_config.yaml and args in {os.path.basename(common)} are all missing"
        raise InputError(f"{folder} does not describe its model: {places}")
    if not isinstance(args, Namespace):
        raise InputError(f"{common}: args is a {type(args).__name__}; expected the namespace that Megatron-LM saves")
    return llama_fields(f"{common} (args)", dict(vars(args)), MEGATRON_LM, vocab_size)


def bridge_settings(path: str) -> dict[str, Any]:
    """The section `model`; objects that Megatron-Bridge would make (`_target_`) become their names."""
    try:
        model = load_yaml(path, plain=plain_number)["model"]
    except (InputError, KeyError) as error:
        raise InputError(f"{path} has no section 'model' that can be read: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(model, dict):
        raise InputError(f"{path}: model is {brief(model)}; expected a section with the settings of the model")
    return {
        name: value["_target_"] if isinstance(value, dict) and "_target_" in value else value
        for name, value in model.items()
    }


def llama_fields(path: str, found: Mapping[str, Any], names: Names, vocab_size: int | None) -> dict[str, Any]:
    """HF's fields of a Llama model."""
    for name, wanted in names.wanted.items():
        value = found.get(name, wanted)
        same = type(value) in (str, int, float, bool, type(None)) and value == wanted
        if not same and not (wanted in (None, False) and (value is None or value is False)):
            raise InputError(f"{path}: {name} is {brief(value)}; in a Llama model it is {wanted!r}")
    check_activation(path, found)

    def number(*keys: str) -> Any:
        for key in keys:
            value = found.get(key)
            if isinstance(value, int | float) and not isinstance(value, bool):
                if not 0 < value <= MOST_FLOAT:
                    raise InputError(f"{path}: {key} is {brief(value)}; expected a number above 0, at most {MOST_FLOAT:g}")
                return value
        raise InputError(f"{path} has no number as {' or '.join(keys)}")

    def whole(*keys: str) -> int:
        value = number(*keys)
        if int(value) != value:
            raise InputError(f"{path}: {' or '.join(keys)} is {brief(value)}; expected a whole number")
        return int(value)

    def switch(key: str, default: bool) -> bool:
        value = found.get(key)
        if value is not None and not (type(value) in (bool, int) and value in (0, 1)):
            raise InputError(f"{path}: {key} is {brief(value)}; expected true or false")
        return default if value is None else bool(value)

    heads, hidden = whole("num_attention_heads"), whole("hidden_size")
    grouped = switch("group_query_attention", True) and found.get("num_query_groups") is not None
    biases = switch("add_bias_linear", True)
    theta = float(number("rotary_base"))
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if switch(names.rope_scaling, False):
        default = found.get("rope_scaling_factor") is None
        factor = 8.0 if default else float(number("rope_scaling_factor"))  # megatron-core's default
        rope = {"rope_type": "llama3", "rope_theta": theta, "factor": factor, **ROPE_SCALING}
    shared = switch("share_embeddings_and_output_weights", True)
    tied = not switch("untie_embeddings_and_output_weights", not shared)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": vocab_size or whole("vocab_size", "padded_vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": whole("ffn_hidden_size"),
        "num_hidden_layers": whole("num_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": whole("num_query_groups") if grouped else heads,
        "head_dim": hidden // heads if found.get("kv_channels") is None else whole("kv_channels"),
        "max_position_embeddings": whole(names.max_length, "seq_length"),
        "rms_norm_eps": number(names.norm_epsilon, "layernorm_epsilon", "norm_epsilon"),
        "rope_parameters": rope,
        "tie_word_embeddings": tied,
        "attention_bias": biases,
        "mlp_bias": biases,
    }


def check_activation(path: str, found: Mapping[str, Any]) -> None:
    """InputError unless the gate's activation is SiLU, where the checkpoint says it."""
    activation = found.get("activation_func")
    if activation is not None and not isinstance(activation, Opaque) and "silu" not in brief(activation):
        raise InputError(f"{path}: activation_func is {brief(activation)}; in a Llama model it is silu")
