""".bin/.idx files: round trips, agreement with megatron-core's own reader and writer, damaged files."""

from __future__ import annotations

import pickle
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_cpt.corpus import indexed_dataset
from megatron_cpt.corpus.indexed_dataset import HEADER, MAGIC, IndexedCorpus, IndexedWriter, best_dtype
from megatron_cpt.corpus.sources import sha256_file
from megatron_cpt.utils.errors import InputError, RunError

DOCUMENTS = [[1, 2, 3], [4], [], [65000, 6]]


def write(prefix: str, documents: list[list[int]], dtype: str = "uint16") -> str:
    with IndexedWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(np.array(document, dtype=np.int64))
    assert writer.bin_sha256 == sha256_file(prefix + ".bin")
    return prefix


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    return write(str(tmp_path / "corpus"), DOCUMENTS)


@settings(max_examples=40, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(0, 65535), max_size=20), max_size=12),
    dtype=st.sampled_from(["uint16", "int32", "int64"]),
)
def test_round_trip(documents: list[list[int]], dtype: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        corpus = IndexedCorpus(write(folder + "/c", documents, dtype))
        stream = [token for document in documents for token in document]
        assert [corpus[i].tolist() for i in range(len(corpus))] == documents
        assert corpus.tokens.tolist() == stream
        assert (corpus.num_tokens, corpus.num_documents) == (len(stream), len(documents))
        assert corpus.dtype == np.dtype(dtype)


def test_batches_of_documents_are_the_same_file(tmp_path: Path, prefix: str) -> None:
    flat = np.array([token for document in DOCUMENTS for token in document])
    with IndexedWriter(str(tmp_path / "other"), np.uint16) as writer:
        writer.add_documents(flat, np.array([len(document) for document in DOCUMENTS]))
    for suffix in (".bin", ".idx"):
        assert Path(prefix + suffix).read_bytes() == (tmp_path / ("other" + suffix)).read_bytes()


def test_best_dtype() -> None:
    assert [str(best_dtype(size)) for size in (65499, 65500, 128256)] == ["uint16", "int32", "int32"]


def test_sample_crosses_documents(prefix: str) -> None:
    sample = IndexedCorpus(prefix).sample(2, 3)
    assert sample.tolist() == [3, 4, 65000]
    assert sample.dtype == np.int64
    for start, length in ((-1, 2), (4, 3), (0, 7)):
        with pytest.raises(IndexError):
            IndexedCorpus(prefix).sample(start, length)


def test_read_only_and_cheap_to_pickle(prefix: str) -> None:
    corpus = IndexedCorpus(prefix)
    with pytest.raises(ValueError, match="read-only"):
        corpus.tokens[0] = 1
    pickled = pickle.dumps(corpus)
    assert len(pickled) < 1000
    assert pickle.loads(pickled)[3].tolist() == DOCUMENTS[3]


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_megatron_reads_what_we_write(tmp_path: Path, dtype: str) -> None:
    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    path = write(str(tmp_path / "ours"), DOCUMENTS, dtype)
    dataset = megatron.IndexedDataset(path)
    assert [dataset[i].tolist() for i in range(len(dataset))] == DOCUMENTS
    assert dataset.document_indices.tolist() == [0, 1, 2, 3, 4]
    assert dataset.index.sequence_pointers.tolist() == IndexedCorpus(path).sequence_pointers.tolist()


def test_we_read_what_megatron_writes(tmp_path: Path) -> None:
    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    torch = pytest.importorskip("torch")
    path = str(tmp_path / "theirs")
    builder = megatron.IndexedDatasetBuilder(path + ".bin", dtype=np.int32)
    builder.add_document(torch.tensor([1, 2, 3, 4, 5, 6]), [2, 3, 1])  # one document of three sequences
    builder.add_document(torch.tensor([7, 8]), [2])
    builder.finalize(path + ".idx")
    corpus = IndexedCorpus(path)
    assert [corpus[i].tolist() for i in range(len(corpus))] == [[1, 2], [3, 4, 5], [6], [7, 8]]
    assert (corpus.num_documents, corpus.num_tokens) == (2, 8)
    assert corpus.document_indices.tolist() == [0, 3, 4]


def test_identical_to_megatron_byte_for_byte(tmp_path: Path) -> None:
    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    torch = pytest.importorskip("torch")
    ours, theirs = write(str(tmp_path / "ours"), DOCUMENTS, "int32"), str(tmp_path / "theirs")
    builder = megatron.IndexedDatasetBuilder(theirs + ".bin", dtype=np.int32)
    for document in DOCUMENTS:
        builder.add_document(torch.tensor(document, dtype=torch.int64), [len(document)])
    builder.finalize(theirs + ".idx")
    for suffix in (".bin", ".idx"):
        assert Path(ours + suffix).read_bytes() == Path(theirs + suffix).read_bytes()


def test_positions_beyond_two_to_the_31(tmp_path: Path) -> None:
    """A sparse .bin of 3 x 2^30 tokens: pointers and positions need 64 bits."""
    length, sequences = 1 << 30, 3
    path = str(tmp_path / "huge")
    header = HEADER.pack(MAGIC, 1, 8, sequences, sequences + 1)
    arrays = (
        np.full(sequences, length, np.int32),
        np.arange(sequences, dtype=np.int64) * length * 2,
        np.arange(sequences + 1, dtype=np.int64),
    )
    Path(path + ".idx").write_bytes(header + b"".join(array.tobytes() for array in arrays))
    with open(path + ".bin", "wb") as stream:
        stream.seek(sequences * length * 2 - 2)
        stream.write(np.uint16(77).tobytes())
    corpus = IndexedCorpus(path)
    assert corpus.num_tokens == 3 << 30
    assert corpus.sample((3 << 30) - 2, 2).tolist() == [0, 77]
    assert corpus[2][-1] == 77


def test_an_error_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail() -> None:
        with IndexedWriter(str(tmp_path / "corpus"), "int32") as writer:
            writer.add_document([1, 2, 3])
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("token", "dtype"), [(65536, "uint16"), (-1, "uint16"), (1 << 31, "int32")])
def test_ids_that_do_not_fit_are_refused(tmp_path: Path, token: int, dtype: str) -> None:
    with pytest.raises(InputError, match=dtype):
        write(str(tmp_path / "corpus"), [[token]], dtype)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_missing_file(prefix: str, suffix: str) -> None:
    Path(prefix + suffix).unlink()
    with pytest.raises(InputError, match=f"corpus{suffix}: no such file"):
        IndexedCorpus(prefix)


