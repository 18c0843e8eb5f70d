"""One small Tokenizer interface over Hugging Face, tiktoken (Llama-3) and SentencePiece files. Imports no torch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from megatron_cpt.tokenizer.base import Tokenizer
from megatron_cpt.utils.errors import InputError, if_on_the_hub
from megatron_cpt.utils.input_files import check_folder

__all__ = ["Tokenizer", "load_tokenizer", "tokenizer_file"]

_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")


def load_tokenizer(path: str, eos_token: str | None = None) -> Tokenizer:
    """The tokenizer at `path`: a folder with tokenizer.json (or tokenizer.model), or one such file of any name.

    Whether a file is a tokenizer.json, tiktoken ranks or a SentencePiece model is told from its content. `eos_token`
    overrides the token that ends a document. InputError: nothing there, unknown format, no or unknown eos token.
    """
    from megatron_cpt.tokenizer.hf import HuggingFaceTokenizer
    from megatron_cpt.tokenizer.sentencepiece_model import SentencePieceTokenizer
    from megatron_cpt.tokenizer.tiktoken_llama3 import Llama3Tokenizer

    file, kind = tokenizer_file(path)
    if kind == "hf":
        return HuggingFaceTokenizer(file, eos_token)
    if kind == "tiktoken":
        return Llama3Tokenizer(file, eos_token)
    return SentencePieceTokenizer(file, eos_token)


def tokenizer_file(path: str) -> tuple[Path, Literal["hf", "tiktoken", "sentencepiece"]]:
    """The file a tokenizer is read from and its format. InputError when there is none."""
    if not path:  # which would be the folder this runs in
        raise InputError("tokenizer is ''; expected a tokenizer.json or tokenizer.model, or a folder with one")
    source = Path(path).expanduser()
    if source.is_dir():
        check_folder(source)
    if source.is_dir() and (source / "tokenizer.json").is_file():
        return source / "tokenizer.json", "hf"
    file = source / "tokenizer.model" if source.is_dir() else source
    if not file.is_file():
        found = "a folder without either" if source.is_dir() else "nothing there"
        advice = "" if source.exists() else if_on_the_hub(path)
        raise InputError(
            f"tokenizer {path}: found {found}; expected a tokenizer.json or tokenizer.model, or a folder with one{advice}"
        )
    with file.open("rb") as stream:
        head = stream.read(4096)
    if head.lstrip().startswith(b"{"):
        return file, "hf"
    return file, "tiktoken" if _TIKTOKEN_LINE.match(head) else "sentencepiece"
