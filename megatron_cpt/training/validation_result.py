"""What validation finds."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class ValidationResult:
    """One validation set at one moment.

    Attributes:
        loss: nats per token, over all targets that count
        bits_per_byte: bits per UTF-8 byte of text, over the targets that count and stand for text (not for
            end-of-document)
        tokens: number of targets that count
        text_bytes: UTF-8 bytes they stand for
    """

    name: str
    language: str
    loss: float
    bits_per_byte: float
    tokens: int
    text_bytes: int

    @property
    def perplexity(self) -> float:
        """Per token: compares only where the tokenizer is the same."""
        return math.exp(self.loss) if self.loss < 700 else math.inf
