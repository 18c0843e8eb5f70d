"""What every tokenizer offers the rest of the code, and the few helpers its implementations share."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from megatron_cpt.utils.errors import InputError

BYTE_PIECE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class Tokenizer(Protocol):
    """Text <-> token ids. Ids lie in `[0, vocab_size)`; added and special tokens are counted in `vocab_size`.

    Special tokens are never added, and the *text* of one inside a document ("<|end_of_text|>" on a web page) is encoded
    as the ordinary characters it is made of: only the caller's eos/bos policy can end or begin a document.
    """

    name: str
    vocab_size: int
    bos_id: int | None
    eos_id: int
    eos_token: str
    eos_reason: str
    """Why this token ends documents, for people."""
    notes: tuple[str, ...]
    """What the person who uses it should know, a line each."""
    fingerprint: str
    """sha256 over the tokenizer file and `eos_id`: equal fingerprints mean equal token streams."""

    def encode(self, text: str) -> list[int]:
        """Ids of one text, no special tokens added."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of many texts, in their order. Use several processes, not this, to use several cores."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens spelled out."""

    def added_tokens(self) -> list[str]:
        """Texts that are one token by themselves wherever they stand, in the order of their ids; no special ones."""

    def token_bytes(self) -> npt.NDArray[np.int32]:
        """(vocab_size,) UTF-8 bytes of text each id stands for; 0 for special tokens and ids without a token.

        Summed over an encoded text this is what divides a loss into bits per byte. For byte-level BPE without a
        normalizer the sum is exactly `len(text.encode())`; with one (Qwen's NFC) it is that of the normalised text.
        SentencePiece models that add a dummy prefix count one byte more per text: the space put before its first word.
        """


def fingerprint(content: bytes, eos_id: int) -> str:
    """sha256 (hex) of a tokenizer file's bytes followed by the eos id in decimal."""
    return hashlib.sha256(content + f"\neos={eos_id}".encode()).hexdigest()


def display_name(kind: str, path: Path) -> str:
    """`hf:SmolLM2-135M`, `tiktoken:tokenizer.model`: for people; compare fingerprints, not names."""
    name = os.fsencode(path.resolve().name).decode("utf-8", "backslashreplace")  # a file name may be no UTF-8
    return f"{kind}:{name}"


def piece_bytes(pieces: Iterable[str]) -> list[int]:
    """Bytes of SentencePiece-style pieces: `<0xE4>` is one byte, '▁' the one-byte space, the rest its own UTF-8."""
    return [1 if BYTE_PIECE.fullmatch(piece) else len(piece.replace("▁", " ").encode()) for piece in pieces]


SETTING = "the setting eos_token"


def no_eos(path: Path) -> InputError:
    """The error for a tokenizer that does not say which token ends a document."""
    return InputError(f"{path}: the tokenizer names no end-of-document token; expected eos_token to name one of its tokens")


def unknown_token(path: Path, field: str, token: str) -> InputError:
    """The error for an eos/bos token that is not in the vocabulary."""
    return InputError(f"{path}: {field} is {token!r}, which is not in the vocabulary; expected one of its tokens")


def token_bytes_sha256(tokenizer: Tokenizer) -> str:
    """Digest of `token_bytes`: equal for one vocabulary in different file formats, different for different vocabularies."""
    return hashlib.sha256(np.ascontiguousarray(tokenizer.token_bytes(), dtype="<i4").tobytes()).hexdigest()
