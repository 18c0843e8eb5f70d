"""Chat templates: conversations -> tokens, with the answers marked that the loss counts.

Text is rendered turn by turn as it is when a model is asked: everything up to the place where it has to answer, then the
answer. Both are tokenized apart, so a token never spans the border, and training sees what generation will see.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from types import SimpleNamespace
from typing import Any

from megatron_cpt.convert.vocabulary import load_hf_tokenizer
from megatron_cpt.posttrain.conversations import Conversation, Message, Preference, RowError
from megatron_cpt.posttrain.template_files import TEMPLATES, missing_token, no_template, read_template
from megatron_cpt.posttrain.template_limits import REFUSALS, has_word, limited
from megatron_cpt.utils.errors import InputError

CLOCK = "strftime_now"  # the function by which templates ask for the date
IGNORED = -100  # label of a token that the loss does not count
PROBE = (
    Message("user", "probe one"),
    Message("assistant", "probe two"),
    Message("user", "probe three"),
    Message("assistant", "probe four"),
)


@dataclass(frozen=True)
class Example:
    """One conversation in tokens; labels are the tokens of the answers, with the one that ends each, and `IGNORED`."""

    input_ids: list[int]
    labels: list[int]
    origin: Conversation
    row: str = field(default="", compare=False)  # file and number, for messages

    def sequences(self) -> list[list[int]]:
        """What the model reads."""
        return [self.input_ids]


@dataclass(frozen=True)
class PairExample:
    """Two answers in tokens, with the one that ends each."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    origin: Preference
    row: str = field(default="", compare=False)

    def sequences(self) -> list[list[int]]:
        """What the model reads."""
        return [self.prompt_ids + self.chosen_ids, self.prompt_ids + self.rejected_ids]


class PromptTemplate:
    """A chat template with its tokenizer, which carries it from then on: what a model is given that has to answer.

    Attributes:
        tokenizer: transformers' tokenizer
        date: ISO 8601, of what the template takes for now, wherever it asks; None: it does not ask, or gets the clock's
    """

    def __init__(self, tokenizer: Any, name: str | None, now: datetime | None = None) -> None:
        """`name`: llama3, chatml, a file with a Jinja template; None: the tokenizer's own. `now`: None is the clock's.

        Raises:
            InputError: there is none, or its tokens are not the tokenizer's
        """
        self.tokenizer = tokenizer
        tokenizer.chat_template = template_text(tokenizer, name)
        self._now = now if has_word(tokenizer.chat_template, "name", CLOCK) else None
        self.date = None if self._now is None else self._now.isoformat()
        self._name = f"the chat template of {tokenizer.name_or_path}" if name is None else f"chat_template {name}"
        if name in TEMPLATES:
            _, wanted, _ = TEMPLATES[name]
            missing = [token for token in wanted if len(tokenizer.encode(token, add_special_tokens=False)) != 1]
            if missing:
                raise missing_token(name, tokenizer.name_or_path, missing[0])

    def prompt(self, messages: Sequence[Message]) -> str:
        """What a model is given that has to answer.

        Raises:
            RowError: the template refuses the messages, or makes nothing of them
        """
        text = self._render(messages, True)
        if not text:
            raise RowError("template", "the chat template makes nothing of it")
        return text

    def _render(self, messages: Sequence[Message], ask: bool) -> str:
        turns = [
            {"role": message.role, "content": message.content, **dict([message.reasoning] if message.reasoning else [])}
            for message in messages
        ]
        with limited(self.tokenizer), clock_at(self._now):
            try:
                text: str = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=ask)
            except REFUSALS as error:
                raise RowError("template", f"the chat template refuses it: {error}") from error
        return text


@contextlib.contextmanager
def clock_at(now: datetime | None) -> Iterator[None]:
    """For the block, let it be `now` for chat templates (None: the clock's); transformers hands no function to them."""
    from transformers.utils import chat_template_utils as utils

    before = utils.datetime
    if now is not None:
        utils.datetime = SimpleNamespace(now=lambda: now)
    try:
        yield
    finally:
        utils.datetime = before


