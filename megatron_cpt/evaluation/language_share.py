"""Which language a model answers in: the paper's "%Chinese", the share of the answers' tokens in the target language.

Told in two ways, as each errs in its own: by Unicode script (every token with letters of it; numbers, spaces and
punctuation belong to no language), and by language identification (all tokens of the sentences that are identified as it).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import regex

from megatron_cpt.posttrain.answer_languages import identify
from megatron_cpt.utils.errors import InputError

# Scripts that only this language, of those that a model may mix it with, is written in. Latin script tells nothing.
SCRIPTS = {
    "zh": r"\p{Han}",
    "ja": r"[\p{Han}\p{Hiragana}\p{Katakana}]",
    "ko": r"[\p{Hangul}\p{Han}]",
    "ar": r"\p{Arabic}",
    "el": r"\p{Greek}",
    "he": r"\p{Hebrew}",
    "hi": r"\p{Devanagari}",
    "ru": r"\p{Cyrillic}",
    "th": r"\p{Thai}",
    "uk": r"\p{Cyrillic}",
}
LETTER = regex.compile(r"\p{L}")
SENTENCE = regex.compile(r".+?(?:[。！？!?\n]|\.(?=\s)|$)", regex.DOTALL)


@dataclass(frozen=True)
class LanguageShare:
    """Of some answers.

    Attributes:
        script: share of the tokens with letters that have letters of the language's script; None: its script tells nothing
        identified: share of the tokens of sentences with letters that are in sentences identified as the language
        tokens: with letters
    """

    script: float | None
    identified: float
    tokens: int


def language_share(answers: Sequence[str], language: str, tokenizer: Any) -> LanguageShare:
    """How much of the answers is in a language.

    Args:
        language: ISO 639-1, such as zh; what follows a hyphen, as in zh-TW, is not told apart
        tokenizer: transformers' fast tokenizer; a part of a character counts as the character

    Raises:
        InputError: no answer has a letter
    """
    language = language.split("-")[0]
    script = regex.compile(SCRIPTS[language]) if language in SCRIPTS else None
    letters = of_script = in_sentences = identified = 0
    for answer in answers:
        for begin, end in split_sentences(answer):
            offsets = tokenizer(answer[begin:end], add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
            texts = [answer[begin + first : begin + last] for first, last in offsets]
            with_letters = [text for text in texts if LETTER.search(text)]
            if not with_letters:
                continue
            letters += len(with_letters)
            of_script += sum(script is not None and bool(script.search(text)) for text in with_letters)
            in_sentences += len(texts)
            identified += len(texts) * (identify(answer[begin:end]) == language)
    if not letters:
        raise InputError(f"none of the {len(answers)} answers has a letter, so they are in no language")
    return LanguageShare(of_script / letters if script is not None else None, identified / in_sentences, letters)


def split_sentences(text: str) -> list[tuple[int, int]]:
    """(begin, end) of each: up to a full stop, or a line."""
    return [match.span() for match in SENTENCE.finditer(text)]
