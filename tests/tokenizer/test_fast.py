"""The fast tokenizer gives the ids of the reference for every kind of file, or says that it cannot read it."""

from __future__ import annotations

import base64
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_tokenizer import rank_file, sentencepiece_file  # noqa: F401

from megatron_cpt.corpus.audit import ODD_TEXTS
from megatron_cpt.corpus.encoding import per_text
from megatron_cpt.tokenizer import load_tokenizer
from megatron_cpt.tokenizer.fast import EncodingError, FastTokenizer, NotSupportedError
from megatron_cpt.utils.errors import InputError

SPECIALS = ["<|endoftext|>", "<|end_of_text|>", "<|begin_of_text|>", "<s>", "</s>", "<unk>", "<0x0A>", "<|eot_id|>", "▁"]
any_text = st.text(st.characters(exclude_categories=["Cs"]))
PIECES = [*SPECIALS, "the quick brown fox", "  ", "\n\n", "持续预训练", "🦊", "e\u0301"]
texts_with_specials = st.lists(st.one_of(any_text, st.sampled_from(PIECES)), max_size=6).map("".join)


def assert_equal(path: str, texts: list[str]) -> None:
    wanted = load_tokenizer(path).encode_batch(texts)
    for text, found, ids in zip(texts, per_text(*FastTokenizer(path).encode_batch(texts)), wanted, strict=True):
        assert np.asarray(found).tolist() == list(ids), text


@pytest.fixture(params=["tiny_tokenizer_dir", "rank_file", "sentencepiece_file"])
def path(request: pytest.FixtureRequest) -> str:
    found: str = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def pair(path: str) -> tuple[FastTokenizer, Any]:
    """The fast tokenizer and its reference."""
    return FastTokenizer(path), load_tokenizer(path)


@settings(max_examples=250, deadline=None)
@given(data=st.data())
def _equal_on(pair: tuple[FastTokenizer, Any], data: st.DataObject) -> None:
    fast, reference = pair
    text = data.draw(texts_with_specials)
    assert fast.encode(text).tolist() == reference.encode(text)


def test_equal_on_arbitrary_text(pair: tuple[FastTokenizer, Any]) -> None:
    _equal_on(pair)


def test_equal_on_odd_and_on_long_texts(path: str) -> None:
    long = ["a" * 5000, "ab " * 3000, " " * 2000 + "x", "\n" * 999, "文" * 2000, "1234567890" * 200, "é" * 1000, "<s>" * 500]
    assert_equal(path, [*ODD_TEXTS, *SPECIALS, *long])


def test_every_single_character_of_the_first_plane(pair: tuple[FastTokenizer, Any]) -> None:
    fast, reference = pair
    characters = [chr(code) for code in range(0x10000) if not 0xD800 <= code < 0xE000]
    blocks = ["a".join(characters[i : i + 64]) for i in range(0, len(characters), 64)]
    for text, wanted in zip(blocks, reference.encode_batch(blocks), strict=True):
        assert fast.encode(text).tolist() == list(wanted), hex(ord(text[0]))


def test_a_batch_is_its_texts_one_by_one(pair: tuple[FastTokenizer, Any]) -> None:
    """Words that were met before come from a cache: the ids do not depend on what came before."""
    fast, reference = pair
    texts = [f"the {word} fox {number % 7} 文{word}" for number, word in enumerate(["quick", "brown", "x", ""] * 200)]
    assert [ids.tolist() for ids in per_text(*fast.encode_batch(texts))] == reference.encode_batch(texts)
    assert [fast.encode(text).tolist() for text in reversed(texts)] == reference.encode_batch(texts)[::-1]
    assert per_text(*fast.encode_batch([])) == []
    assert [ids.tolist() for ids in per_text(*fast.encode_batch(["", "a", ""]))] == [[], reference.encode("a"), []]
    assert per_text(*fast.encode_batch([""]))[0].tolist() == []
    assert fast.encode("").tolist() == []


@settings(max_examples=60, deadline=None)
@given(
    merges=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=25),
    texts=st.lists(st.text("abc ", max_size=25), min_size=1, max_size=8),
)
@example(merges=[(0, 1), (1, 2), (4, 2), (0, 5)], texts=["abc", "aabcc", "abcabc"])
def test_any_ranks(tmp_path_factory: pytest.TempPathFactory, merges: list[tuple[int, int]], texts: list[str]) -> None:
    """Which merge goes first is decided by rank, then by place, also where tokens can be cut in several ways."""
    tokens = [bytes([byte]) for byte in range(256)]
    pieces = [b"a", b"b", b"c", b" "]
    for left, right in merges:
        token = pieces[left % len(pieces)] + pieces[right % len(pieces)]
        if token not in tokens and len(token) < 12:
            tokens.append(token)
            pieces.append(token)
    path = tmp_path_factory.getbasetemp() / "any_ranks.model"
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)))
    assert_equal(str(path), texts)


