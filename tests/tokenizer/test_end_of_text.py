"""Which token ends documents: that of pre-training, also in the folders of chat models, and why is said at once."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_tokenizer import make_tiny_tokenizer

from megatron_cpt.corpus.indexed_dataset import IndexedCorpus
from megatron_cpt.tokenizer import load_tokenizer
from megatron_cpt.utils.errors import InputError

ROOT = Path(__file__).parents[2]
LLAMA3 = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>"]
CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def make(folder: Path, specials: list[str], names: dict[str, Any], **files: dict[str, Any]) -> str:
    """A folder with these special tokens from id 400 on ("<|endoftext|>" has id 0), and these configurations."""
    make_tiny_tokenizer(folder)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    if "<|endoftext|>" not in specials:
        content = json.loads(path.read_text().replace("<|endoftext|>", "<|unused|>"))
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    more = [token for token in specials if token != "<|endoftext|>"]
    content["added_tokens"] += [{"id": 400 + i, "content": token, **flags} for i, token in enumerate(more)]
    path.write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    for name, fields in files.items():
        (folder / f"{name}.json").write_text(json.dumps(fields))
    return str(folder)


def ids(*tokens: str) -> list[int]:
    return [400 + LLAMA3.index(token) for token in tokens]


@pytest.mark.parametrize(
    ("specials", "config", "files", "wanted", "reason"),
    [
        (LLAMA3, {"eos_token": "<|end_of_text|>"}, {}, "<|end_of_text|>", "the eos_token of tokenizer_config.json"),
        # Llama-3.1-Instruct, and Llama-3-Instruct, whose generation_config.json lists both too
        (
            LLAMA3,
            {"eos_token": "<|eot_id|>"},
            {"generation_config": {"eos_token_id": ids("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")}},
            "<|end_of_text|>",
            "an eos_token_id of generation_config.json; <|eot_id|>, the eos_token of tokenizer_config.json, ends turns",
        ),
        (LLAMA3, {"eos_token": "<|eot_id|>"}, {}, "<|end_of_text|>", "the end of text among the special tokens; <|eot_id|>"),
        (
            LLAMA3,
            {"eos_token": {"content": "<|eot_id|>"}},
            {"config": {"eos_token_id": ids("<|end_of_text|>")[0]}},
            "<|end_of_text|>",
            "an eos_token_id of config.json",
        ),
        # SmolLM2-Instruct, Qwen-Instruct
        (
            CHATML,
            {"eos_token": "<|im_end|>"},
            {},
            "<|endoftext|>",
            "the end of text among the special tokens; <|im_end|>",
        ),
        (
            CHATML,
            {"eos_token": "<|im_end|>"},
            {"generation_config": {"eos_token_id": [401, 0]}},
            "<|endoftext|>",
            "an eos_token_id of generation_config.json",
        ),
        (
            CHATML,
            {"eos_token": "<|endoftext|>"},
            {"generation_config": {"eos_token_id": [401, 0]}},
            "<|endoftext|>",
            "the eos",
        ),
        # Llama-2-chat, Mistral-Instruct: one token for both
        (["<s>", "</s>"], {"eos_token": "</s>"}, {"generation_config": {"eos_token_id": 401}}, "</s>", "the eos_token of"),
        # Gemma-it
        (
            ["<eos>", "<end_of_turn>"],
            {"eos_token": "<end_of_turn>"},
            {},
            "<eos>",
            "the end of text among the special tokens",
        ),
        # nothing else is known
        (["<|im_end|>"], {"eos_token": "<|im_end|>"}, {}, "<|im_end|>", "which ends turns of a chat; no other is known"),
        # no tokenizer_config.json names one
        (
            ["<stop>"],
            {},
            {"generation_config": {"eos_token_id": 400}},
            "<stop>",
            "an eos_token_id of generation_config.json",
        ),
    ],
)
def test_the_token_and_why(
    specials: list[str], config: dict[str, Any], files: dict[str, Any], wanted: str, reason: str, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(make(tmp_path, specials, config, **files))
    assert tokenizer.eos_token == wanted
    assert tokenizer.decode([tokenizer.eos_id]) == wanted
    assert reason in tokenizer.eos_reason


def test_a_turn_that_only_generation_config_names_is_no_end_of_text(tmp_path: Path) -> None:
    folder = make(tmp_path, ["<|im_end|>"], {}, generation_config={"eos_token_id": 400})
    with pytest.raises(InputError, match="names no end-of-document token"):
        load_tokenizer(folder)


def test_what_begins_a_turn_begins_no_text(tmp_path: Path) -> None:
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    assert load_tokenizer(make(tmp_path, CHATML, names)).bos_id is None
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names | {"bos_token": "<|endoftext|>"}))
    assert load_tokenizer(str(tmp_path)).bos_id == 0


def test_the_setting_wins(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(make(tmp_path, LLAMA3, {"eos_token": "<|end_of_text|>"}), eos_token="<|eot_id|>")
    assert (tokenizer.eos_token, tokenizer.eos_reason) == ("<|eot_id|>", "the setting eos_token")


@pytest.mark.parametrize("setting", [None, "<|eot_id|>"])
def test_preprocessing_says_it_first_and_writes_it_down(setting: str | None, tmp_path: Path) -> None:
    """As with Llama-3-Instruct's folder, whose documents ended with the token that ends turns."""
    folder = tmp_path / "instruct"
    folder.mkdir()
    make(folder, LLAMA3, {"eos_token": "<|eot_id|>"})
    (tmp_path / "a.jsonl").write_text('{"text": "the fox"}\n{"text": "公园"}\n')
    options = ["--input", str(tmp_path / "a.jsonl"), "--tokenizer", str(folder), "--language", "en", "--workers", "1"]
    options += ["--eos_token", setting] if setting else []
    command = [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), *options, "--output_prefix", str(tmp_path / "c")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    token = setting or "<|end_of_text|>"
    number = 400 + LLAMA3.index(token)
    said = done.stderr.splitlines()[0]
    assert said.startswith(f"documents end with {token} (id {number}), ")
    assert said.endswith("(--eos_token takes another)")
    assert ("ends turns of a chat" in said) == (setting is None)
    corpus = IndexedCorpus(str(tmp_path / "c"))
    assert [int(corpus[i][-1]) for i in range(2)] == [number, number]
    assert np.count_nonzero(np.concatenate([corpus[0], corpus[1]]) >= 400) == 2
    facts = json.loads((tmp_path / "c.json").read_text())["tokenizer"]
    assert (facts["eos_id"], facts["eos_token"]) == (number, token)
    assert facts["eos_reason"] in said


def test_a_name_of_the_hub_says_how_to_download(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"hf download meta-llama/Llama-3.1-8B --local-dir Llama-3.1-8B$"):
        load_tokenizer("meta-llama/Llama-3.1-8B")
    with pytest.raises(InputError) as there:
        load_tokenizer(str(shutil.copytree(tmp_path, tmp_path / "is_there")))
    assert "hf download" not in str(there.value)
