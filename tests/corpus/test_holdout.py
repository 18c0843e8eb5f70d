"""Documents held out for validation: as many as asked for, the same however they are read, and never trained on."""

from __future__ import annotations

import gzip
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_corpora import ROOT, content, json_lines, read_lines, run, small_units, texts, write_lines

from megatron_cpt.corpus.holdout import choose_documents, number_held_out, parse_holdout
from megatron_cpt.corpus.indexed_dataset import IndexedCorpus
from megatron_cpt.corpus.manifest import read_corpus_manifest
from megatron_cpt.corpus.merge import MergeConfig, merge_datasets
from megatron_cpt.mixture.file import load_mixture
from megatron_cpt.mixture.inspect_data import InspectConfig, inspect_data
from megatron_cpt.utils.errors import InputError


@pytest.fixture(autouse=True)
def _many_units(monkeypatch: pytest.MonkeyPatch) -> None:
    small_units(monkeypatch, 400)


@pytest.fixture(scope="module")
def records() -> list[dict[str, Any]]:
    """200 documents, of which a tenth are copies of each other, save for white space."""
    rows = random.Random(5)
    found = [{"text": f"document {i} " + "".join(rows.choices("ab 文", k=i % 40)), "id": i} for i in range(180)]
    return [*found[:90], *({"text": f"the\n{' ' * i}same", "id": 1000 + i} for i in range(20)), *found[90:]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, records: list[dict[str, Any]]) -> str:
    inside = tmp_path_factory.mktemp("holdout") / "in"
    write_lines(inside / "a.jsonl", [*records[:70], {"text": ""}])
    (inside / "b.jsonl.gz").write_bytes(gzip.compress(json_lines(records[70:120])))
    write_lines(inside / "c.jsonl", records[120:])
    return str(inside)


def settings_for(folder: str, **more: Any) -> dict[str, Any]:
    return {"input": folder, "metadata_keys": "id", "on_error": "skip", **more}


def both(prefix: Path) -> tuple[dict[str, bytes], dict[str, bytes]]:
    return content(prefix), content(f"{prefix}_holdout")


@pytest.mark.parametrize(("asked", "count"), [(17, 17), ("8.5%", 17), (0.085, 17), ("199", 199), ("1", 1)])
def test_exactly_so_many_and_every_document_once(
    asked: Any, count: int, tmp_path: Path, folder: str, records: list[dict[str, Any]], tiny_tokenizer_dir: str
) -> None:
    run(tmp_path / "c", tiny_tokenizer_dir, **settings_for(folder, holdout=asked))
    train, held_out = (IndexedCorpus(str(tmp_path / name)) for name in ("c", "c_holdout"))
    assert (len(train), len(held_out)) == (200 - count, count)
    kept, aside = (texts(corpus, tiny_tokenizer_dir) for corpus in (train, held_out))
    assert Counter(kept + aside) == Counter(record["text"] for record in records)
    assert not {" ".join(text.split()) for text in kept} & {" ".join(text.split()) for text in aside}, "no copies"
    order = [record["text"] for record in records]
    assert kept == [text for text in order if text in set(kept)], "the order of the input"
    if 10 < count < 100:
        places = [order.index(text) for text in aside]
        assert places != sorted(places), "any beginning of it is from all over the input"
        assert min(places) < 50 < 150 < max(places)
    for corpus, its_texts in ((train, kept), (held_out, aside)):
        manifest = read_corpus_manifest(corpus.prefix)
        assert (manifest.documents, manifest.tokens) == (len(corpus), corpus.num_tokens)
        assert manifest.text_bytes == sum(len(text.encode()) for text in its_texts)
        assert manifest.characters == sum(map(len, its_texts))
        assert sum(source.documents for source in manifest.sources) == len(corpus)
        ids = {record["text"]: record["id"] for record in records}
        assert [line["id"] for line in read_lines(f"{corpus.prefix}.metadata.jsonl")] == [ids[text] for text in its_texts]
        inspect_data(InspectConfig(corpus.prefix, check=True))
    per_source = [source.documents for source in read_corpus_manifest(held_out.prefix).sources]
    where = [("a", records[:70]), ("b", records[70:120]), ("c", records[120:])]
    assert per_source == [sum(text in {r["text"] for r in part} for text in aside) for _, part in where]
    assert read_corpus_manifest(train.prefix).skipped == {"empty": 1}
    assert read_corpus_manifest(held_out.prefix).skipped == {}


