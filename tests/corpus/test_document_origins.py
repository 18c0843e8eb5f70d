"""File and line of each document, found out from the manifest alone, against the text that lies there."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_cpt.corpus.document_origins import UNKNOWN, origins_of
from megatron_cpt.corpus.indexed_dataset import IndexedCorpus
from megatron_cpt.corpus.manifest import read_corpus_manifest
from megatron_cpt.corpus.merge import MergeConfig, merge_datasets
from megatron_cpt.corpus.preprocess import PreprocessConfig, preprocess
from megatron_cpt.tokenizer import load_tokenizer
from megatron_cpt.utils.errors import InputError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files a, b and c of lines that differ; some of a are refused, c has a blank one."""
    for name in "abc":
        lines = [json.dumps({"text": f"{name} the quick brown fox {i}"}) for i in range(40)]
        if name == "a":
            lines[0] = lines[17] = "{"
            lines[18] = json.dumps({"text": ""})
        if name == "c":
            lines[3] = ""
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def make(folder: Path, prefix: str, names: str, tokenizer: str, **settings: object) -> str:
    files = [str(folder / f"{name}.jsonl") for name in names]
    config = PreprocessConfig(files, tokenizer, str(folder / prefix), "en", workers=1, on_error="skip", **settings)  # type: ignore[arg-type]
    preprocess(config)
    return str(folder / prefix)


def check(prefix: str, tokenizer_dir: str, without_lines: str = "") -> None:
    """Every document is the text of its line; of the files `without_lines` the line is not known."""
    corpus, tokenizer = IndexedCorpus(prefix), load_tokenizer(tokenizer_dir)
    origins = origins_of(prefix, read_corpus_manifest(prefix))
    files, lines = origins.lookup(np.arange(corpus.num_documents))
    for document, (file, line) in enumerate(zip(files.tolist(), lines.tolist(), strict=True)):
        text = tokenizer.decode(corpus[document].tolist()[:-1])
        path = Path(origins.files[file])
        assert text[0] == path.name[0]
        if path.name[0] in without_lines:
            assert line == UNKNOWN
            assert origins.find(file, document + 1) is None
        else:
            assert json.loads(path.read_text().split("\n")[line - 1])["text"] == text
            assert origins.find(file, line) == document


@pytest.mark.parametrize("shuffle", [None, 7])
def test_lines_are_those_of_the_texts(folder: Path, tiny_tokenizer_dir: str, shuffle: int | None) -> None:
    prefix = make(folder, "corpus", "abc", tiny_tokenizer_dir, shuffle_documents=shuffle)
    check(prefix, tiny_tokenizer_dir, without_lines="c")  # a blank line is counted, but not which one it is
    origins = origins_of(prefix, read_corpus_manifest(prefix))
    assert [origins.find(0, line) for line in (1, 18, 19, 41, 0)] == [None] * 5


@pytest.mark.parametrize("shuffle", [None, 3])
def test_partitions_and_corpora_that_are_joined(folder: Path, tiny_tokenizer_dir: str, shuffle: int | None) -> None:
    for i in range(3):
        make(folder, "parts", "ab", tiny_tokenizer_dir, partition=f"{i}/3")
    merge_datasets(MergeConfig(str(folder / "parts"), str(folder / "parts"), shuffle_documents=shuffle))
    check(str(folder / "parts"), tiny_tokenizer_dir)
    for name in "ab":
        make(folder, name, name, tiny_tokenizer_dir)
    merge_datasets(MergeConfig([str(folder / "b"), str(folder / "a")], str(folder / "both"), shuffle_documents=shuffle))
    check(str(folder / "both"), tiny_tokenizer_dir)


