"""The model that SFT and DPO begin with."""

from __future__ import annotations

import json
import math
import os
import re
from typing import Any

import torch

from megatron_cpt.chat_data.templates import Template
from megatron_cpt.chat_data.turn_end import turn_end
from megatron_cpt.checkpoint.hf_files import WITHOUT_ADAPTERS
from megatron_cpt.checkpoint.save_load import dtype_of
from megatron_cpt.errors import InputError
from megatron_cpt.posttrain.data import Prepared
from megatron_cpt.posttrain.settings import LoraSettings
from megatron_cpt.posttrain.sharding import receives_weights, unread_model


def load_model(folder: str) -> Any:
    """transformers' model in fp32, as the weights that are trained have to be.

    Where FSDP hands them on, only the first process reads them: all of them may be too many for a node's memory.

    Raises:
        InputError: it cannot be read
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    try:
        if receives_weights():
            return unread_model(folder)
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa", trust_remote_code=False, **WITHOUT_ADAPTERS
        )
    except Exception as error:  # it raises what it likes for files that are damaged, or another library's
        raise InputError(f"model {folder} cannot be read: {' '.join(str(error).split())[:300]}") from error


def config_of(folder: str) -> dict[str, Any]:
    """The fields of config.json.

    Raises:
        InputError: it is no JSON object
    """
    path = os.path.join(folder, "config.json")
    with open(path, encoding="utf-8") as file:
        try:
            return dict(json.load(file))
        except (ValueError, TypeError) as error:
            raise InputError(f"{path} is damaged: {error}; wanted a JSON object") from error


def check_fit(folder: str, prepared: Prepared[Any]) -> None:
    """Raise InputError if the model has no row for a token of the data, or no position: it would fail at some step."""
    fields = config_of(folder)
    for example in [*prepared.train, *(item for items in prepared.validation.values() for item in items)]:
        for ids in example.sequences():
            if max(ids) >= fields.get("vocab_size", math.inf):
                found = f"a token {max(ids)}, and the model's vocab_size is {fields['vocab_size']}"
                raise InputError(f"the tokenizer of {folder} has {found}; wanted a model with a row for each")
            if len(ids) > fields.get("max_position_embeddings", math.inf):
                found = f"an example has {len(ids)} tokens, and the model {fields['max_position_embeddings']} positions"
                raise InputError(f"data.max_length is too much for {folder}: {found}")


def saved_dtype(folder: str) -> torch.dtype:
    """Of the weights in a HF folder, as its config.json says."""
    fields = config_of(folder)
    return dtype_of(fields.get("dtype") or fields.get("torch_dtype") or "float32")


def make_ready_to_answer(model: Any, template: Template) -> None:
    """A model that has learned to end its turns stops there when it generates."""
    model.generation_config.eos_token_id = list(turn_end(template.tokenizer, model.generation_config).token_ids)
    if template.tokenizer.pad_token is None:
        template.tokenizer.pad_token = template.tokenizer.eos_token
    model.config.use_cache = True


def lora(settings: LoraSettings | None, model: Any) -> Any:
    """PEFT's configuration, None: all weights are trained.

    Raises:
        InputError: no layer of the model has one of the names; PEFT is content with one that there is
    """
    if settings is None:
        return None
    from peft import LoraConfig

    layers = [name for name, _ in model.named_modules()]
    targets = settings.target_modules
    for target in [targets] if isinstance(targets, str) else targets:
        pattern = target if isinstance(targets, str) else rf"(.*\.)?{re.escape(target)}"  # as PEFT reads them
        if target != "all-linear" and not any(re.fullmatch(pattern, name) for name in layers):
            raise InputError(f"lora.target_modules has {target}, and the model no such layer; use names such as q_proj")
    return LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=settings.target_modules,
        task_type="CAUSAL_LM",
    )
