"""Codes that are no language are refused, and a language that the text is not in is noticed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from curated_texts import CHINESE, ENGLISH, document
from tiny_corpora import run, write_lines

from megatron_cpt.config.cli import run_tool
from megatron_cpt.corpus.import_megatron import ImportCorpusConfig, import_corpora
from megatron_cpt.corpus.language_check import unlike
from megatron_cpt.corpus.manifest import manifest_path, read_corpus_manifest
from megatron_cpt.corpus.preprocess import PreprocessConfig, preprocess
from megatron_cpt.evaluation.config import TextConfig
from megatron_cpt.posttrain.data import SourceConfig
from megatron_cpt.utils.errors import InputError
from megatron_cpt.utils.language_codes import ISO_639_1, RIGHT_CODE, check_language


def refusal_of_preprocessing(folder: Path, tokenizer: str, language: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The line that preprocess_data.py refuses a language with; nothing is written."""
    source = write_lines(folder / "a.jsonl", [{"text": "a"}])
    words = ["--input", source, "--tokenizer", tokenizer, "--output_prefix", str(folder / "c"), "--language", language]
    with pytest.raises(SystemExit) as end:
        run_tool(preprocess, PreprocessConfig, "", words)
    assert end.value.code == 2
    assert [path.name for path in folder.iterdir()] == ["a.jsonl"]
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    "language", ["xx", "z", "q1", "xx-Latn", "_", "zz_ZZ", "e n", "../x", "zh/tw", "zh.", "zh-", "中文"]
)
def test_no_language(language: str, tmp_path: Path, tiny_tokenizer_dir: str, capsys: pytest.CaptureFixture[str]) -> None:
    expected = "expected an ISO 639 code, as in zh, or a longer name, as in code"
    line = refusal_of_preprocessing(tmp_path, tiny_tokenizer_dir, language, capsys)
    assert line == f"error: language is {language!r}; {expected}"
    with pytest.raises(InputError, match="language is"):
        ImportCorpusConfig("a", "b", language)


@pytest.mark.parametrize(
    ("language", "right"),
    [("zho", "zh"), ("chi", "zh"), ("Chinese", "zh"), ("cn", "zh"), ("EN", "en"), ("deu_Latn", "de_Latn"), ("jp", "ja")],
)
def test_the_right_code_is_named(
    language: str, right: str, tmp_path: Path, tiny_tokenizer_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Texts of a language are counted under one code."""
    line = refusal_of_preprocessing(tmp_path, tiny_tokenizer_dir, language, capsys)
    assert line == f"error: language is {language!r}; expected {right}"
    for section in (lambda: SourceConfig("a", language).check(), lambda: TextConfig("a", language)):
        with pytest.raises(InputError, match=rf"language is '{language}'; expected {right}$"):
            section()


def test_languages() -> None:
    for language in ("zh", "en", "no", "zh-Hant", "zh_TW", "yue", "cmn_Hani", "code", "python", "c++", *ISO_639_1):
        check_language(language)
    assert not ISO_639_1 & RIGHT_CODE.keys()
    assert set(RIGHT_CODE.values()) == ISO_639_1, "each language has a longer name"


@pytest.mark.parametrize(("language", "words", "said"), [("en", CHINESE, "zh"), ("zh", ENGLISH, "en"), ("zh", CHINESE, "")])
def test_another_language_is_noticed(
    language: str, words: str, said: str, tmp_path: Path, tiny_tokenizer_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """In preprocessing, and when a corpus of Megatron-LM is taken over."""
    source = write_lines(tmp_path / "a.jsonl", [{"text": document(words, i)} for i in range(5)])
    prefix = run(tmp_path / "c", tiny_tokenizer_dir, input=source, language=language).prefix
    made = capsys.readouterr().err
    manifest_path(prefix).unlink()
    import_corpora(ImportCorpusConfig(prefix, tiny_tokenizer_dir, language))
    taken_over = capsys.readouterr().err
    for text in (made, taken_over):
        assert ("WARNING" in text) == bool(said)
        if said:
            assert f"language is {language!r}, but of a sample of the text 0.0 % are {language} and 100.0 % {said}" in text


def test_what_nothing_is_said_of() -> None:
    for language, shares in (
        ("zh", {"zh-Hant": 0.9, "en": 0.1}),
        ("he", {"iw": 0.9}),
        ("nb", {"no": 0.8, "da": 0.2}),
        ("zh", {"un": 1.0}),
        ("zh", {"en": 0.45, "zh": 0.4}),
        ("code", {"en": 1.0}),
        ("kv", {"en": 1.0}),
        ("zh", {}),
    ):
        assert unlike(language, shares) is None, (language, shares)
    assert unlike("zh", {"un": 0.4, "en": 0.6}) is not None


def test_without_pycld2(tmp_path: Path, tiny_tokenizer_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot be built everywhere: then nothing is known of languages, and the corpus is the same."""
    source = write_lines(tmp_path / "a.jsonl", [{"text": document(ENGLISH, 1)}])
    run(tmp_path / "with", tiny_tokenizer_dir, input=source)
    monkeypatch.setitem(sys.modules, "pycld2", None)
    run(tmp_path / "without", tiny_tokenizer_dir, input=source)
    one, other = (read_corpus_manifest(str(tmp_path / name)) for name in ("with", "without"))
    assert (one.files, one.languages) == (other.files, {"en": 1.0})
    assert other.languages == {}