class Template(PromptTemplate):
    """A chat template that can be trained with.

    Attributes:
        end_of_turn: id of the token at which a model that answers has to stop
    """

    def __init__(self, tokenizer: Any, name: str | None, now: datetime | None = None) -> None:
        """As PromptTemplate.

        Raises:
            InputError: as PromptTemplate, or it does not let answers be told from the rest
        """
        super().__init__(tokenizer, name, now)
        special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        self._special = special | set(tokenizer.all_special_tokens)
        self._find_special = re.compile("|".join(map(re.escape, sorted(self._special)))).search
        self.end_of_turn = self._end_of_turn()

    def encode(self, conversation: Conversation) -> Example:
        """All tokens of a conversation.

        Raises:
            RowError: a text of it holds one of the tokenizer's special tokens, is left out by the template, or not rendered
        """
        input_ids: list[int] = []
        labels: list[int] = []
        done = ""
        for number, message in enumerate(conversation.messages):
            if message.role != "assistant":
                continue
            before, after = self._answer(conversation.messages[: number + 1], done)
            asked, answer = self._ids(before), self._ids(after)
            end = len(answer) - answer[::-1].index(self.end_of_turn) if self.end_of_turn in answer else len(answer)
            input_ids += asked + answer
            counted = answer[:end] if message.learned else [IGNORED] * end
            labels += [IGNORED] * len(asked) + counted + [IGNORED] * (len(answer) - end)
            done += before + after
        check_all_texts(conversation.messages, done)
        return Example(input_ids, labels, conversation)

    def encode_pair(self, preference: Preference) -> PairExample:
        """Prompt and both answers.

        Raises:
            RowError: as `encode`
        """
        sides = [self._answer((*preference.prompt, side), "") for side in (preference.chosen, preference.rejected)]
        for answer, (before, after) in zip((preference.chosen, preference.rejected), sides, strict=True):
            check_all_texts((*preference.prompt, answer), before + after)
        prompt = self._ids(sides[0][0])
        answers = [self._ids(after) for _, after in sides]
        ended = [ids[: len(ids) - ids[::-1].index(self.end_of_turn)] if self.end_of_turn in ids else ids for ids in answers]
        if ended[0] == ended[1]:
            raise RowError("identical answers", "chosen and rejected are the same tokens")
        return PairExample(prompt, ended[0], ended[1], preference)

    def _answer(self, messages: Sequence[Message], done: str) -> tuple[str, str]:
        """(text from the end of `done` up to the last message's answer, the answer)"""
        for message in messages:
            found = self._find_special(message.content) or (message.reasoning and self._find_special(message.reasoning[1]))
            if found:
                raise RowError("special token in a text", f"a text holds {found[0]}, which the model would take for its own")
        asked, whole = self._render(messages[:-1], True), self._render(messages, False)
        if not (whole.startswith(asked) and asked.startswith(done)):
            raise RowError("template", "the chat template changes earlier turns when later ones come")
        return asked[len(done) :], whole[len(asked) :]

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids

    def _end_of_turn(self) -> int:
        """Checks that what is put in comes out again, and finds the token after an answer."""
        try:
            first, second = self._answer(PROBE[:2], ""), self._answer(PROBE, "")
        except RowError as error:
            raise InputError(f"{self._name}: {error}") from error
        places = [second[0].find(message.content) for message in PROBE[:3]]
        if min(places) < 0 or places != sorted(places) or not second[1].startswith(PROBE[3].content):
            raise InputError(f"{self._name} does not give back the texts of a conversation in their order")
        ids = self._ids(first[1].removeprefix(PROBE[1].content))
        special = [number for number in ids if self.tokenizer.decode([number]) in self._special]
        if not special:
            raise InputError(
                f"{self._name} ends an answer with {first[1].removeprefix(PROBE[1].content)!r}; expected a special token"
            )
        return special[0]


def check_all_texts(messages: Sequence[Message], rendered: str) -> None:
    """Raise RowError unless a rendered conversation has the texts of all its turns, in their order.

    Templates cut spaces off their ends.
    """
    place = 0
    for number, message in enumerate(messages, 1):
        texts = [("content", message.content)]
        if message.reasoning is not None:
            texts.insert(0, message.reasoning)
        for part, text in texts:
            found = rendered.find(text.strip(), place)
            if found < 0:
                what = f"the {part} of message {number}, the {message.role}'s"
                raise RowError("left out by the template", f"the chat template leaves out {what}, or changes it")
            place = found + len(text.strip())


def load_template(folder: str, name: str | None, now: datetime | None = None) -> Template:
    """The tokenizer with a chat template, for which it is always `now` (None: what the clock says).

    Raises:
        InputError: see Template
    """
    return Template(load_hf_tokenizer(folder), name, now)


def template_text(tokenizer: Any, name: str | None) -> str:
    """The Jinja text."""
    if name is None:
        own = tokenizer.chat_template
        own = own.get("default") if isinstance(own, dict) else own  # some have a second one, for tools
        if not isinstance(own, str):
            raise no_template(tokenizer.name_or_path)
        return own
    return read_template(name)
