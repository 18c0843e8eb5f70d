"""Looking at corpora: facts, tables, documents, and what a check finds."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from megatron_cpt.corpus.indexed_dataset import IndexedWriter
from megatron_cpt.corpus.preprocess import PreprocessConfig, preprocess
from megatron_cpt.mixture.inspect_data import InspectConfig, inspect_data
from megatron_cpt.utils.errors import InputError

TEXTS = ["first document [b]", "二  with   spaces\tand\na line " + "x" * 300, "third"]


@pytest.fixture
def prefix(tmp_path: Path, tiny_tokenizer_dir: str) -> str:
    """A corpus of three documents with metadata; its name would be markup to rich."""
    source = tmp_path / "[red] in.jsonl"
    source.write_text("".join(json.dumps({"text": text, "url": f"u{i}"}) + "\n" for i, text in enumerate(TEXTS)))
    prefix = str(tmp_path / "out" / "[/b] c")
    preprocess(PreprocessConfig(str(source), tiny_tokenizer_dir, prefix, "zh", metadata_keys="url", workers=1))
    return prefix


def foreign(tmp_path: Path, tokens: list[int]) -> str:
    """A corpus without a manifest, as Megatron-LM writes it."""
    with IndexedWriter(str(tmp_path / "foreign"), np.uint16) as writer:
        writer.add_document(np.array(tokens))
    return str(tmp_path / "foreign")


def test_one_corpus(prefix: str, capsys: pytest.CaptureFixture[str]) -> None:
    inspect_data(InspectConfig(prefix))
    shown = capsys.readouterr().out
    for wanted in ("[/b] c", "[red] in.jsonl: 3 documents", "language", "zh", "the reference tokenizer", "hf:"):
        assert wanted in shown


def test_several_corpora(
    prefix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # long names are folded
    foreign(tmp_path, [1, 2, 3, 4])
    inspect_data(InspectConfig([os.path.relpath(prefix), "foreign"]))
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split()[-1] == "-"  # no manifest, no tokenizer
    assert lines[-1].split()[0] == "4"  # documents of both


def test_documents_are_printed_as_they_are(prefix: str, capsys: pytest.CaptureFixture[str]) -> None:
    inspect_data(InspectConfig(prefix, document=[1, -3]))
    shown = capsys.readouterr().out
    assert f'{{"url":"u1"}}\n{TEXTS[1]}<|endoftext|>\n' in shown
    assert f'{{"url":"u0"}}\n{TEXTS[0]}<|endoftext|>\n' in shown
    assert max(map(len, shown.splitlines())) < 500  # no rule over the width that a pipe does not have
    with pytest.raises(InputError, match=r"document 3 of .*expected one of its 3 documents, 0 to 2"):
        inspect_data(InspectConfig(prefix, document=3))


def test_a_foreign_corpus(tmp_path: Path, tiny_tokenizer_dir: str, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = foreign(tmp_path, [40, 41, 0])
    inspect_data(InspectConfig(corpus))
    inspect_data(InspectConfig(corpus, check=True, tokenizer=tiny_tokenizer_dir))
    inspect_data(InspectConfig(corpus, document=0, tokenizer=tiny_tokenizer_dir))
    shown = capsys.readouterr().out
    assert "another program wrote this corpus" in shown
    assert "<|endoftext|>" in shown
    with pytest.raises(InputError, match="no manifest"):
        inspect_data(InspectConfig(corpus, document=0))
    with pytest.raises(InputError, match="not as it should be"):
        inspect_data(InspectConfig(foreign(tmp_path, [399, 400]), check=True, tokenizer=tiny_tokenizer_dir))
    assert "WRONG  ids within the vocabulary of 400: found ids from 0 to 400" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("place", "value", "found"),
    [
        ("eos", 5, "every document ends with eos: document 2 does not"),
        ("first token", 500, "ids within the vocabulary of 400: found ids from 0 to 500"),
        ("length", -1, "lengths and positions in .idx agree"),
        ("pointer", 7, "lengths and positions in .idx agree: sequence 1 begins at byte 7"),
    ],
)
def test_damage_is_found(prefix: str, place: str, value: int, found: str, capsys: pytest.CaptureFixture[str]) -> None:
    inspect_data(InspectConfig(prefix, check=True))
    tokens, index = Path(prefix + ".bin"), Path(prefix + ".idx")
    data, idx = bytearray(tokens.read_bytes()), bytearray(index.read_bytes())
    lengths = np.frombuffer(idx, np.int32, 3, 34)
    if place == "eos":
        data[-2:] = np.uint16(value).tobytes()
    elif place == "first token":
        data[:2] = np.uint16(value).tobytes()
    elif place == "length":  # the sum stays, or the corpus would not open
        lengths[:2] = value, lengths[0] + lengths[1] - value
    else:
        np.frombuffer(idx, np.int64, 3, 34 + 12)[1] = value
    tokens.write_bytes(data)
    index.write_bytes(idx)
    with pytest.raises(InputError, match="not as it should be"):
        inspect_data(InspectConfig(prefix, check=True))
    shown = capsys.readouterr().out
    assert "WRONG  " + found in shown
    assert "sha256 of" in shown
