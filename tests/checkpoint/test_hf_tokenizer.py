"""One reading of a tokenizer's folder: preprocessing, fine-tuning, evaluation, chat and conversion give the same ids."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_cpt.checkpoint.hf_tokenizer import TOKENIZER_FILES, load_hf_tokenizer, other_reading
from megatron_cpt.convert.added_tokens import add_tokens
from megatron_cpt.tokenizer import load_tokenizer
from megatron_cpt.tokenizer.behaviour import PROBES, behaviour_sha256
from megatron_cpt.utils.errors import InputError

NUMBERS = "650841823 and 2024"
TOKENS = ["公园散步", "Brown Fox", "ＡＢＣ", "公园"]
PREPEND = [
    {"type": "Prepend", "prepend": "▁"},
    {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
]


def edit(folder: Path, name: str, **changes: Any) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes, ensure_ascii=False, indent=2))


@pytest.fixture
def folder(tiny_tokenizer_dir: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_tokenizer_dir, tmp_path / "model"))


@pytest.fixture
def digits(folder: Path) -> Path:
    """Numbers are cut into digits, which the class that its configuration names does not do."""
    byte_level = json.loads((folder / "tokenizer.json").read_text())["pre_tokenizer"]
    cut = {"type": "Digits", "individual_digits": True}
    edit(folder, "tokenizer.json", pre_tokenizer={"type": "Sequence", "pretokenizers": [cut, byte_level]})
    edit(folder, "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")
    return folder


def test_the_class_does_not_decide_how_text_is_split(digits: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoTokenizer

    own = load_tokenizer(str(digits))
    assert AutoTokenizer.from_pretrained(digits).encode(NUMBERS) != own.encode(NUMBERS)
    tokenizer = load_hf_tokenizer(str(digits))
    assert [tokenizer.encode(text, split_special_tokens=True) for text in PROBES] == [own.encode(text) for text in PROBES]
    said = capfd.readouterr().err
    assert f"note: {digits}/tokenizer_config.json: tokenizer_class is GPT2Tokenizer, by which transformers and" in said
    assert "expected PreTrainedTokenizerFast" in said
    edit(digits, "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    load_hf_tokenizer(str(digits))
    assert "note: " not in capfd.readouterr().err


def test_a_class_that_reads_the_same_is_not_mentioned(folder: Path) -> None:
    edit(folder, "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")
    assert other_reading(str(folder)) is None
    edit(folder, "tokenizer_config.json", tokenizer_class="CodeLlamaTokenizer")
    assert "cannot use this tokenizer" in str(other_reading(str(folder)))


def test_dropout_is_off(folder: Path) -> None:
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    edit(folder, "tokenizer.json", model=model | {"dropout": 0.9})
    tokenizer = load_hf_tokenizer(str(folder))
    assert {tuple(tokenizer.encode("the quick brown fox")) for _ in range(20)} == {
        tuple(load_tokenizer(str(folder)).encode("the quick brown fox"))
    }


def test_a_normalizer_that_makes_gigabytes_of_a_word(folder: Path) -> None:
    def sequence(*steps: dict[str, Any]) -> None:
        edit(folder, "tokenizer.json", normalizer={"type": "Sequence", "normalizers": list(steps)})

    def replace(pattern: str, content: str, kind: str = "String") -> dict[str, Any]:
        return {"type": "Replace", "pattern": {kind: pattern}, "content": content}

    sequence(replace("a", "a" * 64), replace("b", "b" * 64), *(replace(sign, f" {sign} ") for sign in ".,:;!?()[]"))
    load_tokenizer(str(folder))  # each acts on another character
    hostile = [
        [replace("a", "a" * 64), replace("a", "a" * 64)],
        [replace("a", "b" * 64), replace("b", "c" * 64)],
        [replace(".", "b" * 64, "Regex"), replace("b", "c" * 64)],
        [replace("c", "a" * 64), replace("[a-z]", "c" * 64, "Regex")],
        [{"type": "Prepend", "prepend": "x" * 1001}],
        [replace("a", "a")] * 501,
    ]
    for steps in hostile:
        sequence(*steps)
        for read in (load_hf_tokenizer, load_tokenizer):
            with pytest.raises(InputError, match=r"normalizer (makes .* expected at most 1000 times|has 501 steps)"):
                read(str(folder))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("tokenizer_config.json", {"eos_token": 5}),
        ("tokenizer_config.json", {"extra_special_tokens": 5}),
        ("tokenizer_config.json", {"added_tokens_decoder": [1]}),
        ("tokenizer_config.json", {"added_tokens_decoder": None}),
        ("tokenizer_config.json", {"bos_token": {"special": True}}),
        ("tokenizer_config.json", {"extra_special_tokens": {"image_token": 5}}),
        ("tokenizer_config.json", {"additional_special_tokens": ["<|im_end|>", 5]}),
        ("tokenizer_config.json", {"chat_template": [{"name": "default"}]}),
        ("tokenizer_config.json", {"model_input_names": None}),
        ("tokenizer_config.json", {"split_special_tokens": "no"}),
        ("tokenizer_config.json", {"tokenizer_object": {}}),
        ("tokenizer.json", {"model": [["a", 1]]}),
        ("tokenizer.json", {"added_tokens": [1]}),
        ("tokenizer.json", {"added_tokens": {"content": "x"}}),
    ],
)
def test_fields_of_another_kind(name: str, change: dict[str, Any], folder: Path) -> None:
    edit(folder, name, **change)
    with pytest.raises(InputError, match=str(folder)):
        load_hf_tokenizer(str(folder))


@pytest.mark.parametrize("merges", [["a b"], [["a", "b"]], [["##a", "##b"], []], [5]])
def test_merges_without_the_prefix_of_inner_pieces(merges: list[Any], folder: Path) -> None:
    """The library cuts the prefix off whatever the second part is, and ends the process where that is no character."""
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    edit(folder, "tokenizer.json", model=model | {"continuing_subword_prefix": "##", "merges": merges})
    for read in (load_hf_tokenizer, load_tokenizer):
        with pytest.raises(InputError, match=r"model\.merges has .*; expected a second part that begins with"):
            read(str(folder))


def test_a_bare_model_file_that_transformers_reads_otherwise(tmp_path: Path) -> None:
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the quick brown fox jumps over the lazy dog"] * 20),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        add_dummy_prefix=False,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
    )
    config = {"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"transformers splits .* otherwise than tokenizer.model says"):
        load_hf_tokenizer(str(tmp_path))


def test_names_that_no_token_has(folder: Path) -> None:
    edit(folder, "tokenizer_config.json", pad_token="[PAD]")
    with pytest.raises(InputError, match=r"tokenizer_config.json: names '\[PAD\]', which is no token of hf:model"):
        load_hf_tokenizer(str(folder))


def test_files_that_were_changed_after_the_training(digits: Path) -> None:
    known = {"name": "hf:model", "behaviour_sha256": behaviour_sha256(load_tokenizer(str(digits)))}
    (digits / "manifest.json").write_text(json.dumps({"kind": "megatron-to-hf", "tokenizer": known}))
    load_hf_tokenizer(str(digits))
    edit(digits, "tokenizer.json", normalizer={"type": "NFKC"})
    with pytest.raises(InputError, match=r"manifest.json: tokenizer.behaviour_sha256 is .* splits text otherwise"):
        load_hf_tokenizer(str(digits))
    (digits / "manifest.json").write_text(json.dumps({"kind": "megatron-to-hf"}))
    load_hf_tokenizer(str(digits))


def added(folder: Path, tmp_path: Path, tokens: list[str]) -> Path:
    (tmp_path / "tokens.txt").write_text("\n".join(tokens), encoding="utf-8")
    target = tmp_path / "added"
    target.mkdir()
    add_tokens(str(folder), str(tmp_path / "tokens.txt"), str(target), TOKENIZER_FILES)
    return target


@pytest.mark.parametrize("indent", [None, 2])
def test_nothing_else_in_tokenizer_json_changes(indent: int | None, digits: Path, tmp_path: Path) -> None:
    path = digits / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()), indent=indent, ensure_ascii=False))
    before = path.read_text()
    after = (added(digits, tmp_path, TOKENS) / "tokenizer.json").read_text()
    place = before.index("]", before.index('"added_tokens"'))
    head, tail = before[:place].rstrip(), before[before[:place].rstrip().__len__() :]
    assert after.startswith(head)
    assert after.endswith(tail)
    content = json.loads(after)
    entries = content.pop("added_tokens")
    assert [(entry["id"], entry["content"]) for entry in entries[1:]] == list(enumerate(TOKENS, 400))
    old = json.loads(before)
    assert entries[:1] == old.pop("added_tokens")
    assert content == old
    assert (tmp_path / "added" / "tokenizer_config.json").read_bytes() == (digits / "tokenizer_config.json").read_bytes()
    assert load_tokenizer(str(tmp_path / "added")).encode(NUMBERS) == load_tokenizer(str(digits)).encode(NUMBERS)


@pytest.mark.parametrize("normalizer", [None, {"type": "Lowercase"}, {"type": "NFKC"}])
def test_a_text_with_the_token_is_encoded_with_it(normalizer: Any, folder: Path, tmp_path: Path) -> None:
    edit(folder, "tokenizer.json", normalizer=normalizer)
    target = added(folder, tmp_path, TOKENS)
    for tokenizer in (load_tokenizer(str(target)), load_hf_tokenizer(str(target))):
        for number, token in enumerate(TOKENS, 400):
            for text in (token, f"we saw {token}, then", f"我们去{token}玩了"):
                assert list(tokenizer.encode(text)).count(number) == 1


def test_a_normalizer_that_puts_a_space_before_texts(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """As Llama 2's: a token that is matched after it had a row and was never found within a text."""
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    for piece in ("▁", *(f"<0x{byte:02X}>" for byte in range(256))):
        vocabulary.setdefault(piece, len(vocabulary))
    replace = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    edit(
        folder,
        "tokenizer.json",
        model=content["model"] | {"byte_fallback": True},
        normalizer={"type": "Sequence", "normalizers": PREPEND},
        pre_tokenizer=None,
        decoder={"type": "Sequence", "decoders": [replace, {"type": "ByteFallback"}, {"type": "Fuse"}, strip]},
    )
    number = len(vocabulary)
    target = added(folder, tmp_path, ["公园散步"])
    assert load_tokenizer(str(target)).encode("我们去公园散步。").count(number) == 1
    assert "as this tokenizer takes what follows an added token for the beginning of a text" in capfd.readouterr().err


def test_a_class_that_goes_by_the_configuration_knows_them_too(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    end = {"content": "<|endoftext|>", "special": True, "lstrip": False, "rstrip": False, "normalized": False}
    edit(folder, "tokenizer_config.json", tokenizer_class="GPT2Tokenizer", added_tokens_decoder={"0": end})
    target = added(folder, tmp_path, TOKENS)
    assert AutoTokenizer.from_pretrained(target).encode("公园散步") == [400]


def test_ids_with_gaps_are_refused(folder: Path, tmp_path: Path) -> None:
    """The next free id, by the library, is that of another token."""
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    last = next(token for token, number in vocabulary.items() if number == 399)
    edit(folder, "tokenizer.json", model=content["model"] | {"vocab": vocabulary | {last: 400}})
    with pytest.raises(InputError, match=r"would have id 400, which is that of .*: the ids of the tokenizer have gaps"):
        added(folder, tmp_path, ["公园散步"])


def test_a_special_token_is_there_already(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    target = added(folder, tmp_path, ["<|endoftext|>", "公园", "公园"])
    assert "2 of 3 are there already" in capfd.readouterr().err
    assert load_tokenizer(str(target)).vocab_size == 401
