"""What can be known of the files of a conversion before torch is imported, whatever is wrong with its settings."""

from __future__ import annotations

import os

from megatron_cpt.checkpoint.hf_tokenizer import read_folder
from megatron_cpt.checkpoint.layout import find_checkpoint, is_ours
from megatron_cpt.checkpoint.weight_files import weight_files
from megatron_cpt.config.require import Requirements, require
from megatron_cpt.convert.added_tokens import read_tokens
from megatron_cpt.convert.config import HfToMegatron, MegatronToHf, Verify
from megatron_cpt.convert.targets import check_hf_target, check_megatron_target
from megatron_cpt.model.llama import read_llama_config
from megatron_cpt.utils.errors import InputError, Refusals, RefusedValueError
from megatron_cpt.utils.input_files import why_unreadable


def check_hf_to_megatron(config: HfToMegatron) -> None:
    """Check the folders and files that a configuration names.

    Raises:
        InputError: something is wrong with one of them; InputErrors: with several
    """
    with Requirements() as need:
        with need.noted():
            check_hf_model(config.hf)
        with need.noted():
            check_megatron_target(config.megatron)
        with need.noted():
            if config.extend_tokenizer is not None:
                read_folder(config.extend_tokenizer)
        with need.noted():
            if config.added_tokens is not None:
                read_tokens(config.added_tokens)


def check_megatron_to_hf(config: MegatronToHf) -> None:
    """As `check_hf_to_megatron`."""
    with Requirements() as need:
        with need.noted():
            folder = find_checkpoint(config.megatron)
            if is_ours(folder):
                with need.noted():
                    read_llama_config(os.path.join(folder, "hf"))
                with need.noted():
                    check_ours(folder, config)
        with need.noted():
            check_hf_target(config.hf)
        with need.noted():
            if config.tokenizer is not None and not holds_ours(config):  # for those it is refused, whatever it is
                read_folder(config.tokenizer)


def holds_ours(config: MegatronToHf) -> bool:
    """Whether the checkpoint to convert is known to be of this software."""
    try:
        return is_ours(find_checkpoint(config.megatron))
    except (InputError, RefusedValueError):
        return False


def check_verify(config: Verify) -> None:
    """As `check_hf_to_megatron`."""
    with Requirements() as need:
        for name in ("a", "b"):
            with need.noted():
                check_checkpoint(getattr(config, name))
        with need.noted():
            if config.text is not None:
                why = why_unreadable(config.text)
                require(why is None, "text", config.text or "''", f"a file ({why})")


def check_checkpoint(path: str) -> None:
    """Raise InputError unless there is a HF folder, or a Megatron checkpoint."""
    if is_hf(path):
        check_hf_model(path)
        return
    folder = find_checkpoint(path)
    if is_ours(folder):
        read_llama_config(os.path.join(folder, "hf"))


def check_hf_model(folder: str) -> None:
    """Raise InputError unless a HF folder has a Llama model's configuration, and weights."""
    refusals = Refusals()
    with refusals.noted():
        read_llama_config(folder)
    with refusals.noted():
        if os.path.isdir(folder):
            weight_files(folder)
    refusals.raise_any()


def check_ours(folder: str, config: MegatronToHf) -> None:
    """Raise InputError for settings that are only for checkpoints of other software, in whose folders HF files lack."""
    refusals = Refusals()
    for name in ("tokenizer", "vocab_size"):
        with refusals.noted():
            if getattr(config, name) is not None:
                raise InputError(f"{name} is given but {folder} has its configuration and tokenizer in hf/; leave it out")
    refusals.raise_any()


def is_hf(path: str) -> bool:
    """Whether a folder is a HF folder, not one of Megatron checkpoints."""
    return os.path.exists(os.path.join(path, "config.json"))
