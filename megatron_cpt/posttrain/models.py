"""The model that SFT and DPO begin with."""

from __future__ import annotations

import logging
import math
import os
import re
from typing import Any

import torch

from megatron_cpt.checkpoint.damage import reading_hf_model
from megatron_cpt.checkpoint.hf_model import load_hf_model
from megatron_cpt.model.dtypes import dtype_of
from megatron_cpt.model.hf_folder import adapter_note, check_config_sizes, positions_of
from megatron_cpt.posttrain.data import Prepared
from megatron_cpt.posttrain.settings import LoraSettings
from megatron_cpt.posttrain.sharding import receives_weights, unread_model
from megatron_cpt.posttrain.templates import Template
from megatron_cpt.posttrain.turn_end import turn_end
from megatron_cpt.utils.errors import InputError
from megatron_cpt.utils.input_files import load_json

logger = logging.getLogger(__name__)

GENERATION = "generation_config.json"
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")


def load_trainable_model(folder: str) -> Any:
    """transformers' model in fp32, as the weights that are trained have to be.

    Where FSDP hands them on, only the first process reads them: all of them may be too many for a node's memory.

    Raises:
        InputError: it cannot be read
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    if receives_weights():
        with reading_hf_model(f"model {folder}", folder):
            return unread_model(folder)
    return load_hf_model(folder, dtype=torch.float32, attn_implementation="sdpa")


def config_of(folder: str) -> dict[str, Any]:
    """The fields of config.json.

    Raises:
        InputError: it is no JSON object
    """
    path = os.path.join(folder, "config.json")
    fields = load_json(path)
    check_config_sizes(path, fields)
    return dict(fields)


def check_fit(folder: str, prepared: Prepared[Any]) -> None:
    """Raise InputError if the model has no row for a token of the data, or no position: it would fail at some step."""
    fields, positions = config_of(folder), positions_of(folder)
    for example in [*prepared.train, *(item for items in prepared.validation.values() for item in items)]:
        for ids in example.sequences():
            if max(ids) >= fields.get("vocab_size", math.inf):
                found = f"a token {max(ids)}, and the model's vocab_size is {fields['vocab_size']}"
                raise InputError(f"the tokenizer of {folder} has {found}; expected a model with a row for each")
            if len(ids) > positions:
                found = f"an example has {len(ids)} tokens, and the model {positions:.0f} positions"
                raise InputError(f"data.max_length is too much for {folder}: {found}")


def saved_dtype(folder: str) -> torch.dtype:
    """Of the weights in a HF folder, as its config.json says."""
    fields = config_of(folder)
    return dtype_of(fields.get("dtype") or fields.get("torch_dtype") or "float32")


def mend_generation(folder: str, model: Any) -> str | None:
    """Make the generation settings ones that transformers writes: some that it reads, it refuses to write once they change.

    Llama-2-chat and Vicuna have a temperature and no do_sample: their makers sample, so do_sample becomes true. Where it is
    false, what only sampling uses is left out. Returns what to tell people, None: nothing was wrong.

    Raises:
        InputError: generation_config.json has something that transformers would not write
    """
    path = os.path.join(folder, GENERATION)
    settings, before = model.generation_config, dict(vars(model.generation_config))
    if problem_of(settings) is None:
        return None
    if settings.do_sample is None:
        settings.do_sample = True
    elif not settings.do_sample:
        for name in SAMPLING:
            setattr(settings, name, None)
    if (problem := problem_of(settings)) is not None:
        raise InputError(f"{path}: {problem}; expected settings that transformers writes again")
    changed = [f"{name} {value}" for name, value in vars(settings).items() if before.get(name) != value]
    return f"{path} is one that transformers reads but does not write; the result has {', '.join(changed)}"


def problem_of(settings: Any) -> str | None:
    """Why transformers would not write generation settings."""
    try:
        settings.validate(strict=True)
    except ValueError as error:
        return " ".join(str(error).split())[:400]
    return None


def model_to_train(folder: str, template: Template, speaks: bool) -> Any:
    """The model in a folder, ready to be trained and written.

    Args:
        speaks: print what was found about the folder
    """
    model = load_trainable_model(folder)
    for note in (adapter_note(folder), mend_generation(folder, model)):
        if note is not None and speaks:
            logger.info(note)
    make_ready_to_answer(model, template)
    return model


def make_ready_to_answer(model: Any, template: Template) -> None:
    """A model that has learned to end its turns stops there when it generates.

    A tokenizer without a token to pad with gets one, which trainers want; what is padded does not count.
    """
    tokenizer = template.tokenizer
    model.generation_config.eos_token_id = list(turn_end(tokenizer, model.generation_config).token_ids)
    if tokenizer.pad_token is None:  # nor need it know an end of text: the template's end of a turn is always there
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(template.end_of_turn)
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
            raise InputError(f"lora.target_modules has {target}, and the model no such layer; expected names such as q_proj")
    return LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=settings.target_modules,
        task_type="CAUSAL_LM",
    )
