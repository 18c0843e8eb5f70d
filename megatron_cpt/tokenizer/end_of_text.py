"""Which token ends a document. Folders of chat models name the one that ends a turn, which is not what pre-training used."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_cpt.tokenizer.hf_files import json_object, named_token

END_OF_TURN = frozenset(
    {"<|eot_id|>", "<|eom_id|>", "<|eot|>", "<|eom|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>"}
    | {"<turn|>", "<|END_OF_TURN_TOKEN|>", "<|end_of_role|>", "<|user|>", "<|assistant|>", "<|assistant_end|>", "[/INST]"}
)
"""Names that models of the field gave to the end of a turn (Llama, ChatML, Phi, gpt-oss, Gemma, Command R, GLM, Mistral)."""
BEGIN_OF_TURN = frozenset({"<|im_start|>", "<|start_header_id|>", "<|start|>", "<start_of_turn>", "<|turn>", "[INST]"})
END_OF_TEXT = (
    "<|end_of_text|>",
    "<|endoftext|>",
    "<｜end▁of▁sentence｜>",
    "<eos>",
    "</s>",
    "<EOS_TOKEN>",
)
"""Names of the end of a text: Llama 3; GPT-2, Qwen, SmolLM; DeepSeek; Gemma; Llama 2, Mistral; Command R."""


@dataclass(frozen=True)
class EndOfTextChoice:
    """A token and, for people, why it is this one."""

    token: str
    reason: str


def end_of_text(folder: Path, specials: Mapping[str, int]) -> EndOfTextChoice | None:
    """The token that ends documents, by the files in `folder`; None: they name none.

    Args:
        folder: with tokenizer.json and, where there are, tokenizer_config.json, generation_config.json and config.json
        specials: the special tokens of tokenizer.json and their ids
    """
    configured = named_token(folder, "eos_token")
    if configured is not None and configured[0] not in END_OF_TURN:
        return EndOfTextChoice(configured[0], f"the eos_token of {configured[1]}")
    listed = _listed(folder, {number: token for token, number in specials.items()}.get)
    turn = f"; {configured[0]}, the eos_token of {configured[1]}, ends turns of a chat" if configured else ""
    for token, file in listed.items():
        if token in END_OF_TEXT or (configured is None and token not in END_OF_TURN):
            return EndOfTextChoice(token, f"an eos_token_id of {file}{turn}")
    if configured is None:
        return None
    for token in END_OF_TEXT:
        if token in specials:
            return EndOfTextChoice(token, f"the end of text among the special tokens{turn}")
    return EndOfTextChoice(configured[0], f"the eos_token of {configured[1]}, which ends turns of a chat; no other is known")


def begin_of_text(folder: Path) -> str | None:
    """The token that begins texts, as the files in `folder` name it; None also where it begins turns of a chat."""
    configured = named_token(folder, "bos_token")
    return None if configured is None or configured[0] in BEGIN_OF_TURN else configured[0]


def _listed(folder: Path, name_of: Callable[[int], str | None]) -> dict[str, str]:
    """Special tokens whose ids generation_config.json, then config.json, have as `eos_token_id` -> name of the file."""
    found: dict[str, str] = {}
    for name in ("generation_config.json", "config.json"):
        file = folder / name
        ids = json_object(file).get("eos_token_id") if file.is_file() else None
        for number in ids if isinstance(ids, list) else [ids]:
            if isinstance(number, int) and (token := name_of(number)) is not None:
                found.setdefault(token, name)
    return found
