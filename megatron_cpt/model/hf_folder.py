"""What has to be in the folder of a Hugging Face model before anything reads its weights. Imports no torch."""

from __future__ import annotations

import math
import os
import re
from typing import Any

from megatron_cpt.config.require import require
from megatron_cpt.model.llama import check_size
from megatron_cpt.utils.errors import InputError, Refusals, if_on_the_hub
from megatron_cpt.utils.input_files import check_folder, load_json, shown

POSITIONS = "max_position_embeddings"
OTHER_POSITIONS = ("n_positions", "max_seq_len", "context_length")  # names that transformers takes for it, as GPT-2's
NEW_TOKENS = 512  # of an answer, where nobody says how many and the model has the room
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILES = (ADAPTER_CONFIG, "adapter_model.safetensors", "adapter_model.bin")
# The JSON files that transformers reads in a model's folder; what else lies there, broken or not, is nobody's matter
READ_BY_TRANSFORMERS = re.compile(
    r"((generation_|tokenizer_|adapter_|(\w+_)?processor_|(\w+_)?preprocessor_)?config|special_tokens_map|added_tokens"
    r"|chat_template|tokenizer(\..+)?|tekken|(\w+_)?vocab(-\w+)?|(model|pytorch_model)\.(safetensors|bin)\.index)\.json"
)


def check_model(model: str, field: str = "model") -> None:
    """Raise InputError unless a folder holds a Hugging Face model with weights that no adapter has to be applied to.

    `field`: of the configuration, which names the folder.
    """
    if os.path.isdir(model):
        can_read = os.access(model, os.R_OK | os.X_OK)
        require(can_read, field, model, "a Hugging Face folder that you may enter and read (Permission denied)")
        check_folder(model)
    adapter_note(model)
    if not model or not os.path.exists(os.path.join(model, "config.json")):
        wanted = "a Hugging Face folder, such as convert_checkpoint.py megatron-to-hf writes"
        advice = "" if os.path.exists(model) else if_on_the_hub(model)
        found = model or "''"
        raise InputError(f"{field} is {found}, which has no config.json; expected {wanted}{advice}")
    refusals = Refusals()
    for name in sorted(os.listdir(model)):
        with refusals.noted():
            if READ_BY_TRANSFORMERS.fullmatch(name):  # without limits
                fields = load_json(os.path.join(model, name))
                if name == "config.json":
                    check_config_sizes(os.path.join(model, name), fields)
    refusals.raise_any()


def can_look_into(model: str) -> bool:
    """Whether a folder may be entered, and has a config.json; where not, `check_model` says all there is to say."""
    return os.access(model, os.R_OK | os.X_OK) and os.path.isfile(os.path.join(model, "config.json"))


def positions_of(model: str) -> float:
    """How many tokens a model can read at once, by its config.json; infinity where that does not say it.

    Raises:
        InputError: it is no number of tokens
    """
    path = os.path.join(model, "config.json")
    fields = load_json(path) if os.path.exists(path) else None
    if not isinstance(fields, dict):
        return math.inf
    others = (fields[name] for name in OTHER_POSITIONS if type(fields.get(name)) is int and fields[name] > 0)
    positions = fields[POSITIONS] if POSITIONS in fields else next(others, math.inf)
    if positions != math.inf and (not isinstance(positions, int) or isinstance(positions, bool) or positions < 1):
        raise InputError(f"{path}: {POSITIONS} is {shown(positions)}; expected a whole number, 1 or more")
    return float(positions)


def positions_of_config(config: Any) -> float:
    """`positions_of` a model that transformers has read; infinity where its kind has no such limit."""
    positions = getattr(config, POSITIONS, None)
    return math.inf if positions is None else float(positions)


def most_new_tokens(positions: float) -> int:
    """Tokens of an answer where nobody says how many: a model of few positions has half of them for what is asked."""
    return int(min(NEW_TOKENS, max(positions // 2, 1)))


def check_answer_fits(model: str, positions: float, prompt: str, tokens: int, max_new_tokens: int) -> None:
    """Raise InputError where a prompt of so many tokens leaves an answer too few positions."""
    if tokens + max_new_tokens > positions:
        found = f"prompt {prompt[:40]!r} has {tokens} tokens, and max_new_tokens is {max_new_tokens}"
        raise InputError(f"{found}; expected at most {positions:.0f} together, the positions of {model}")


def check_positions(model: str, max_new_tokens: int, positions: float | None = None) -> None:
    """Raise InputError where an answer may leave a prompt no position of a model.

    `positions`: None: as its config.json says, if that can be read.
    """
    positions = positions_of(model) if positions is None else positions
    if max_new_tokens >= positions:
        raise InputError(f"max_new_tokens is {max_new_tokens}; expected less than {positions:.0f}, the positions of {model}")


def check_config_sizes(path: str, fields: Any) -> None:
    """Raise InputError unless the value of a config.json is an object without numbers that are too large for any model."""
    if not isinstance(fields, dict):
        raise InputError(f"{path} is {shown(fields)}; expected a JSON object")
    for name, value in fields.items():
        check_size(path, name, value)


def adapter_note(folder: str) -> str | None:
    """What to tell people of a PEFT adapter in a model's folder: None where there is none.

    transformers applies an adapter that lies beside whole weights. Where these name another model as their base, they are
    what merging left, and have to be read with `WITHOUT_ADAPTERS` (checkpoint/hf_files.py).

    Raises:
        InputError: the folder holds an adapter and no weights, or the weights that the adapter is meant for
    """
    path = os.path.join(folder, ADAPTER_CONFIG)
    if not os.path.exists(path):
        return None
    fields = load_json(path)
    if not isinstance(fields, dict) or "base_model_name_or_path" not in fields:
        raise InputError(f"{path} names no base_model_name_or_path; expected PEFT's configuration, or no such file")
    base = fields["base_model_name_or_path"]
    merge = "a folder of merged weights (PEFT's merge_and_unload)"
    if not any(name.endswith((".safetensors", ".bin")) for name in os.listdir(folder) if name not in ADAPTER_FILES):
        raise InputError(f"{folder} holds an adapter of {base} and no weights of its own; expected {merge}")
    if isinstance(base, str) and base.isprintable() and os.path.realpath(base) == os.path.realpath(folder):
        expected = f"{merge}, or no {ADAPTER_CONFIG}"
        raise InputError(
            f"{path}: base_model_name_or_path is {base}, so that the weights beside it lack it; expected {expected}"
        )
    return f"{folder}: its weights are used as they are; {ADAPTER_CONFIG} beside them (of {base}) is not applied again"