@pytest.mark.parametrize("shuffle", [None, 3])
def test_a_file_that_gave_documents_only_to_the_second_corpus(
    folder: Path, tiny_tokenizer_dir: str, shuffle: int | None
) -> None:
    """What one corpus refused of a file is nothing that the other did."""
    titled = [json.dumps({"title": f"b the lazy dog {i}", "text": f"b quick {i}"}) for i in range(40)]
    (folder / "b.jsonl").write_text("\n".join(titled) + "\n")
    (folder / "d.jsonl").write_text("".join(json.dumps({"headline": f"d the fox {i}"}) + "\n" for i in range(40)))
    make(folder, "none", "db", tiny_tokenizer_dir, text_key="headline")  # refuses as many lines of b as there are
    make(folder, "all", "b", tiny_tokenizer_dir, text_key="title")
    for name, files, key in (("one", "cb", "title"), ("other", "c", "text"), ("late", "bc", "title"), ("more", "a", "text")):
        make(folder, name, files, tiny_tokenizer_dir, text_key=key)
    for number, names in enumerate(
        (["one", "other"], ["late", "other"], ["late", "other", "more"], ["other", "one"], ["none", "all"])
    ):
        prefix = str(folder / f"joined{number}")
        merge_datasets(MergeConfig([str(folder / name) for name in names], prefix, shuffle_documents=shuffle))
        corpus, tokenizer = IndexedCorpus(prefix), load_tokenizer(tiny_tokenizer_dir)
        origins = origins_of(prefix, read_corpus_manifest(prefix))
        files, lines = origins.lookup(np.arange(corpus.num_documents))
        assert (files == UNKNOWN).all() == (number == 0)
        for document, (file, line) in enumerate(zip(files.tolist(), lines.tolist(), strict=True)):
            text = tokenizer.decode(corpus[document].tolist()[:-1])
            if file != UNKNOWN:
                assert text[0] == Path(origins.files[file]).name[0]
            if line != UNKNOWN:
                assert text in json.loads(Path(origins.files[file]).read_text().split("\n")[line - 1]).values()
        known = {Path(origins.files[file]).name for file in set(files[lines != UNKNOWN].tolist())}
        assert known == [set(), {"b.jsonl"}, {"a.jsonl", "b.jsonl"}, {"b.jsonl"}, {"d.jsonl"}][number]


def test_a_partition_knows_its_files(folder: Path, tiny_tokenizer_dir: str) -> None:
    for i in range(3):
        make(folder, "part", "ab", tiny_tokenizer_dir, partition=f"{i}/3")
        check(str(folder / f"part-0000{i}-of-00003"), tiny_tokenizer_dir, without_lines="ab")


def test_what_was_shuffled_before_it_was_joined_is_not_known(folder: Path, tiny_tokenizer_dir: str) -> None:
    for name in "ab":
        make(folder, name, name, tiny_tokenizer_dir, shuffle_documents=1)
    merge_datasets(MergeConfig([str(folder / "a"), str(folder / "b")], str(folder / "both")))
    origins = origins_of(str(folder / "both"), read_corpus_manifest(str(folder / "both")))
    assert [column.tolist() for column in origins.lookup(np.arange(3))] == [[UNKNOWN] * 3] * 2
    assert origins.find(0, 2) is None


def test_what_is_held_out_has_no_lines(folder: Path, tiny_tokenizer_dir: str) -> None:
    prefix = make(folder, "held", "ab", tiny_tokenizer_dir, holdout=5, shuffle_documents=2)
    check(prefix, tiny_tokenizer_dir, without_lines="ab")
    files, _ = origins_of(prefix, read_corpus_manifest(f"{prefix}_holdout")).lookup(np.arange(5))
    assert files.tolist() == [UNKNOWN] * 5


def test_a_manifest_of_before(folder: Path, tiny_tokenizer_dir: str) -> None:
    """One file: which it is is known. Several: they may have been shuffled before they were joined."""
    for names, file in (("b", 0), ("ab", UNKNOWN)):
        prefix = make(folder, names, names, tiny_tokenizer_dir)
        path = Path(f"{prefix}.json")
        fields = json.loads(path.read_text())
        del fields["in_order"]
        fields["sources"] = [{k: v for k, v in source.items() if k != "records"} for source in fields["sources"]]
        path.write_text(json.dumps(fields))
        files, lines = origins_of(prefix, read_corpus_manifest(prefix)).lookup(np.arange(2))
        assert (files.tolist(), lines.tolist()) == ([file] * 2, [UNKNOWN] * 2)


def test_a_damaged_list_of_skipped_lines(folder: Path, tiny_tokenizer_dir: str) -> None:
    prefix = make(folder, "corpus", "a", tiny_tokenizer_dir)
    manifest = read_corpus_manifest(prefix)
    for line in ('"1"', "true", "-7", "0", "1.0", str(10**24), str(2**63)):
        Path(f"{prefix}.errors.jsonl").write_text(f'{{"file": "a", "line": {line}}}\n')
        with pytest.raises(
            InputError, match=r"corpus\.errors\.jsonl: cannot be read \(line is .*; expected a file and a line"
        ):
            origins_of(prefix, manifest)
    rows = [json.dumps({"file": manifest.sources[0].path, "line": line}) + "\n" for line in (1, 18, 50)]
    Path(f"{prefix}.errors.jsonl").write_text("".join(rows))
    assert not origins_of(prefix, manifest).skipped  # line 50 of 40
    Path(f"{prefix}.errors.jsonl").write_text('{"file": 1}\n')
    with pytest.raises(InputError, match=r"corpus\.errors\.jsonl: cannot be read .*; expected a file and a line"):
        origins_of(prefix, read_corpus_manifest(prefix))
