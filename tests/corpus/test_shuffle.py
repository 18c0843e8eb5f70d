"""Shuffled documents: all of them, in an order that only the seed and the number of documents decide."""

from __future__ import annotations

import hashlib
import io
import shutil
import tempfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_corpora import read_lines, run, small_units, texts, write_lines

from megatron_cpt.corpus import shuffle
from megatron_cpt.corpus.manifest import read_corpus_manifest
from megatron_cpt.corpus.shuffle import document_keys, shuffle_documents
from megatron_cpt.corpus.sources import sha256_file


@pytest.fixture(scope="module")
def scratch() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp())
    yield folder
    shutil.rmtree(folder)


def shuffled(documents: list[bytes], seed: int, scratch: Path, itemsize: int = 1, **sizes: int) -> list[bytes]:
    """Shuffle with other limits than the usual ones, and take the result apart by its lengths."""
    lengths = np.array([len(document) // itemsize for document in documents], np.int32)
    content = np.frombuffer(b"".join(documents), np.uint8)
    output, output_lengths = io.BytesIO(), io.BytesIO()
    with pytest.MonkeyPatch.context() as patch:
        for name, size in sizes.items():
            patch.setattr(shuffle, name, size)
        digest = shuffle_documents(content, lengths, seed, output, output_lengths, scratch, itemsize)
    assert list(scratch.iterdir()) == []
    data, ends = output.getvalue(), np.frombuffer(output_lengths.getvalue(), np.int32).cumsum() * itemsize
    assert digest == hashlib.sha256(data).hexdigest()
    assert ends.size == len(documents)
    assert len(data) == (ends[-1] if documents else 0)
    return [data[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def by_keys(documents: list[bytes], seed: int) -> list[bytes]:
    """What must come out: sorted by key, all in memory."""
    keys = document_keys(0, len(documents), seed)
    return [documents[i] for i in sorted(range(len(documents)), key=lambda i: int(keys[i]))]


@settings(max_examples=80, deadline=None)
@given(
    lengths=st.lists(st.one_of(st.just(0), st.integers(0, 9)), max_size=60),
    seed=st.integers(0, 2**64 - 1),
    itemsize=st.sampled_from([1, 2, 4]),
    bucket_bytes=st.integers(1, 300),
    copy_bytes=st.integers(1, 300),
)
def test_a_permutation_whatever_the_buckets(
    scratch: Path, lengths: list[int], seed: int, itemsize: int, bucket_bytes: int, copy_bytes: int
) -> None:
    """The same order in memory and through any number of buckets, empty documents included."""
    documents = [bytes([i]) * itemsize * length for i, length in enumerate(lengths)]
    found = shuffled(documents, seed, scratch, itemsize, BUCKET_BYTES=bucket_bytes, COPY_BYTES=copy_bytes)
    assert found == by_keys(documents, seed)
    assert sorted(found) == sorted(documents)


def test_more_content_than_buckets_hold(scratch: Path) -> None:
    documents = [b"%03d" % i for i in range(120)]
    whole = shuffled(documents, 1, scratch)
    assert whole == by_keys(documents, 1) != documents
    for most in (1, 2, 5, 64, 1000):
        assert shuffled(documents, 1, scratch, BUCKET_BYTES=2, MAX_BUCKETS=most) == whole


def test_keys_do_not_depend_on_where_one_begins() -> None:
    whole = document_keys(0, 1000, 42)
    for first in (0, 1, 999, 500):
        assert (document_keys(first, 1000 - first, 42) == whole[first:]).all()
    assert np.unique(document_keys(0, 200_000, 7)).size == 200_000  # no ties, so no order among equals to depend on
    assert document_keys(2**40, 1, 2**64 - 1).dtype == np.uint64


def test_seeds_give_unrelated_orders(scratch: Path) -> None:
    documents = [b"%04d" % i for i in range(2000)]
    orders = [shuffled(documents, seed, scratch) for seed in (0, 1, 2, 2**64 - 1)]
    assert len({tuple(order) for order in orders}) == 4
    for one, other in pairwise(orders):
        places = {document: place for place, document in enumerate(other)}
        correlation = np.corrcoef(np.arange(2000), [places[document] for document in one])[0, 1]
        assert abs(correlation) < 0.1
        assert sum(places[document] == place for place, document in enumerate(one)) < 12


def test_places_are_uniform() -> None:
    """Over many seeds every document comes to every tenth of the corpus equally often; so do neighbours' distances."""
    documents, seeds, cells = 50, 2000, 10
    seen = np.zeros((documents, cells))
    first_before_second = 0
    for seed in range(seeds):
        places = np.argsort(np.argsort(document_keys(0, documents, seed)))
        seen[np.arange(documents), places * cells // documents] += 1
        first_before_second += places[0] < places[1]
    expected = seeds / cells
    chi_square = ((seen - expected) ** 2 / expected).sum(axis=1)
    assert chi_square.max() < 34  # 9 degrees of freedom: more in one of 10,000 documents
    assert abs(chi_square.mean() - 9) < 1.5
    assert abs(first_before_second / seeds - 0.5) < 0.04


@pytest.mark.parametrize("bucket_bytes", [1 << 20, 100])
def test_lengths_and_metadata_follow_their_documents(
    bucket_bytes: int, tmp_path: Path, tiny_tokenizer_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_units(monkeypatch)
    records = [{"text": f"document {i} " + "x" * (i * 31 % 77), "id": i, "行": "\n" * (i % 3)} for i in range(200)]
    source = write_lines(tmp_path / "a.jsonl", records)
    plain = run(tmp_path / "plain", tiny_tokenizer_dir, input=source)
    monkeypatch.setattr(shuffle, "BUCKET_BYTES", bucket_bytes)
    settings: dict[str, Any] = {"input": source, "metadata_keys": ["id", "行"], "shuffle_documents": 5}
    corpus = run(tmp_path / "c", tiny_tokenizer_dir, **settings)
    order = [line["id"] for line in read_lines(tmp_path / "c.metadata.jsonl")]
    assert sorted(order) == list(range(200)) != order
    assert texts(corpus, tiny_tokenizer_dir) == [records[i]["text"] for i in order]
    assert [line["行"] for line in read_lines(tmp_path / "c.metadata.jsonl")] == [records[i]["行"] for i in order]
    assert corpus.sequence_lengths.tolist() == [len(plain[i]) for i in order]
    manifest = read_corpus_manifest(corpus.prefix)
    assert (manifest.shuffle_documents, manifest.documents, manifest.tokens) == (5, 200, plain.num_tokens)
    assert manifest.files["bin"].sha256 == sha256_file(f"{corpus.prefix}.bin")
    assert order == [int(i) for i in np.argsort(document_keys(0, 200, 5))]


def test_a_shuffled_corpus_of_one_document(tmp_path: Path, tiny_tokenizer_dir: str) -> None:
    source = write_lines(tmp_path / "a.jsonl", [{"text": "one"}])
    corpus = run(tmp_path / "c", tiny_tokenizer_dir, input=source, shuffle_documents=0)
    assert texts(corpus, tiny_tokenizer_dir) == ["one"]
    assert read_corpus_manifest(corpus.prefix).shuffle_documents == 0
