"""gigatoken, several times faster than the reference implementations, behind the same few methods.

It is a young library that re-implements what `tokenizers`, `tiktoken` and `sentencepiece` do, so nothing here is to be
trusted by itself: preprocessing compares it with the reference on the very input (`corpus.audit`).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from megatron_cpt.tokenizer import tokenizer_file
from megatron_cpt.tokenizer.hf_files import read_tokenizer_json
from megatron_cpt.tokenizer.tiktoken_llama3 import SPLIT_PATTERN, read_ranks
from megatron_cpt.utils.errors import InputError, RunError


class NotSupportedError(Exception):
    """gigatoken is not installed or does not know this vocabulary."""


class EncodingError(RunError):
    """gigatoken gave up on a text, or on one of several of which this is the first."""

    def __init__(self, text: str) -> None:
        super().__init__(f"it cannot encode a text that begins with {text[:80]!r}")


@contextmanager
def _failures_as(error: Exception) -> Iterator[None]:
    """Raise `error` for whatever the Rust library raises; lines that its panics print are kept off the screen."""
    sys.stderr.flush()
    shown = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError, InputError):
        raise
    except BaseException:  # a panic is no Exception
        raise error from None
    finally:
        os.dup2(shown, 2)
        os.close(shown)
        os.close(nowhere)


class FastTokenizer:
    """Text -> ids with gigatoken. Keeps every distinct word it has met: see `CACHE_BYTES` of `corpus.encoding`.

    The text of special tokens is encoded as ordinary characters, as all tokenizers of this package do.
    """

    def __init__(self, path: str) -> None:
        """NotSupportedError when gigatoken cannot read the tokenizer at `path`."""
        file, kind = tokenizer_file(path)
        try:
            from gigatoken import gigatoken_rs
            from gigatoken._load.sentencepiece import sentencepiece_to_tokenizer_json
        except ImportError as error:
            raise NotSupportedError(f"gigatoken is not installed ({error})") from None
        content = read_tokenizer_json(file).content if kind == "hf" else file.read_bytes()
        with _failures_as(NotSupportedError(f"gigatoken cannot read {file}, a kind of tokenizer it does not have")):
            if kind == "tiktoken":
                description = _from_ranks(read_ranks(file, content))
            elif kind == "sentencepiece":
                description = _without_specials(sentencepiece_to_tokenizer_json(content))
            else:
                description = _without_specials(content)
            self._backend = gigatoken_rs.load_hf_json(description)

    def encode(self, text: str) -> npt.NDArray[np.uint32]:
        """(tokens,) ids of one text, no special tokens added."""
        with _failures_as(EncodingError(text)):
            ids: npt.NDArray[np.uint32] = self._backend.encode(text)
        return ids

    def encode_batch(self, texts: Sequence[str]) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
        """(tokens,) ids of many texts back to back, and how many each has (texts,). On one core.

        For short texts about a quarter faster than one call of `encode` each.
        """
        if not texts:
            return np.empty(0, np.uint32), np.empty(0, np.int64)
        with _failures_as(EncodingError(texts[0])):
            rows = self._backend.encode_batch(list(texts), parallel=False).layout
        return np.asarray(rows.content.data), np.diff(np.asarray(rows.offsets.data))


def _without_specials(content: str | bytes) -> bytes:
    """A tokenizer.json whose special tokens are not looked for in texts, nor added around them."""
    description = orjson.loads(content)
    description["added_tokens"] = [token for token in description.get("added_tokens") or [] if not token.get("special")]
    return orjson.dumps(description | {"post_processor": None, "truncation": None, "padding": None})


def _from_ranks(ranks: dict[bytes, int]) -> bytes:
    """tiktoken ranks as a tokenizer.json. Every way to cut a token in two known ones is a merge, of the token's rank."""
    spelled = dict(enumerate(_byte_alphabet()))
    names = {token: token.decode("latin-1").translate(spelled) for token in ranks}
    spellings = set(names.values())
    merges = [
        f"{left} {right}"
        for name in names.values()
        for i in range(1, len(name))
        if (left := name[:i]) in spellings and (right := name[i:]) in spellings
    ]
    split: dict[str, Any] = {"type": "Split", "pattern": {"Regex": SPLIT_PATTERN}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return orjson.dumps(
        {
            "version": "1.0",
            "added_tokens": [],
            "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
            "post_processor": None,
            "decoder": byte_level | {"use_regex": True},
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": True,
                "vocab": {names[token]: rank for token, rank in ranks.items()},
                "merges": merges,
            },
        }
    )


def _byte_alphabet() -> list[str]:
    """The printable character that byte-level BPE (GPT-2) writes for each of the 256 bytes."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = (256 + n for n in range(256))
    return [chr(byte) if byte in set(printable) else chr(next(others)) for byte in range(256)]
