"""Hugging Face `tokenizer.json`, read by the `tokenizers` library alone (transformers takes seconds to import)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from megatron_cpt.tokenizer.base import SETTING, display_name, fingerprint, no_eos, piece_bytes, unknown_token
from megatron_cpt.tokenizer.end_of_text import EndOfTextChoice, begin_of_text, end_of_text
from megatron_cpt.tokenizer.hf_files import CONFIG, read_tokenizer_json
from megatron_cpt.utils.errors import InputError

NOT_A_CHARACTER = "\U0010ffff"  # of Unicode, for good: no vocabulary has it


class HuggingFaceTokenizer:
    """A `tokenizer.json`, with eos and bos from the `tokenizer_config.json` (or `special_tokens_map.json`) beside it.

    Added tokens that are not special are matched inside documents, as they are in transformers.
    """

    def __init__(self, path: Path, eos_token: str | None = None) -> None:
        """`path`: a folder or the `tokenizer.json` in it. InputError when unreadable or no eos token is known."""
        from tokenizers import Tokenizer

        self._file = path / "tokenizer.json" if path.is_dir() else path
        read = read_tokenizer_json(self._file)
        try:
            self._backend = Tokenizer.from_buffer(read.content)
        except Exception as error:  # the library raises bare Exception
            raise InputError(f"{self._file}: not a tokenizer.json ({error}); expected a tokenizers file") from None
        for token in read.configured:
            self._check_id(token)
        self._check_unknown()
        # A saved file may carry the truncation and padding of its last use.
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True  # i.e. encode their text as text

        self._added = dict(sorted(self._backend.get_added_tokens_decoder().items()))
        eos = EndOfTextChoice(eos_token, SETTING) if eos_token else end_of_text(self._file.parent, self._specials())
        if eos is None:
            raise no_eos(self._file)
        bos = begin_of_text(self._file.parent)
        self.eos_token, self.eos_reason, self.notes = eos.token, eos.reason, read.notes
        self.eos_id = self._id_of("eos_token", eos.token)
        self.bos_id = None if bos is None else self._id_of("bos_token", bos)
        self._vocabulary: dict[str, int] = self._backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(self._vocabulary.values()) + 1
        self.name = display_name("hf", path.parent if path.name == "tokenizer.json" else path)
        self.fingerprint = fingerprint(read.content, self.eos_id)

    def _check_id(self, token: dict[str, Any]) -> None:
        """InputError where a token of tokenizer_config.json has not the id that the library gives it, the next free one."""
        if (found := self._backend.token_to_id(token["content"])) != token["id"]:
            raise InputError(
                f"{self._file.with_name(CONFIG)}: added_tokens_decoder.{token['id']} is {token['content']!r}, which "
                f"{self._file.name} does not have; expected id {found}, the next free one"
            )

    def _check_unknown(self) -> None:
        """InputError where a character that the vocabulary has not cannot be encoded."""
        try:
            self._backend.encode(NOT_A_CHARACTER, add_special_tokens=False)
        except Exception as error:  # the library raises bare Exception
            raise InputError(
                f"{self._file}: a character without a token cannot be encoded ({error}); expected a token for unknown ones, "
                "or one for each byte"
            ) from None

    def _specials(self) -> dict[str, int]:
        return {token.content: number for number, token in self._added.items() if token.special}

    def _id_of(self, field: str, token: str) -> int:
        found: int | None = self._backend.token_to_id(token)
        if found is None:
            raise unknown_token(self._file, field, token)
        return found

    def has_token(self, text: str) -> bool:
        """Whether a text is the name of a token, be it a special one."""
        return self._backend.token_to_id(text) is not None

    def encode(self, text: str) -> list[int]:
        """Ids of one text, no special tokens added."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a text that a model is to go on with: with the tokens that tokenizer.json puts around it."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=True).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of many texts; uses all cores unless TOKENIZERS_PARALLELISM=false."""
        # `fast` leaves out the character offsets, which nobody here reads.
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens spelled out."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=False)
        return text

    def added_tokens(self) -> list[str]:
        """Texts that are one token by themselves wherever they stand, in the order of their ids; no special ones."""
        return [token.content for token in self._added.values() if not token.special]

    @cached_property
    def _token_bytes(self) -> npt.NDArray[np.int32]:
        # Byte-level BPE spells each byte as one character of its own alphabet.
        byte_level = _is_byte_level(self._backend.decoder) or _is_byte_level(self._backend.pre_tokenizer)
        lengths = [len(token) for token in self._vocabulary] if byte_level else piece_bytes(self._vocabulary)
        sizes = np.zeros(self.vocab_size, dtype=np.int32)
        sizes[list(self._vocabulary.values())] = lengths
        for token_id, token in self._added.items():
            sizes[token_id] = 0 if token.special else len(token.content.encode())
        return sizes

    def token_bytes(self) -> npt.NDArray[np.int32]:
        """(vocab_size,) UTF-8 bytes per id; see `Tokenizer.token_bytes`."""
        return self._token_bytes


def _is_byte_level(step: Any) -> bool:
    """Whether a decoder or pre-tokenizer (alone or in a sequence) is byte-level. Its pickled state is its JSON."""
    description = orjson.loads(step.__getstate__()) if step is not None else {}
    steps = [description, *description.get("decoders", []), *description.get("pretokenizers", [])]
    return any(inner.get("type") == "ByteLevel" for inner in steps)
