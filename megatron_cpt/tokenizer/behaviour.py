"""What a tokenizer does, whatever its files say: the ids of some texts, and a fingerprint of them."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Callable, Sequence
from typing import Protocol

import orjson

PROBES = (
    "The quick brown fox doesn't jump; we'll see, I'M SURE.",
    " leading and  double   spaces, and trailing ",
    "650841823 1,234,567.89 2024-07-01 3/4 १२३ ٣٤٥ 1st",
    "今天天气很好，我们去公园散步。繁體字與標點！２０２４年",
    "日本語とかな 한국어 문장 ไทย हिन्दी العربية עברית Русский Ελληνικά Tiếng Việt",
    "cafe\u0301 naïve Straße ﬁ İıſ ½ ⅷ ｆｕｌｌ　ｗｉｄｔｈ \u00a0\u200b\ufeff\u2028",
    "👨‍👩‍👧‍👦 🇨🇳 🦊 ♥ \U0010fffd",
    "def f(x):\n\tif x != 0:\n        return {'a': [x**2, -1e-5]}  # comment\r\n\n\n",
    '<div class="a">https://example.org/?q=%20&x=1#frag</div> user@example.org snake_case camelCase',
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|><|end_of_text|>",
    "<|im_start|>assistant\nhi<|im_end|>\n<|endoftext|> <s>[INST] hi [/INST]</s> <unk> <0x0A> ▁",
    "\t\t\n\n   \n \r",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaa哈哈哈哈哈哈哈哈====================\u0001\u007f",
)
"""What tokenizers are known to split in different ways: numbers, spaces, scripts, code, emoji, texts of special tokens."""
MOST_ADDED_TOKENS = 2000
"""Of a tokenizer's own added tokens, the first so many are probed as well."""


class Encodes(Protocol):
    """The part of a tokenizer that is looked at."""

    def encode(self, text: str) -> list[int]:
        """Ids of one text; the text of special tokens is text."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids."""

    def added_tokens(self) -> Sequence[str]:
        """Texts that are one token by themselves wherever they stand, in the order of their ids; no special ones."""


def probes(tokenizer: Encodes) -> list[str]:
    """Texts that tell two tokenizers apart: `PROBES`, and each added token within a sentence."""
    own = (f"go to{token}now, 去{token}了 {token}" for token in tokenizer.added_tokens()[:MOST_ADDED_TOKENS])
    return [*PROBES, *own]


def behaviour_sha256(tokenizer: Encodes) -> str:
    """Digest of the ids of all probes: equal for one tokenizer in several formats, another for what splits otherwise."""
    return hashlib.sha256(orjson.dumps([tokenizer.encode(text) for text in probes(tokenizer)])).hexdigest()


def first_encoding_difference(
    tokenizer: Encodes, encode: Callable[[str], Sequence[int]]
) -> tuple[str, list[int], list[int]] | None:
    """(text, the ids of `tokenizer`, those of `encode`) where the two differ, from the first such id on; None: nowhere."""
    for text in probes(tokenizer):
        ids, others = list(tokenizer.encode(text)), list(encode(text))
        if ids != others:
            start = next(
                (i for i, (a, b) in enumerate(zip(ids, others, strict=False)) if a != b), min(len(ids), len(others))
            )
            return text, ids[start : start + 6], others[start : start + 6]
    return None


LETTERS = "aéжαעعहไ中の한🦊"
"""One letter of each of the commonest scripts."""


def lost_letters(tokenizer: Encodes) -> str:
    """Those of `LETTERS` that do not come back: a tokenizer that drops them, or has one token for all it does not know."""
    return "".join(c for c in LETTERS if c not in unicodedata.normalize("NFC", tokenizer.decode(tokenizer.encode(c))))
