"""The Tokenizer interface over tiny tokenizers of all three kinds."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers.models import Unigram

from megatron_cpt.tokenizer import Tokenizer, load_tokenizer
from megatron_cpt.tokenizer.tiktoken_llama3 import LONGEST_WHITESPACE, special_tokens
from megatron_cpt.utils.errors import InputError

SENTENCES = [
    "The fox's 12345 days.\n\n  Tabs\tand  spaces ",
    "今天天气很好，我们去公园。",
    "naïve 🦊 café",
    " lead",
    "",
]


@pytest.fixture(scope="session")
def rank_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiktoken file in Llama-3's format: 256 single bytes and four merges."""
    tokens = [bytes([byte]) for byte in range(256)] + [b"th", b"the", b" the", "今".encode()[:2]]
    path = tmp_path_factory.mktemp("tiktoken") / "ranks.anything"
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)))
    return str(path)


@pytest.fixture(scope="session")
def sentencepiece_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A SentencePiece BPE model with byte fallback and Llama-2's settings, under a name that gives nothing away."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the quick brown fox jumps over the lazy dog"] * 20 + ["the model reads text"] * 20),
        model_prefix=str(folder / "m"),
        vocab_size=340,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
    )
    return str((folder / "m.model").rename(folder / "tokenizer.model"))