def test_however_it_is_read(tmp_path: Path, folder: str, records: list[dict[str, Any]], tiny_tokenizer_dir: str) -> None:
    """Workers, partitions that are merged, other files: the same bytes. Another order of the input: the same documents."""
    settings = settings_for(folder, holdout=12)
    run(tmp_path / "one", tiny_tokenizer_dir, **settings)
    run(tmp_path / "three", tiny_tokenizer_dir, **settings, workers=3)
    for i in range(4):
        run(tmp_path / "parts", tiny_tokenizer_dir, **settings, partition=f"{i}/4")
    merge_datasets(MergeConfig(str(tmp_path / "parts"), str(tmp_path / "parts")))
    assert both(tmp_path / "one") == both(tmp_path / "three") == both(tmp_path / "parts")
    one, parts = (read_corpus_manifest(str(tmp_path / f"{name}_holdout")) for name in ("one", "parts"))
    assert (one.holdout, one.sources, one.text_bytes) == (parts.holdout, parts.sources, parts.text_bytes)
    other = write_lines(tmp_path / "other.jsonl", records[::-1])
    run(tmp_path / "other", tiny_tokenizer_dir, **settings | {"input": other})
    assert content(tmp_path / "other_holdout") == content(tmp_path / "one_holdout")


def test_shuffled_before_or_in_the_merge(tmp_path: Path, folder: str, tiny_tokenizer_dir: str) -> None:
    settings = settings_for(folder, holdout="10%")
    run(tmp_path / "one", tiny_tokenizer_dir, **settings, shuffle_documents=4)
    run(tmp_path / "plain", tiny_tokenizer_dir, **settings)
    for i in range(2):
        run(tmp_path / "parts", tiny_tokenizer_dir, **settings, partition=f"{i}/2")
    merge_datasets(MergeConfig(str(tmp_path / "parts"), str(tmp_path / "parts"), shuffle_documents=4))
    assert both(tmp_path / "one") == both(tmp_path / "parts")
    assert content(tmp_path / "one_holdout") == content(tmp_path / "plain_holdout")
    assert content(tmp_path / "one")[".bin"] != content(tmp_path / "plain")[".bin"]
    with pytest.raises(InputError, match="shuffle_documents is 4 with partition and holdout"):
        run(tmp_path / "d", tiny_tokenizer_dir, **settings, partition="0/2", shuffle_documents=4)


def test_a_mixture_takes_both_sides_of_one_split_only(tmp_path: Path, folder: str, tiny_tokenizer_dir: str) -> None:
    settings = settings_for(folder)
    run(tmp_path / "c", tiny_tokenizer_dir, **settings, holdout=20)
    run(tmp_path / "d", tiny_tokenizer_dir, **settings, holdout=30)
    run(tmp_path / "whole", tiny_tokenizer_dir, **settings)

    def mixture(train: str, valid: str) -> None:
        text = f"seq_length: 16\nseed: 1\nalmr: 0\ngeneral: [{{prefix: {train}}}]\nvalidation: [{{prefix: {valid}}}]\n"
        (tmp_path / "mixture.yaml").write_text(text)
        load_mixture(str(tmp_path / "mixture.yaml"))

    mixture("c", "c_holdout")
    for train, valid in (("whole", "c_holdout"), ("d", "c_holdout"), ("c_holdout", "c"), ("c", "whole")):
        if (train, valid) == ("c_holdout", "c"):
            mixture(train, valid)  # the other way round is as good
        else:
            with pytest.raises(InputError, match=r"documents in common: .*hold out of one \(--holdout\)"):
                mixture(train, valid)
    write_lines(tmp_path / "e.jsonl", [{"text": f"other {i}", "id": i} for i in range(40)])
    run(tmp_path / "e", tiny_tokenizer_dir, **settings_for(str(tmp_path / "e.jsonl"), holdout=3))
    merge_datasets(MergeConfig([str(tmp_path / "c"), str(tmp_path / "e")], str(tmp_path / "ce")))
    mixture("ce", "c_holdout")
    mixture("ce", "e_holdout")
    merge_datasets(MergeConfig([str(tmp_path / "c"), str(tmp_path / "whole")], str(tmp_path / "cw")))
    with pytest.raises(InputError, match="documents in common"):
        mixture("cw", "c_holdout")
    with pytest.raises(InputError, match=r"c_holdout was held out for validation, unlike .*/c; expected one or the other"):
        merge_datasets(MergeConfig([str(tmp_path / "c"), str(tmp_path / "c_holdout")], str(tmp_path / "all")))


WRONG = ["0", "-3", "1.5", "100%", "0%", "a", "", "1/2", "nan", "5 %%", 0.0, 1.0, "200.0", "k", "0.0001k", "010"]
HUGE = ["1e999999999", "1e-999999999", "1e-999999999%", "9" * 5000]


