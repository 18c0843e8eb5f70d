"""SentencePiece `.model` files (Llama-2, Mistral)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_cpt.tokenizer.base import SETTING, display_name, fingerprint, no_eos, piece_bytes, unknown_token
from megatron_cpt.utils.errors import InputError


class SentencePieceTokenizer:
    """A SentencePiece model. Control symbols in a document's text ("</s>") are encoded as ordinary characters."""

    def __init__(self, path: Path, eos_token: str | None = None) -> None:
        """InputError when the file is no SentencePiece model or no eos token is known."""
        from sentencepiece import SentencePieceProcessor

        content = path.read_bytes()
        self._processor = SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(content)
        except RuntimeError:
            wanted = "a tokenizer.json, tiktoken ranks or a SentencePiece model"
            raise InputError(f"{path}: not a tokenizer this program knows; expected {wanted}") from None
        self.eos_id = self._processor.eos_id() if eos_token is None else self._processor.piece_to_id(eos_token)
        if self.eos_id < 0:
            raise no_eos(path)
        # An unknown piece gets the id of <unk>, so ask back.
        if eos_token is not None and self._processor.id_to_piece(self.eos_id) != eos_token:
            raise unknown_token(path, "eos_token", eos_token)
        self.eos_token: str = self._processor.id_to_piece(self.eos_id)
        self.eos_reason = "the model's own" if eos_token is None else SETTING
        self.notes: tuple[str, ...] = ()
        bos_id = self._processor.bos_id()
        self.bos_id: int | None = bos_id if bos_id >= 0 else None
        self.vocab_size: int = self._processor.get_piece_size()
        self.name = display_name("sentencepiece", path)
        self.fingerprint = fingerprint(content, self.eos_id)

    def encode(self, text: str) -> list[int]:
        """Ids of one text, no special tokens added."""
        ids: list[int] = self._processor.encode(text, add_bos=False, add_eos=False)
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of many texts, on one core."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; SentencePiece drops control symbols and the dummy prefix."""
        text: str = self._processor.decode(list(ids))
        return text

    def added_tokens(self) -> list[str]:
        """None: the library does not tell symbols that the model's maker defined from other pieces."""
        return []

    def token_bytes(self) -> npt.NDArray[np.int32]:
        """(vocab_size,) bytes per id; see `Tokenizer.token_bytes`. <unk> counts 0: what it replaced is not known."""
        model, ids = self._processor, range(self.vocab_size)
        special = [model.is_control(i) or model.is_unknown(i) or model.is_unused(i) for i in ids]
        sizes = np.array(piece_bytes(model.id_to_piece(i) for i in ids), dtype=np.int32)
        return np.where(special, np.int32(0), sizes)
