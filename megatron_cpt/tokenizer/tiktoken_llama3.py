"""Llama-3's own `tokenizer.model`: tiktoken ranks, to which its reader adds a regex and special tokens."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_cpt.tokenizer.base import SETTING, display_name, fingerprint, unknown_token
from megatron_cpt.utils.errors import InputError

SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Llama-3 splits text into words before merging bytes: a property of the model, fixed with its weights."""

NUM_SPECIAL_TOKENS = 256

NAMED_SPECIALS = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    9: "<|eot_id|>",
}
"""Place after the last rank -> name, as in Meta-Llama-3; the others are `<|reserved_special_token_N|>`."""

LLAMA_3_1_SPECIALS = {"<|finetune_right_pad_id|>": 4, "<|eom_id|>": 8, "<|python_tag|>": 10}
"""Reserved places that Llama-3.1 gave a name; accepted as `eos_token`."""

# tiktoken's regex engine overflows its stack near a million characters of unbroken whitespace.
LONGEST_WHITESPACE = 400_000
_LONG_WHITESPACE = re.compile(r"\s{1000,%d}" % LONGEST_WHITESPACE)  # noqa: UP031 (the braces belong to the regex)


class Llama3Tokenizer:
    """tiktoken ranks (128,000 in Llama-3) followed by 256 special tokens; ids equal those of Llama-3's HF tokenizer.

    Runs of more than 400,000 whitespace characters are encoded in parts of that length.
    """

    def __init__(self, path: Path, eos_token: str | None = None) -> None:
        """InputError for a file that is not ranks 0, 1, 2, ... or an unknown eos token."""
        import tiktoken

        content = path.read_bytes()
        ranks = read_ranks(path, content)
        specials = {name: len(ranks) + place for place, name in enumerate(special_tokens())}
        self._encoding = tiktoken.Encoding(
            name=path.name, pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=specials
        )
        self._lengths = [len(token) for token in ranks]
        named = specials | {name: len(ranks) + place for name, place in LLAMA_3_1_SPECIALS.items()}
        self.eos_reason = SETTING if eos_token else "Llama 3's end of text"
        self.eos_token = eos_token = eos_token or NAMED_SPECIALS[1]
        self.notes: tuple[str, ...] = ()
        if eos_token in named:
            self.eos_id = named[eos_token]
        elif eos_token.encode() in ranks:
            self.eos_id = ranks[eos_token.encode()]
        else:
            raise unknown_token(path, "eos_token", eos_token)
        self.bos_id: int | None = specials[NAMED_SPECIALS[0]]
        self.vocab_size = len(ranks) + NUM_SPECIAL_TOKENS
        self.name = display_name("tiktoken", path)
        self.fingerprint = fingerprint(content, self.eos_id)

    def encode(self, text: str) -> list[int]:
        """Ids of one text, no special tokens added."""
        if len(text) <= LONGEST_WHITESPACE:
            ids: list[int] = self._encoding.encode_ordinary(text)
            return ids
        return [token for part in _cut_long_whitespace(text) for token in self._encoding.encode_ordinary(part)]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of many texts, on one core."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens spelled out."""
        text: str = self._encoding.decode(list(ids))
        return text

    def added_tokens(self) -> list[str]:
        """None: all that ranks have beside them is special."""
        return []

    def token_bytes(self) -> npt.NDArray[np.int32]:
        """(vocab_size,) bytes per id, exact; see `Tokenizer.token_bytes`."""
        return np.array(self._lengths + [0] * NUM_SPECIAL_TOKENS, dtype=np.int32)


def special_tokens() -> list[str]:
    """The 256 names in id order, as in Hugging Face's Meta-Llama-3 tokenizer."""
    reserved = (f"<|reserved_special_token_{number}|>" for number in range(NUM_SPECIAL_TOKENS))
    return [NAMED_SPECIALS.get(place) or next(reserved) for place in range(NUM_SPECIAL_TOKENS)]


def read_ranks(path: Path, content: bytes) -> dict[bytes, int]:
    """Lines `base64 rank` -> {bytes: rank}, in rank order, which must be 0, 1, 2, ..."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise InputError(f"{path}:{number}: found {line[:40]!r}; expected a base64 token and its rank") from None
        if int(rank) != number - 1 or len(ranks) != number:
            raise InputError(f"{path}:{number}: found rank {int(rank)}; expected {number - 1}, each token once")
    return ranks


def _cut_long_whitespace(text: str) -> Iterator[str]:
    """`text` in parts that each hold at most LONGEST_WHITESPACE whitespace characters in a row."""
    start = 0
    for match in _LONG_WHITESPACE.finditer(text):
        if match.end() - match.start() == LONGEST_WHITESPACE:
            yield text[start : match.end()]
            start = match.end()
    yield text[start:]
