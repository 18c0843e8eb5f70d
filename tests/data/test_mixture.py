"""The mixture file: what a good one means, and every way a bad one is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_cpt.data.indexed import IndexedCorpus
from megatron_cpt.data.mixture import Mixture, load_mixture
from megatron_cpt.data.preprocess import PreprocessConfig, preprocess
from megatron_cpt.errors import InputError

SENTENCES = {
    "en": "The quick brown fox number {} jumps over the lazy dog and runs away into the woods.",
    "code": "def function_{}(x): return x + 1",
    "zh": "第{}天，今天天气很好，我们去公园散步。",
    "zh_valid": "第{}句，持续预训练让语言模型学习一门新的语言。",
}


@pytest.fixture(scope="session")
def corpora(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: str) -> Path:
    """A folder with the corpora en, code, zh and zh_valid, and `short`, which has fewer tokens than a sample."""
    folder = tmp_path_factory.mktemp("corpora")
    documents = {name: [sentence.format(i) for i in range(40)] for name, sentence in SENTENCES.items()}
    for name, texts in (documents | {"short": ["one"]}).items():
        source = folder / f"{name}.jsonl"
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        language = "zh" if "zh" in name else "en"
        preprocess(PreprocessConfig(str(source), tiny_tokenizer_dir, str(folder / name), language, workers=1))
    return folder


@pytest.fixture
def folder(tmp_path: Path, corpora: Path) -> Path:
    """A copy of the corpora that a test may break."""
    for file in corpora.iterdir():
        shutil.copy(file, tmp_path)
    return tmp_path


GOOD: dict[str, Any] = {
    "seq_length": 32,
    "seed": 1234,
    "almr": 0.1,
    "general": [{"prefix": "en"}, {"prefix": "code"}],
    "additional": [{"prefix": "zh"}],
    "validation": [{"prefix": "zh_valid"}],
}
MISSING = object()


def write(folder: Path, **changes: Any) -> str:
    fields = {name: value for name, value in (GOOD | changes).items() if value is not MISSING}
    (folder / "mixture.yaml").write_text(yaml.safe_dump(fields))
    return str(folder / "mixture.yaml")


def load(folder: Path, **changes: Any) -> Mixture:
    return load_mixture(write(folder, **changes))


def refusal(folder: Path, **changes: Any) -> str:
    """The message that a mixture with these changes gets."""
    path = write(folder, **changes)
    with pytest.raises(InputError) as caught:
        load_mixture(path)
    assert str(folder) in str(caught.value)  # every message names a file
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_good_mixture(folder: Path) -> None:
    mixture = load(folder)
    assert (mixture.seq_length, mixture.seed) == (32, 1234)
    assert mixture.almr == Fraction(1, 10)  # as written, not the nearest binary number
    assert [corpus.name for corpus in mixture.corpora] == ["en", "code", "zh"]
    assert [corpus.language for corpus in mixture.corpora + mixture.validation] == ["en", "en", "zh", "zh"]
    assert [corpus.name for corpus in mixture.validation] == ["zh_valid"]
    assert mixture.manifest.tokenizer.vocab_size == 400
    counts = mixture.splitter_tree().counts(1000)
    assert counts[2] == 100
    tokens = IndexedCorpus(str(folder / "en")).num_tokens
    assert mixture.corpora[0].num_samples(32) == (tokens - 1) // 32
    assert mixture.corpora[0].num_samples(tokens - 1) == 1
    assert mixture.corpora[0].num_samples(tokens) == 0


def test_weights_default_to_tokens(folder: Path) -> None:
    mixture = load(folder)
    assert [corpus.weight for corpus in mixture.corpora] == [corpus.data.num_tokens for corpus in mixture.corpora]
    english, code, _ = mixture.corpora
    wanted = 900 * english.weight / (english.weight + code.weight)
    assert abs(mixture.splitter_tree().counts(1000)[0] - wanted) <= 1


def test_weights_and_names_that_are_given(folder: Path) -> None:
    general = [{"prefix": "en", "weight": 0.3, "name": "english"}, {"prefix": "code", "weight": 0.1}]
    mixture = load(folder, general=general, almr=0.5)
    assert [corpus.weight for corpus in mixture.general] == [Fraction(3, 10), Fraction(1, 10)]
    assert [corpus.name for corpus in mixture.general] == ["english", "code"]
    assert mixture.splitter_tree().counts(800) == [300, 100, 400]


def test_prefixes_are_relative_to_the_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "sub").mkdir()
    fields = GOOD | {"general": [{"prefix": "../en"}, {"prefix": str(folder / "code")}]}
    fields |= {"additional": [{"prefix": "../zh"}], "validation": []}
    (folder / "sub" / "m.yaml").write_text(yaml.safe_dump(fields))
    monkeypatch.chdir(folder / "sub")
    for path in ("m.yaml", "./m.yaml", str(folder / "sub" / "m.yaml")):
        assert [os.path.realpath(corpus.prefix) for corpus in load_mixture(path).corpora] == [
            os.path.realpath(folder / name) for name in ("en", "code", "zh")
        ]


def test_one_group_is_enough_when_it_has_all_the_share(folder: Path) -> None:
    assert [c.name for c in load(folder, almr=0, additional=MISSING).corpora] == ["en", "code"]
    assert [c.name for c in load(folder, almr=1.0, general=[]).corpora] == ["zh"]
    assert load(folder, almr=0).splitter_tree().counts(100)[2] == 0  # listed, but not used
    assert load(folder, validation=MISSING).validation == ()


@pytest.mark.parametrize("almr", [-0.1, 1.5, float("nan"), float("inf"), True, "a third", None, [0.3], MISSING])
def test_almr(folder: Path, almr: Any) -> None:
    found = None if almr is MISSING else almr
    assert f"mixture.yaml: almr is {found!r}; use a number from 0 to 1" in refusal(folder, almr=almr)


@pytest.mark.parametrize(
    ("field", "value", "minimum"),
    [
        ("seq_length", 0, 1),
        ("seq_length", -32, 1),
        ("seq_length", 32.0, 1),
        ("seq_length", "32", 1),
        ("seq_length", True, 1),
        ("seq_length", MISSING, 1),
        ("seed", -1, 0),
        ("seed", 0.5, 0),
        ("seed", MISSING, 0),
    ],
)
def test_whole_numbers(folder: Path, field: str, value: Any, minimum: int) -> None:
    found = None if value is MISSING else value
    wanted = f"mixture.yaml: {field} is {found!r}; use a whole number, {minimum} or more"
    assert wanted in refusal(folder, **{field: value})


def test_unknown_fields(folder: Path) -> None:
    assert "mixture.yaml: unknown field 'sequence_length'" in refusal(folder, sequence_length=32)
    path = write(folder, zzz=1)
    with open(path, "a") as file:
        file.write("on: 2\n")  # YAML for True: two keys that do not compare
    with pytest.raises(InputError, match="unknown field 'True'"):
        load_mixture(path)
    entry = {"prefix": "en", "wieght": 2}
    assert "general[1] has unknown field 'wieght'" in refusal(folder, general=[{"prefix": "code"}, entry])


@pytest.mark.parametrize("entry", [{"name": "en"}, {"prefix": 3}, {"prefix": None}, "en", None])
@pytest.mark.parametrize("group", ["general", "additional", "validation"])
def test_an_entry_without_prefix(folder: Path, group: str, entry: Any) -> None:
    assert f"mixture.yaml: {group}[0] is {entry!r}; use an entry with a prefix" in refusal(folder, **{group: [entry]})


@pytest.mark.parametrize("entries", ["en", {"prefix": "en"}, 3])
def test_a_group_that_is_not_a_list(folder: Path, entries: Any) -> None:
    assert f"mixture.yaml: general is {entries!r}; use a list" in refusal(folder, general=entries)


@pytest.mark.parametrize(
    ("almr", "group", "share"), [(0.25, "additional", "0.25"), (1, "additional", "1"), (0.25, "general", "0.75")]
)
def test_a_share_without_corpus(folder: Path, almr: float, group: str, share: str) -> None:
    wanted = f"mixture.yaml: almr {almr:g} gives the {group} group a share of {share} but it lists no corpus"
    assert wanted in refusal(folder, almr=almr, **{group: []})


@pytest.mark.parametrize("weight", [0, -1, float("inf"), float("nan"), True, "two", None])
def test_weights(folder: Path, weight: Any) -> None:
    general = [{"prefix": "en", "weight": 1}, {"prefix": "code", "weight": weight}]
    assert f"mixture.yaml: general[1].weight is {weight!r}; use a number above 0" in refusal(folder, general=general)


def test_weights_partly_given(folder: Path) -> None:
    general = [{"prefix": "en", "weight": 1}, {"prefix": "code"}]
    assert "mixture.yaml: general[1] has no weight but others in the group do" in refusal(folder, general=general)
    mixture = load(folder, general=[{**entry, "weight": 1} for entry in general])  # each group decides for itself
    assert [corpus.weight for corpus in mixture.corpora] == [1, 1, mixture.corpora[2].data.num_tokens]


def test_names_are_unique(folder: Path) -> None:
    """Run manifests and metrics know corpora by their names: general and additional ones together."""
    twice = [{"prefix": "en"}, {"prefix": "code", "name": "en"}]
    assert "mixture.yaml: two training corpora are named 'en'; set different names" in refusal(folder, general=twice)
    across = [{"prefix": "zh", "name": "code"}]
    assert "two training corpora are named 'code'" in refusal(folder, additional=across)
    validation = [{"prefix": "zh_valid", "name": "v"}, {"prefix": "short", "name": "v"}]
    assert "two validation sets are named 'v'" in refusal(folder, validation=validation, seq_length=1)
    assert load(folder, validation=[{"prefix": "zh_valid", "name": "zh"}]).validation[0].name == "zh"


def test_another_tokenizer(folder: Path) -> None:
    manifest = json.loads((folder / "zh.json").read_text())
    manifest["tokenizer"] |= {"fingerprint": "0" * 64, "name": "hf:other", "path": "/other", "vocab_size": 500}
    (folder / "zh.json").write_text(json.dumps(manifest))
    message = refusal(folder)
    assert f"{folder}/zh.json was made with tokenizer hf:other (/other, 500 tokens) but {folder}/en.json with" in message
    assert "400 tokens)" in message


@pytest.mark.parametrize("group", ["general", "additional", "validation"])
def test_a_corpus_shorter_than_a_sample(folder: Path, group: str) -> None:
    tokens = IndexedCorpus(str(folder / "short")).num_tokens
    message = refusal(folder, **{group: [{"prefix": "short"}]})
    assert f"{folder}/short.bin has {tokens} tokens; one sample at seq_length 32 takes 33" in message
    assert load(folder, seq_length=tokens - 1, **{group: [{"prefix": "short"}]}) is not None


@pytest.mark.parametrize("prefix", ["zh", "./zh", "sub/../zh", "link"])
def test_a_corpus_in_training_and_validation(folder: Path, prefix: str) -> None:
    (folder / "sub").mkdir()
    (folder / "link").symlink_to(folder / "zh")
    for suffix in (".bin", ".idx", ".json"):
        (folder / f"link{suffix}").symlink_to(folder / f"zh{suffix}")
    message = refusal(folder, validation=[{"prefix": prefix, "name": "valid"}])
    assert "is both a training corpus and a validation set" in message
    assert prefix in message


def test_a_truncated_bin(folder: Path) -> None:
    path = folder / "zh.bin"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-2])
    assert f"{path}: found {size - 2} bytes; wanted {size}" in refusal(folder)


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".json"])
def test_a_missing_file(folder: Path, suffix: str) -> None:
    (folder / f"zh{suffix}").unlink()
    assert f"{folder}/zh{suffix}: no such file" in refusal(folder)


def test_a_manifest_of_another_corpus(folder: Path) -> None:
    shutil.copy(folder / "en.json", folder / "zh.json")
    counts = {name: IndexedCorpus(str(folder / name)).num_tokens for name in ("en", "zh")}
    assert f"{folder}/zh.bin has {counts['zh']} tokens but {folder}/zh.json says {counts['en']}" in refusal(folder)


@pytest.mark.parametrize("content", [b"almr: [0.1", b"a: b: c", b"\xff\xfe\x00", b"\tseq_length: 3"])
def test_not_yaml(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        load_mixture(str(path))
    assert str(caught.value).startswith(f"mixture file {path} is not YAML: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("content", "found"), [("", "NoneType"), ("[1]", "list"), ("text", "str")])
def test_yaml_without_fields(tmp_path: Path, content: str, found: str) -> None:
    path = tmp_path / "m.yaml"
    path.write_text(content)
    with pytest.raises(InputError) as caught:
        load_mixture(str(path))
    assert f"mixture file {path} must hold fields (seq_length, almr, ...), found {found}" in str(caught.value)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"mixture file .*nothing\.yaml: No such file"):
        load_mixture(str(tmp_path / "nothing.yaml"))
    with pytest.raises(InputError, match=r"mixture file .*: Is a directory"):
        load_mixture(str(tmp_path))


@pytest.mark.parametrize(("written", "almr"), [("0.1", Fraction(1, 10)), ("1e-1", Fraction(1, 10)), ("1", Fraction(1))])
def test_numbers_mean_what_is_written(folder: Path, written: str, almr: Fraction) -> None:
    # PyYAML reads 1e-1 as text and 0.1 as a binary fraction; both mean one tenth here.
    path = Path(write(folder))
    path.write_text(re.sub(r"almr: .*", f"almr: {written}", path.read_text()))
    assert load_mixture(str(path)).almr == almr
