"""Bits per byte of held-out text: a loss that can be compared across tokenizers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_cpt.utils.errors import InputError


@dataclass(frozen=True)
class TextLoss:
    """Of some documents.

    Attributes:
        loss: mean over the tokens, nats
        bits_per_byte: of the UTF-8 text
    """

    loss: float
    bits_per_byte: float
    tokens: int
    bytes: int


@torch.inference_mode()
def text_loss(model: Any, tokenizer: Any, documents: Sequence[str], window: int) -> TextLoss:
    """Every document by itself, in windows of so many tokens one after the other.

    Each window begins with the beginning-of-text token (or end-of-text, where there is none), so that every token of the
    text is predicted, and none sees the window before it.

    Raises:
        InputError: there is no text, or the tokenizer has no token to begin with
    """
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if begin is None:
        raise InputError(f"the tokenizer {tokenizer.name_or_path} has no token to begin a text with")
    total = torch.zeros((), dtype=torch.float64)
    tokens = size = 0
    for document in documents:
        ids = tokenizer.encode(document, add_special_tokens=False)
        for start in range(0, len(ids), window - 1):
            part = ids[start : start + window - 1]
            inputs = torch.tensor([[begin, *part]], device=model.device)
            logits = model(input_ids=inputs).logits[0, :-1].float()
            total += torch.nn.functional.cross_entropy(logits, inputs[0, 1:], reduction="sum").double().cpu()
        tokens += len(ids)
        size += len(document.encode())
    if not tokens:
        raise InputError("there is no text to measure bits per byte on")
    return TextLoss(total.item() / tokens, total.item() / math.log(2) / size, tokens, size)
