"""What FSDP asks for beyond accelerate and TRL: who reads the weights, where DPO's reference lives, sums in fp32."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import torch
from accelerate import Accelerator, PartialState, init_empty_weights
from accelerate.utils import DistributedType
from accelerate.utils.environment import parse_flag_from_env
from accelerate.utils.fsdp_utils import fsdp2_prepare_model

from megatron_cpt.posttrain.settings import LoraSettings
from megatron_cpt.utils.errors import InputError


def is_sharded() -> bool:
    """Whether accelerate shards models with FSDP. It does so on accelerators only, whatever its configuration says."""
    on_accelerators = PartialState().distributed_type not in (DistributedType.NO, DistributedType.MULTI_CPU)
    return on_accelerators and parse_flag_from_env("ACCELERATE_USE_FSDP")


def recomputes() -> bool:
    """Whether FSDP computes activations again by itself."""
    return is_sharded() and parse_flag_from_env("FSDP_ACTIVATION_CHECKPOINTING")


def check_sharding(lora: LoraSettings | None) -> None:
    """Raise InputError unless a run can be sharded as accelerate's configuration says."""
    version = os.environ.get("FSDP_VERSION", "1")
    if is_sharded() and version != "2":
        raise InputError(f"accelerate's fsdp_version is {version}; expected 2")
    if recomputes() and lora is not None and lora.dropout > 0:
        # Its second forward pass draws other random numbers
        wanted = "0, or fsdp_activation_checkpointing: false with training.gradient_checkpointing"
        raise InputError(
            f"lora.dropout is {lora.dropout} with accelerate's fsdp_activation_checkpointing; expected {wanted}"
        )


def receives_weights() -> bool:
    """Whether this process gets its part of the weights from the first one, so that it need not read them."""
    efficient = parse_flag_from_env("FSDP_CPU_RAM_EFFICIENT_LOADING")
    return is_sharded() and efficient and not PartialState().is_main_process


def unread_model(folder: str) -> Any:
    """The model in fp32 with memory for its weights that nothing is written to, so that the system need not provide it."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    config = AutoConfig.from_pretrained(folder, attn_implementation="sdpa", trust_remote_code=False)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    # On the CPU, not on the meta device: accelerate tells parameters apart by their addresses
    model._apply(lambda tensor: torch.empty_like(tensor, device="cpu") if tensor.is_meta else tensor)
    model.tie_weights()
    if os.path.exists(os.path.join(folder, "generation_config.json")):
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def shard(model: Any, mixed_precision: str) -> Any:
    """A model that is not trained, sharded layer by layer."""
    return fsdp2_prepare_model(Accelerator(mixed_precision=mixed_precision), model)


def sum_in_fp32(accelerator: Accelerator) -> None:
    """Gradients of all processes; accelerate would add them up in the precision of the forward pass."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = dataclasses.replace(plugin.mixed_precision_policy, reduce_dtype=torch.float32)