@pytest.mark.parametrize("keep", [10, 30, 40, 105])
def test_truncated_idx(prefix: str, keep: int) -> None:
    idx = Path(prefix + ".idx")
    assert idx.stat().st_size == 34 + 4 * 12 + 5 * 8
    idx.write_bytes(idx.read_bytes()[:keep])
    with pytest.raises(InputError, match=f"truncated: found {keep} bytes"):
        IndexedCorpus(prefix)


@pytest.mark.parametrize("size", [0, 11, 13])
def test_bin_of_another_size(prefix: str, size: int) -> None:
    Path(prefix + ".bin").write_bytes(bytes(size))
    with pytest.raises(InputError, match=f"found {size} bytes; expected 12"):
        IndexedCorpus(prefix)


@pytest.mark.parametrize(
    ("offset", "byte", "message"),
    [(0, 0, "expected b'MMIDIDX"), (9, 2, "version is 2"), (17, 9, "dtype code is 9"), (34 + 48, 1, "document indices")],
)
def test_damaged_idx(prefix: str, offset: int, byte: int, message: str) -> None:
    idx = Path(prefix + ".idx")
    content = bytearray(idx.read_bytes())
    content[offset] = byte
    idx.write_bytes(bytes(content))
    with pytest.raises(InputError, match=message):
        IndexedCorpus(prefix)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_file_that_is_cut_while_it_is_read(prefix: str, suffix: str) -> None:
    """An error, where a memory map would end the process without a word."""
    corpus = IndexedCorpus(prefix)
    assert corpus.lengths().tolist() == [3, 1, 0, 2]
    assert corpus.lengths(slice(1, 99)).tolist() == [1, 0, 2]
    assert corpus.pointers().tolist() == [0, 6, 8, 8]
    assert corpus.documents(0, 5).tolist() == [0, 1, 2, 3, 4]
    assert corpus.tokens_at(np.array([5, 0, 4, 0])).tolist() == [6, 1, 65000, 1]
    assert [corpus[-1].tolist(), corpus[2].tolist()] == [[65000, 6], []]
    with open(prefix + suffix, "r+b") as file:
        file.truncate(2)
    reads = {
        ".bin": [lambda: corpus[0], lambda: corpus.read(0, 1), lambda: corpus.tokens_at(np.array([3]))],
        ".idx": [corpus.lengths, corpus.pointers, lambda: corpus.documents(0, 1), lambda: corpus[0]],
    }
    for read in reads[suffix]:
        with pytest.raises(RunError, match=r"corpus\.(bin|idx): found 2 bytes; expected \d+: the file has changed since"):
            read()


def test_places_far_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexed_dataset, "WINDOW", 10)
    corpus = IndexedCorpus(write(str(tmp_path / "long"), [list(range(100))]))
    places = np.random.default_rng(0).permutation(np.repeat(np.arange(0, 100, 7), 2))
    assert corpus.tokens_at(places).tolist() == places.tolist()
    assert corpus.tokens_at(np.array([], np.int64)).size == 0


def test_threads_begin_to_read_at_once(tmp_path: Path) -> None:
    """Of two files that were opened for one path one is closed: nobody may be reading from it."""
    prefix, threads = write(str(tmp_path / "corpus"), [[*range(1000)]]), 8
    barrier = threading.Barrier(threads)

    def read(corpus: IndexedCorpus) -> list[bytes]:
        barrier.wait()
        return [corpus.files["bin"].read(0, 2000) for _ in range(20)]

    with ThreadPoolExecutor(threads) as pool:
        for _ in range(100):
            found = list(pool.map(read, [IndexedCorpus(prefix)] * threads))
            assert {part for parts in found for part in parts} == {np.arange(1000, dtype=np.uint16).tobytes()}