def edited(tokenizer: str, folder: Path, change: Callable[[dict[str, Any]], None]) -> str:
    """A copy of a Hugging Face tokenizer with another tokenizer.json."""
    copy = Path(shutil.copytree(tokenizer, folder / "edited"))
    description = json.loads((copy / "tokenizer.json").read_text())
    change(description)
    (copy / "tokenizer.json").write_text(json.dumps(description))
    return str(copy)


def _added_token(description: dict[str, Any]) -> None:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    description["added_tokens"] += [
        {"id": 400, "content": "北京", "special": False, **flags},
        {"id": 401, "content": "<end>", "special": True, **flags},
    ]


def _prefix_space(description: dict[str, Any]) -> None:
    description["pre_tokenizer"]["add_prefix_space"] = True


def _normalizer(description: dict[str, Any]) -> None:
    description["normalizer"] = {"type": "NFC"}


def _truncation(description: dict[str, Any]) -> None:
    description["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    description["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
    }


def _llama3_split(description: dict[str, Any]) -> None:
    from megatron_cpt.tokenizer.tiktoken_llama3 import SPLIT_PATTERN

    split = {"type": "Split", "pattern": {"Regex": SPLIT_PATTERN}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    description["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, byte_level]}
    description["model"]["ignore_merges"] = True


@pytest.mark.parametrize("change", [_added_token, _prefix_space, _normalizer, _truncation, _llama3_split])
def test_other_settings_of_a_tokenizer_json(
    change: Callable[[dict[str, Any]], None], tiny_tokenizer_dir: str, tmp_path: Path
) -> None:
    """Equal, or not supported; never different."""
    path = edited(tiny_tokenizer_dir, tmp_path, change)
    try:
        FastTokenizer(path)
    except NotSupportedError:
        assert change not in (_truncation, _llama3_split)  # these are everyday
        return
    assert_equal(path, [*ODD_TEXTS, *SPECIALS, "去北京 now<end>", "cafe\u0301 e\u0301", "the fox", " the fox"])


def _unigram(folder: Path) -> str:
    from tokenizers import Tokenizer, models

    Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0), ("▁a", -2.0)], unk_id=0)).save(str(folder / "tokenizer.json"))
    return str(folder / "tokenizer.json")


def _word_piece(folder: Path) -> str:
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]")).save(str(folder / "tokenizer.json"))
    return str(folder / "tokenizer.json")


def _word_level(folder: Path) -> str:
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]")).save(str(folder / "tokenizer.json"))
    return str(folder / "tokenizer.json")


def _unigram_model(folder: Path) -> str:
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the quick brown fox jumps over the lazy dog"] * 20),
        model_prefix=str(folder / "m"),
        vocab_size=60,
        model_type="unigram",
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
    )
    return str(folder / "m.model")


def _no_tokenizer(folder: Path) -> str:
    (folder / "tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": 3}}')
    return str(folder / "tokenizer.json")


def _broken(folder: Path) -> str:
    (folder / "tokenizer.json").write_text("{")
    return str(folder / "tokenizer.json")


@pytest.mark.parametrize("make", [_unigram, _word_piece, _word_level, _unigram_model, _no_tokenizer])
def test_what_is_not_supported_is_said(make: Callable[[Path], str], tmp_path: Path, capfd: Any) -> None:
    path = make(tmp_path)
    with pytest.raises(NotSupportedError, match=f"gigatoken cannot read {path}, a kind of tokenizer it does not have"):
        FastTokenizer(path)
    assert capfd.readouterr().err == ""


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"tokenizer.json: not valid JSON"):
        FastTokenizer(_broken(tmp_path))


class _Panics:
    """A backend that fails as gigatoken does: a line of Rust on file descriptor 2, and an error that is no Exception."""

    def encode_batch(self, texts: list[str], parallel: bool) -> Any:
        os.write(2, b"thread '<unnamed>' panicked at src/bpe/mod.rs:88:24\n")
        raise BaseException("Location:\n    src/bpe/mod.rs:88:24")

    def encode(self, text: str) -> Any:
        return self.encode_batch([text], parallel=False)


def test_a_panic_is_one_line_without_rust(tiny_tokenizer_dir: str, capfd: Any) -> None:
    tokenizer = FastTokenizer(tiny_tokenizer_dir)
    tokenizer._backend = _Panics()
    for encode in (lambda: tokenizer.encode_batch(["the 哈", "x"]), lambda: tokenizer.encode("the 哈")):
        with pytest.raises(EncodingError, match=r"^it cannot encode a text that begins with 'the 哈'$"):
            encode()
    print("still heard", file=sys.stderr)
    assert capfd.readouterr().err == "still heard\n"


def test_gigatoken_that_is_not_installed(tiny_tokenizer_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("gigatoken", "gigatoken.gigatoken_rs", "gigatoken._load", "gigatoken._load.sentencepiece"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(NotSupportedError, match="gigatoken is not installed"):
        FastTokenizer(tiny_tokenizer_dir)
