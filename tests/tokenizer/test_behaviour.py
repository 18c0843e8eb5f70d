"""What a tokenizer does tells it apart, whatever its files say; what its files say together is read by all alike."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_tokenizer import rank_file, sentencepiece_file  # noqa: F401

from megatron_cpt.tokenizer import load_tokenizer
from megatron_cpt.tokenizer.base import token_bytes_sha256
from megatron_cpt.tokenizer.behaviour import behaviour_sha256, first_encoding_difference, lost_letters
from megatron_cpt.tokenizer.fast import _from_ranks
from megatron_cpt.tokenizer.tiktoken_llama3 import read_ranks
from megatron_cpt.utils.errors import InputError

FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)


@pytest.fixture
def folder(tiny_tokenizer_dir: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_tokenizer_dir, tmp_path / "copy"))


def edit(folder: Path, change: Callable[[dict[str, Any]], Any], name: str = "tokenizer.json") -> str:
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))
    return str(folder)


def _digits(content: dict[str, Any]) -> None:
    digits = {"type": "Digits", "individual_digits": True}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, content["pre_tokenizer"]]}


def _merges(content: dict[str, Any]) -> None:
    content["model"]["merges"].reverse()


def _normalizer(content: dict[str, Any]) -> None:
    content["normalizer"] = {"type": "NFC"}


def _prefix(content: dict[str, Any]) -> None:
    content["pre_tokenizer"]["add_prefix_space"] = True


@pytest.mark.parametrize("change", [_digits, _merges, _normalizer, _prefix])
def test_the_same_tokens_split_in_another_way(change: Callable[[dict[str, Any]], None], folder: Path) -> None:
    before = load_tokenizer(str(folder))
    after = load_tokenizer(edit(folder, change))
    assert token_bytes_sha256(before) == token_bytes_sha256(after)
    assert behaviour_sha256(before) != behaviour_sha256(after)
    difference = first_encoding_difference(before, after.encode)
    assert difference is not None
    text, *ids = difference
    assert ids[0] != ids[1]
    assert first_encoding_difference(before, before.encode) is None
    assert before.encode(text) != after.encode(text)


def test_the_same_for_ranks_and_tokenizer_json(rank_file: str, tmp_path: Path) -> None:  # noqa: F811
    path = Path(rank_file)
    (tmp_path / "tokenizer.json").write_bytes(_from_ranks(read_ranks(path, path.read_bytes())))
    same = load_tokenizer(str(tmp_path), eos_token="!")
    assert behaviour_sha256(same) == behaviour_sha256(load_tokenizer(rank_file))


def test_an_added_token_is_probed(folder: Path) -> None:
    """No constant text holds it."""
    before = load_tokenizer(str(folder))
    add = [{"id": 400, "content": "持续预训练", **FLAGS}]
    after = load_tokenizer(edit(folder, lambda content: content["added_tokens"].extend(add)))
    assert behaviour_sha256(before) != behaviour_sha256(after)
    special = load_tokenizer(edit(folder, lambda content: content["added_tokens"][-1].update(special=True)))
    assert behaviour_sha256(before) == behaviour_sha256(special)  # its text is text


def test_letters_that_are_lost(sentencepiece_file: str, tiny_tokenizer_dir: str, folder: Path) -> None:  # noqa: F811
    assert lost_letters(load_tokenizer(tiny_tokenizer_dir)) == ""
    assert lost_letters(load_tokenizer(sentencepiece_file)) == ""  # bytes

    def plain(content: dict[str, Any]) -> None:
        content |= {"pre_tokenizer": None, "decoder": None}

    lost = lost_letters(load_tokenizer(edit(folder, plain)))
    assert "中" in lost
    assert "a" not in lost


def test_dropout_is_read_as_none(folder: Path) -> None:
    """Every encoding was another one: no two runs made the same corpus."""
    before = load_tokenizer(str(folder))
    after = load_tokenizer(edit(folder, lambda content: content["model"].update(dropout=0.5)))
    text = "Continual pre-training teaches a language model a new language"
    assert {tuple(after.encode(text)) for _ in range(20)} == {tuple(before.encode(text))}
    assert after.notes == (
        f"{folder}/tokenizer.json: model.dropout is 0.5, which makes every encoding another one; read as 0",
    )
    assert before.notes == ()


def test_tokens_that_only_the_configuration_names(folder: Path) -> None:
    """transformers adds them when it loads the folder, so SFT and chat knew tokens that no corpus had."""
    from transformers import AutoTokenizer

    tokens = {"401": {"content": "<b>", **FLAGS, "special": True}, "400": {"content": "公园散步", **FLAGS}}
    edit(folder, lambda content: content.update(added_tokens_decoder=tokens), "tokenizer_config.json")
    tokenizer, other = load_tokenizer(str(folder)), AutoTokenizer.from_pretrained(folder)
    assert tokenizer.vocab_size == len(other) == 402
    text = "我们去公园散步。"
    assert 400 in tokenizer.encode(text)
    assert tokenizer.encode(text) == other.encode(text)
    assert tokenizer.added_tokens() == ["公园散步"]
    assert tokenizer.notes == (
        f"{folder}/tokenizer_config.json: 2 tokens that tokenizer.json does not have ('公园散步', '<b>') are added",
    )
    edit(folder, lambda content: content["added_tokens_decoder"].pop("400"), "tokenizer_config.json")
    with pytest.raises(InputError, match=r"added_tokens_decoder.401 is '<b>', .* expected id 400, the next free one"):
        load_tokenizer(str(folder))
