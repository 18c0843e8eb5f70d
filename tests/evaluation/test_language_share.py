"""Shares by script and by identification; parts of characters, numbers and empty answers."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from megatron_cpt.evaluation.language_share import LanguageShare, language_share, split_sentences
from megatron_cpt.utils.errors import InputError

CHINESE = "今天天气很好，我们去公园散步。"
ENGLISH = "The quick brown fox jumps over the lazy dog."


def share(tokenizer_dir: str, *answers: str, language: str = "zh") -> LanguageShare:
    return language_share(answers, language, AutoTokenizer.from_pretrained(tokenizer_dir))


def test_one_language(tiny_tokenizer_dir: str) -> None:
    assert (share(tiny_tokenizer_dir, CHINESE).script, share(tiny_tokenizer_dir, CHINESE).identified) == (1.0, 1.0)
    assert (share(tiny_tokenizer_dir, ENGLISH).script, share(tiny_tokenizer_dir, ENGLISH).identified) == (0.0, 0.0)
    assert share(tiny_tokenizer_dir, CHINESE, language="zh-CN") == share(tiny_tokenizer_dir, CHINESE)
    english = share(tiny_tokenizer_dir, ENGLISH, language="en")
    assert (english.script, english.identified) == (None, 1.0)


def test_tokens_are_counted_not_answers(tiny_tokenizer_dir: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer_dir)
    both = share(tiny_tokenizer_dir, CHINESE + ENGLISH)
    counts = [share(tiny_tokenizer_dir, text).tokens for text in (CHINESE, ENGLISH)]
    assert both.tokens == sum(counts)
    assert both.script == pytest.approx(counts[0] / sum(counts))
    lengths = [len(tokenizer.encode(text)) for text in (CHINESE, ENGLISH)]
    assert both.identified == pytest.approx(lengths[0] / sum(lengths))
    assert share(tiny_tokenizer_dir, CHINESE, ENGLISH).script == both.script


def test_numbers_and_punctuation_are_in_no_language(tiny_tokenizer_dir: str) -> None:
    plain, numbers = share(tiny_tokenizer_dir, "很好"), share(tiny_tokenizer_dir, "很好 3.14 !!! 1,000,000")
    assert numbers.script == 1.0
    assert numbers.tokens == plain.tokens
    with pytest.raises(InputError, match="none of the 2 answers has a letter"):
        share(tiny_tokenizer_dir, "3.14", "")


def test_sentences_cover_a_text() -> None:
    text = f"{CHINESE}{ENGLISH} Really? Yes\n3.14 is a number"
    spans = split_sentences(text)
    assert "".join(text[begin:end] for begin, end in spans) == text
    assert [text[begin:end] for begin, end in spans][:2] == [CHINESE, ENGLISH]
    assert split_sentences("") == []