@pytest.mark.parametrize("written", [*WRONG, *HUGE])
def test_what_is_no_holdout(written: Any, tmp_path: Path, tiny_tokenizer_dir: str) -> None:
    with pytest.raises(InputError, match=r"holdout is .*; expected a number of documents, as in 200 or 10K, or a share"):
        run(tmp_path / "c", tiny_tokenizer_dir, input=str(tmp_path), holdout=written)
    assert parse_holdout("0.5 %") == parse_holdout(0.005) == Fraction(1, 200)
    assert parse_holdout("1_000") == parse_holdout("1k") == 1000
    assert [parse_holdout(text) for text in ("10K", "1.5 M", "0.5k")] == [10_000, 1_500_000, 500]


def test_more_than_there_is(tmp_path: Path, tiny_tokenizer_dir: str) -> None:
    source = write_lines(tmp_path / "a.jsonl", [{"text": f"document {i}"} for i in range(10)])
    for asked, said in ((10, "10 of 10"), (11, "11 of 10"), ("4%", "0 of 10")):
        with pytest.raises(InputError, match=f"holdout is {asked}, {said} documents; expected at least one, and not all"):
            run(tmp_path / "c", tiny_tokenizer_dir, input=source, holdout=asked)
        assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"], "nothing is left behind"
    assert number_held_out("5%", 10) == 1


@given(st.lists(st.integers(0, 12), min_size=2, max_size=40), st.integers(1, 39))
def test_copies_stay_together(keys: list[int], count: int) -> None:
    array = np.array(keys, np.uint64)
    try:
        chosen = choose_documents(array, count)
    except InputError:  # texts without copies can always be held out
        assert count > len(keys) - sum(n for n in Counter(keys).values() if n > 1)
        return
    assert len(set(chosen.tolist())) == chosen.size == count
    assert not set(array[chosen].tolist()) & set(np.delete(array, chosen).tolist())


def test_an_old_holdout_is_replaced(tmp_path: Path, folder: str, tiny_tokenizer_dir: str) -> None:
    run(tmp_path / "c", tiny_tokenizer_dir, **settings_for(folder, holdout=3))
    with pytest.raises(InputError, match=r"found .*c_holdout\.json.*; expected a new name or overwrite"):
        run(tmp_path / "c", tiny_tokenizer_dir, **settings_for(folder, holdout=5))
    run(tmp_path / "c", tiny_tokenizer_dir, input=folder, on_error="skip", holdout=5, overwrite=True)
    assert len(IndexedCorpus(str(tmp_path / "c_holdout"))) == 5
    assert not (tmp_path / "c_holdout.metadata.jsonl").exists()


def test_the_tool_and_partitions_of_a_small_file(tmp_path: Path, tiny_tokenizer_dir: str) -> None:
    """3 MB in 8 parts, each of which has documents, and a hold-out in one command."""
    source = write_lines(tmp_path / "a.jsonl", [{"text": f"document {i} " + "x" * 2900} for i in range(1000)])
    words = [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), f"--input={source}", "--language=en"]
    words += [f"--tokenizer={tiny_tokenizer_dir}", f"--output-prefix={tmp_path}/c", "--workers=1"]
    done = subprocess.run([*words, "--partition=7/8"], capture_output=True, text=True, check=True)
    assert 120 < read_corpus_manifest(str(tmp_path / "c-00007-of-00008")).documents < 130
    assert "WARNING" not in done.stderr
    done = subprocess.run([*words, "--holdout", "0.5%"], capture_output=True, text=True, check=True)
    assert "held out: 5 documents" in done.stderr
    assert done.stdout.splitlines()[-1] == f"{tmp_path}/c.json"
    assert read_corpus_manifest(str(tmp_path / "c_holdout")).documents == 5
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(Path(source).read_bytes()))
    words[2] = f"--input={source}.gz"
    done = subprocess.run([*words, "--partition=1/2"], capture_output=True, text=True, check=True)
    assert "WARNING: partition 1/2 has no documents; files that are compressed, text" in done.stderr


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: path.unlink(), "no such file; expected what preprocess_data.py --holdout writes beside"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), r"found [\d,]+ bytes; expected [\d,]+ \(\d+ documents\)"),
        (lambda path: path.write_bytes(path.read_bytes()[:-16] + b"a" * 16), "damaged: found .* text_bytes; expected"),
    ],
)
def test_what_is_held_out_by_is_checked_in_each_partition(
    damage: Callable[[Path], object], said: str, tmp_path: Path, folder: str, tiny_tokenizer_dir: str
) -> None:
    for i in range(2):
        run(tmp_path / "parts", tiny_tokenizer_dir, **settings_for(folder, holdout=12), partition=f"{i}/2")
    damage(tmp_path / "parts-00001-of-00002.documents")
    with pytest.raises(InputError, match=rf"parts-00001-of-00002\.documents: {said}"):
        merge_datasets(MergeConfig(str(tmp_path / "parts"), str(tmp_path / "joined")))
    assert not list(tmp_path.glob("joined*"))