@pytest.fixture(params=["hf", "tiktoken", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    fixture = {"hf": "tiny_tokenizer_dir", "tiktoken": "rank_file", "sentencepiece": "sentencepiece_file"}
    return load_tokenizer(request.getfixturevalue(fixture[request.param]))


def test_round_trip_batch_and_range(tokenizer: Tokenizer) -> None:
    encoded = tokenizer.encode_batch(SENTENCES)
    assert encoded == [tokenizer.encode(text) for text in SENTENCES]
    for text, ids in zip(SENTENCES, encoded, strict=True):
        assert tokenizer.decode(ids) == text
        assert all(0 <= token < tokenizer.vocab_size for token in ids)
    assert 0 <= tokenizer.eos_id < tokenizer.vocab_size


def test_token_bytes_add_up(tokenizer: Tokenizer) -> None:
    sizes = tokenizer.token_bytes()
    assert sizes.shape == (tokenizer.vocab_size,)
    assert sizes.dtype == np.int32
    assert sizes[tokenizer.eos_id] == 0
    dummy_prefix = 1 if tokenizer.name.startswith("sentencepiece") else 0
    for text in SENTENCES:
        assert sizes[tokenizer.encode(text)].sum() == len(text.encode()) + (dummy_prefix if text else 0)


@settings(deadline=None)
@given(text=st.text())
def test_byte_level_bytes_are_exact_for_any_text(tiny_tokenizer_dir: str, rank_file: str, text: str) -> None:
    for path in (tiny_tokenizer_dir, rank_file):
        tokenizer = load_tokenizer(path)
        assert tokenizer.token_bytes()[tokenizer.encode(text)].sum() == len(text.encode())


def test_special_text_in_a_document_does_not_end_it(tokenizer: Tokenizer) -> None:
    for special in ("<|endoftext|>", "<|end_of_text|>", "</s>"):
        ids = tokenizer.encode(f"a{special}b")
        assert tokenizer.eos_id not in ids
        assert tokenizer.decode(ids) == f"a{special}b"


def test_hf_file_and_folder_are_the_same(tiny_tokenizer_dir: str) -> None:
    folder, file = load_tokenizer(tiny_tokenizer_dir), load_tokenizer(tiny_tokenizer_dir + "/tokenizer.json")
    assert folder.fingerprint == file.fingerprint
    assert (folder.eos_id, folder.bos_id) == (0, 0)


def test_hf_added_tokens_are_counted(tiny_tokenizer_dir: str, tmp_path: Path) -> None:
    content = json.loads((Path(tiny_tokenizer_dir) / "tokenizer.json").read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    content["added_tokens"] += [
        {"id": 410, "content": "北京", "special": False, **flags},
        {"id": 411, "content": "<end>", "special": True, **flags},
    ]
    content["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    added = load_tokenizer(str(tmp_path), eos_token="<end>")
    assert added.vocab_size > 400  # the library gives added tokens the next free ids
    assert added.eos_id == added.vocab_size - 1
    text = "去北京 now, not later"
    assert added.eos_id - 1 in added.encode(text)
    assert added.token_bytes()[added.encode(text)].sum() == len(text.encode())
    assert added.token_bytes()[added.eos_id] == 0


def test_eos_override_changes_the_fingerprint(tiny_tokenizer_dir: str) -> None:
    default, other = load_tokenizer(tiny_tokenizer_dir), load_tokenizer(tiny_tokenizer_dir, eos_token="!")
    assert other.decode([other.eos_id]) == "!"
    assert default.fingerprint != other.fingerprint


def test_llama3_special_tokens(rank_file: str) -> None:
    tokenizer = load_tokenizer(rank_file)
    names = special_tokens()
    assert len(names) == len(set(names)) == 256
    assert tokenizer.vocab_size == 260 + 256
    assert (tokenizer.bos_id, tokenizer.eos_id) == (260, 261)
    assert tokenizer.decode([260, 266, 269]) == "<|begin_of_text|><|start_header_id|><|eot_id|>"
    assert names[255] == "<|reserved_special_token_250|>"
    assert load_tokenizer(rank_file, eos_token="<|eot_id|>").eos_id == 269
    assert load_tokenizer(rank_file, eos_token="<|eom_id|>").eos_id == 268


def test_llama3_survives_a_million_spaces(rank_file: str) -> None:
    tokenizer = load_tokenizer(rank_file)
    text = " " * (3 * LONGEST_WHITESPACE + 5) + "x"
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("kind", ["tiny_tokenizer_dir", "rank_file", "sentencepiece_file"])
def test_unknown_eos_token_is_named(kind: str, request: pytest.FixtureRequest) -> None:
    with pytest.raises(InputError, match="<missing>"):
        load_tokenizer(request.getfixturevalue(kind), eos_token="<missing>")


def test_no_eos_known(tiny_tokenizer_dir: str, tmp_path: Path) -> None:
    shutil.copy(Path(tiny_tokenizer_dir) / "tokenizer.json", tmp_path)
    with pytest.raises(InputError, match="end-of-document"):
        load_tokenizer(str(tmp_path))


def test_characters_without_a_token(tmp_path: Path) -> None:
    """A model without a token for unknown characters fails on the first text that has one: at once, not in mid-corpus."""
    model = Backend(Unigram([("a", -1.0), ("</s>", -2.0)]))
    model.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match=r"a character without a token cannot be encoded .*unk_id"):
        load_tokenizer(str(tmp_path), eos_token="</s>")


@pytest.mark.parametrize("content", [b"", b"{}", b"no tokenizer", b"YQ== 0\nYg== 7\n", b"YQ== 0\n?\n"])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "tokenizer.model"
    file.write_bytes(content)
    with pytest.raises(InputError, match="expected"):
        load_tokenizer(str(file))


def test_missing_paths_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing there"):
        load_tokenizer(str(tmp_path / "none"))
    with pytest.raises(InputError, match="folder without"):
        load_tokenizer(str(tmp_path))


def test_imports_neither_torch_nor_transformers() -> None:
    program = "import sys, megatron_cpt.corpus.preprocess; print({'torch', 'transformers', 'tiktoken'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_no_name_is_not_the_folder_this_runs_in(tiny_tokenizer_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny_tokenizer_dir)
    assert load_tokenizer(".").vocab_size > 0
    with pytest.raises(InputError, match=r"^tokenizer is ''; expected a tokenizer\.json or tokenizer\.model"):
        load_tokenizer("")
