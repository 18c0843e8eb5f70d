"""Where the answer of a model ends: the one place that says so, for chat, evaluation and what fine-tuning writes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_cpt.posttrain.template_limits import REFUSALS, limited

QUESTION, ANSWER, NEXT_QUESTION = "probe one", "probe two", "probe three"
SPARE_TOKENS = 8  # beyond the bytes of a text, where its tokens may begin before it


@dataclass(frozen=True)
class TurnEnd:
    """Where an answer ends.

    Attributes:
        token_ids: tokens that end it
        strings: texts that end it; they are no part of the answer
        token_texts: what the tokens look like where a decoder does not leave them out
    """

    token_ids: tuple[int, ...]
    strings: tuple[str, ...] = ()
    token_texts: tuple[str, ...] = ()

    def cut(self, text: str) -> str:
        """Text up to the first end."""
        places = [place for end in self._texts if (place := text.find(end)) >= 0]
        return text[: min(places)] if places else text

    def is_in(self, ids: Sequence[int], text: str) -> bool:
        """Whether tokens, or the text that they are, hold an end."""
        return not set(self.token_ids).isdisjoint(ids) or any(end in text for end in self.strings)

    def cut_stream(self, pieces: Iterable[str]) -> Iterator[str]:
        """Pieces of a text up to the first end; what may be the beginning of one waits for the next piece."""
        held = ""
        for piece in pieces:
            held += piece
            if self.cut(held) != held:
                break
            ready = len(held) - max((overlap(held, end) for end in self._texts), default=0)
            if ready:
                yield held[:ready]
            held = held[ready:]
        if self.cut(held):
            yield self.cut(held)

    def criterion(self, tokenizer: Any, width: int) -> Callable[..., Any]:
        """What transformers' generate asks after each token: which rows are at a text that ends them.

        Args:
            width: tokens of the prompts
        """
        import torch

        tail = max((len(end.encode()) for end in self.strings), default=0) + SPARE_TOKENS

        def ended(ids: Any, scores: Any, **_: Any) -> Any:
            if not self.strings:
                return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
            texts = tokenizer.batch_decode(ids[:, max(width, ids.shape[1] - tail) :], skip_special_tokens=False)
            found = [any(end in text for end in self.strings) for text in texts]
            return torch.tensor(found, dtype=torch.bool, device=ids.device)

        return ended

    @property
    def _texts(self) -> tuple[str, ...]:
        return (*self.strings, *self.token_texts)


def turn_end(tokenizer: Any, generation_config: Any = None) -> TurnEnd:
    """Everything that ends an answer of a model.

    The chat template knows what follows an answer, generation_config.json what its authors stop at, and the tokenizer what
    ends a text. Any of them may leave out what the others name: folders of Llama-3-Instruct have an end of text as
    `eos_token` and an end of turn in the template, and generation_config.json may name one, both or nothing, or be missing.

    Args:
        tokenizer: transformers', with its chat template if it has one
        generation_config: of the model
    """
    after = text_after_answer(tokenizer)
    in_template = first_added_token(tokenizer, after)
    ids = [*whole_numbers(getattr(generation_config, "eos_token_id", None)), in_template, tokenizer.eos_token_id]
    token_ids = tuple(dict.fromkeys(number for number in ids if number is not None))
    strings = getattr(generation_config, "stop_strings", None) or []
    given = [strings] if isinstance(strings, str) else list(strings)
    plain = plain_end(after) if in_template is None else None
    texts = [tokenizer.decode([number], skip_special_tokens=False) for number in token_ids]
    return TurnEnd(
        token_ids,
        tuple(dict.fromkeys([*given, *([plain] if plain else [])])),
        tuple(text for text in texts if text.strip()),
    )


def whole_numbers(value: Any) -> list[int]:
    """A number, a list of them, or None, as a list."""
    return list(value) if isinstance(value, (list, tuple)) else [] if value is None else [int(value)]


def text_after_answer(tokenizer: Any) -> str:
    """What the chat template has between an answer and the next question; "" where that cannot be told."""
    if tokenizer.chat_template is None:
        return ""
    roles = ("user", "assistant", "user")
    turns = [{"role": role, "content": text} for role, text in zip(roles, (QUESTION, ANSWER, NEXT_QUESTION), strict=True)]
    for shown in (turns, turns[:2]):
        with limited(tokenizer):
            try:
                text: str = tokenizer.apply_chat_template(shown, tokenize=False)
            except REFUSALS:
                continue
        place = text.rfind(ANSWER)
        if place >= 0:
            return text[place + len(ANSWER) :].partition(NEXT_QUESTION)[0]
    return ""


def first_added_token(tokenizer: Any, text: str) -> int | None:
    """The first token of a text that is no piece of ordinary text; None: there is none."""
    added = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids} - {tokenizer.unk_token_id}
    for number in tokenizer.encode(text, add_special_tokens=False) if text else []:
        if number in added and tokenizer.decode([number], skip_special_tokens=False).strip():
            return int(number)
    return None


def plain_end(after: str) -> str | None:
    """The text that ends an answer where no token does, such as a heading; None: it is blank, as within answers."""
    text = after.strip()
    begins_line = "\n" in after[: len(after) - len(after.lstrip())]
    return ("\n" if begins_line else "") + text if text else None


def overlap(text: str, end: str) -> int:
    """Length of the longest beginning of `end` that a text ends with."""
    return next((size for size in range(min(len(text), len(end)), 0, -1) if text.endswith(end[:size])), 0)
