"""Corpora of Megatron-LM get a manifest that says what preprocessing would have said, and a mixture reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_corpora import EOS, run, write_lines
from tiny_models import run_tool

from megatron_cpt.corpus.import_megatron import ImportCorpusConfig, import_corpora
from megatron_cpt.corpus.manifest import read_corpus_manifest
from megatron_cpt.mixture.file import load_mixture
from megatron_cpt.mixture.inspect_data import InspectConfig, inspect_data
from megatron_cpt.tokenizer import load_tokenizer
from megatron_cpt.utils.errors import InputError

TEXTS = [f"第{i}天，天气很好。We walked {i} miles through the old town and back. " * 5 for i in range(30)]


def write_as_megatron(prefix: Path, documents: list[list[list[int]]], dtype: Any = np.int32) -> Path:
    """With megatron-core's own builder, as Megatron-LM's preprocess_data.py: documents of sequences of ids."""
    torch = pytest.importorskip("torch")
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for sequences in documents:
        ids = [token for sequence in sequences for token in sequence]
        builder.add_document(torch.tensor(ids), [len(sequence) for sequence in sequences])
    builder.finalize(f"{prefix}.idx")
    return prefix


@pytest.fixture
def documents(tiny_tokenizer_dir: str) -> list[list[list[int]]]:
    """TEXTS, each ended by eos."""
    tokenizer = load_tokenizer(tiny_tokenizer_dir)
    return [[[*tokenizer.encode(text), tokenizer.eos_id]] for text in TEXTS]


def import_as(prefix: Path, tokenizer: str, **settings: Any) -> str:
    return import_corpora(ImportCorpusConfig(input=str(prefix), tokenizer=tokenizer, language="zh", **settings))


def test_the_manifest_is_that_of_preprocessing(
    tmp_path: Path, tiny_tokenizer_dir: str, documents: list[list[list[int]]]
) -> None:
    theirs = write_as_megatron(tmp_path / "zh_text_document", documents, np.uint16)
    assert import_as(theirs, tiny_tokenizer_dir) == f"{theirs}.json"
    source = write_lines(tmp_path / "zh.jsonl", [{"text": text} for text in TEXTS])
    run(tmp_path / "ours", tiny_tokenizer_dir, input=source, language="zh")
    found, wanted = read_corpus_manifest(str(theirs)), read_corpus_manifest(str(tmp_path / "ours"))
    for name in ("language", "documents", "tokens", "text_bytes", "characters", "bytes_per_token", "dtype", "eos", "bos"):
        assert getattr(found, name) == getattr(wanted, name), name
    assert (found.tokenizer, found.files["bin"], found.skipped) == (wanted.tokenizer, wanted.files["bin"], {})
    inspect_data(InspectConfig(input=str(theirs), check=True))  # checksums included


def test_a_mixture_reads_it(tmp_path: Path, tiny_tokenizer_dir: str, documents: list[list[list[int]]]) -> None:
    import_as(write_as_megatron(tmp_path / "zh", documents), tiny_tokenizer_dir)
    (tmp_path / "mixture.yaml").write_text(
        json.dumps({"seq_length": 32, "seed": 1, "almr": 1.0, "additional": [{"prefix": "zh"}]})
    )
    mixture = load_mixture(str(tmp_path / "mixture.yaml"))
    assert mixture.manifest.language == "zh"


def test_documents_without_an_end_token(tmp_path: Path, tiny_tokenizer_dir: str, documents: list[list[list[int]]]) -> None:
    bare = [[sequences[0][:-1]] for sequences in documents]
    import_as(write_as_megatron(tmp_path / "zh", bare), tiny_tokenizer_dir)
    assert read_corpus_manifest(str(tmp_path / "zh")).eos == "none"


def test_what_is_refused(tmp_path: Path, tiny_tokenizer_dir: str, documents: list[list[list[int]]]) -> None:
    (ids,) = documents[0]
    wrong = {
        "some": ([*documents, [ids[:-1]]], r"some: 30 of 31 documents end with eos \(id 0\); expected all or none"),
        "large": ([[[*ids, 400, 0]]], r"large\.bin: found ids from 0 to 400; expected ids below 400"),
        "split": ([[ids, ids]], r"split\.idx: found 2 sequences in 1 document; expected one each"),
        "empty": ([[[]]], r"empty: document 0 without tokens; expected tokens in each"),
    }
    for name, (content, message) in wrong.items():
        prefix = write_as_megatron(tmp_path / name, content)
        with pytest.raises(InputError, match=message):
            import_as(prefix, tiny_tokenizer_dir)
        assert not Path(f"{prefix}.json").exists()
    good = write_as_megatron(tmp_path / "good", documents)
    import_as(good, tiny_tokenizer_dir)
    with pytest.raises(InputError, match=r"good\.json: there is a manifest already; expected none, or overwrite"):
        import_as(good, tiny_tokenizer_dir)
    import_as(good, tiny_tokenizer_dir, overwrite=True, eos_token=EOS)


def test_another_end_token_is_named(tmp_path: Path, chat_tokenizer_dir: str, documents: list[list[list[int]]]) -> None:
    prefix = write_as_megatron(tmp_path / "zh", documents)
    message = r"zh: document 0 ends with '<\|endoftext\|>' \(id 0\); expected the end-of-document token '<\|im_end\|>'"
    with pytest.raises(InputError, match=message):
        import_as(prefix, chat_tokenizer_dir, eos_token="<|im_end|>")
    assert not Path(f"{prefix}.json").exists()


def test_the_tool_by_its_name_of_the_last_release(
    tmp_path: Path, tiny_tokenizer_dir: str, documents: list[list[list[int]]]
) -> None:
    theirs = write_as_megatron(tmp_path / "zh", documents)
    done = run_tool("adopt_corpus.py", str(theirs), "--tokenizer", tiny_tokenizer_dir, "--language", "zh")
    assert done.stdout == f"{theirs}.json\n"
    note = "note: adopt_corpus.py is now called import_corpus.py; the old name is accepted until the next release"
    assert done.stderr.splitlines()[0] == note
    refused = run_tool("adopt_corpus.py", str(theirs), "--language", "zh", check=False)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "error: tokenizer is missing" in refused.stderr
