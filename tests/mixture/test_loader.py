"""Micro-batches: all ranks together read the samples of the run in their order, whatever the layout and the threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_mixtures import make_corpus, make_mixture
from tiny_orders import Case, plan

from megatron_cpt.config.run import DataConfig
from megatron_cpt.corpus.indexed_dataset import HEADER, MAGIC, VERSION, IndexedCorpus, IndexedWriter
from megatron_cpt.mixture.loader import (
    Batch,
    BatchShape,
    InOrder,
    TrainingData,
    document_starts,
    pack,
    prefetch,
    run_microbatches,
    validation_microbatches,
    validation_samples,
)
from megatron_cpt.mixture.mixture import Mixture
from megatron_cpt.mixture.order.megatron import MegatronOrder
from megatron_cpt.utils.errors import RunError

SEQ_LENGTH = 8
MILLION = 1_000_000
TOKENS = {"en": 331, "code": 90, "zh": 205}  # 41, 11 and 25 samples
LENGTHS = [3, 1, 1, 9, 0, 0, 20, 2, 8]  # of documents, repeated; the rest is one document
NEITHER = DataConfig()
BOTH = DataConfig(reset_attention_mask=True, eod_mask_loss=True)


def lengths_of(tokens: int) -> list[int]:
    lengths: list[int] = []
    while sum(lengths) + LENGTHS[len(lengths) % len(LENGTHS)] <= tokens:
        lengths.append(LENGTHS[len(lengths) % len(LENGTHS)])
    return [*lengths, tokens - sum(lengths)]


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Mixture:
    """Three corpora whose tokens tell where they are from: corpus x 1,000,000 + position."""
    folder = tmp_path_factory.mktemp("loader")
    corpora = [
        make_corpus(folder, name, "en", tokens, group, place * MILLION, lengths_of(tokens))
        for place, (name, tokens, group) in enumerate(
            zip(TOKENS, TOKENS.values(), ("general", "general", "additional"), strict=True)
        )
    ]
    valid = replace(corpora[1], name="valid", group=None)
    return make_mixture(corpora, SEQ_LENGTH, Fraction(1, 3), seed=5, validation=[valid])


def training_data(
    mixture: Mixture, global_batch_size: int = 8, config: DataConfig = NEITHER, reads_tokens: bool = True
) -> TrainingData:
    order = mixture.sample_order(mixture.schedule(10_000), global_batch_size)
    return TrainingData([corpus.data for corpus in mixture.corpora], order, config, reads_tokens)


def tokens_of(batch: Batch) -> np.ndarray:
    assert batch.tokens is not None
    return batch.tokens


def shapes(micro_batch_size: int, global_batch_size: int, data_parallel_size: int) -> list[BatchShape]:
    """One for each data-parallel rank."""
    return [BatchShape(micro_batch_size, global_batch_size, rank, data_parallel_size) for rank in range(data_parallel_size)]


@settings(max_examples=60, deadline=None)
@given(micro=st.integers(1, 4), ranks=st.integers(1, 6), count=st.integers(1, 5))
def test_offsets_cover_the_global_batch_once(micro: int, ranks: int, count: int) -> None:
    size = micro * ranks * count
    per_rank = [list(shape.offsets()) for shape in shapes(micro, size, ranks)]
    assert {len(offsets) for offsets in per_rank} == {count}
    assert sorted(place for offsets in per_rank for part in offsets for place in part) == list(range(size))
    # One micro-batch of all ranks is a contiguous part of the batch, so fewer ranks read the same samples at the same time.
    in_order = [place for m in range(count) for offsets in per_rank for place in offsets[m]]
    assert in_order == list(range(size))


@pytest.mark.parametrize("micro_batch_size", [1, 2])
@pytest.mark.parametrize("data_parallel_size", [1, 2, 4])
def test_all_ranks_together_read_the_run_in_order(mixture: Mixture, data_parallel_size: int, micro_batch_size: int) -> None:
    for consumed in (0, 8, 160):  # the last is well into the second epoch of some corpora
        wanted = tokens_of(training_data(mixture).read(consumed, 8))
        parts = []
        for shape in shapes(micro_batch_size, 8, data_parallel_size):
            data = training_data(mixture)  # as in another process
            batches = [read() for read in data.microbatches(consumed, shape)]
            assert len(batches) == shape.num_microbatches == 8 // data_parallel_size // micro_batch_size
            for batch in batches:
                assert tokens_of(batch).shape == (micro_batch_size, SEQ_LENGTH + 1)
                assert tokens_of(batch).dtype == np.int64
                assert batch.loss_mask is not None
                assert batch.loss_mask.dtype == np.float32
                assert np.array_equal(batch.loss_mask, np.ones((micro_batch_size, SEQ_LENGTH)))
                assert batch.cu_seqlens is None
            parts.append([tokens_of(batch) for batch in batches])
        dealt = np.concatenate([tokens for microbatch in zip(*parts, strict=True) for tokens in microbatch])
        assert np.array_equal(dealt, wanted)


def test_samples_are_what_the_order_says(mixture: Mixture) -> None:
    """In later epochs too, where they begin at other tokens and the last one goes on at the corpus's beginning."""
    data, sizes = training_data(mixture, 6), list(TOKENS.values())
    order = mixture.sample_order(mixture.schedule(600), 6)
    around = 0
    for n in range(600):
        corpus, epoch, sample, begin = order.lookup(n)
        positions = [(begin + i) % sizes[corpus] for i in range(SEQ_LENGTH + 1)]
        assert tokens_of(data.read(n, 1))[0].tolist() == [corpus * MILLION + position for position in positions]
        assert begin == sample * SEQ_LENGTH + order.token_phase(corpus, epoch)
        around += positions[-1] < positions[0]
    assert around > 5


def test_every_token_is_a_target_once_in_an_epoch(mixture: Mixture) -> None:
    """Inputs tokens[:, :-1], targets tokens[:, 1:]: a sample's last target is the next sample's first input."""
    data = training_data(mixture, 1)
    order = mixture.sample_order(mixture.schedule(900), 1)
    targets: dict[tuple[int, int], list[int]] = {}
    for n in range(900):
        corpus, epoch, _, _ = order.lookup(n)
        targets.setdefault((corpus, epoch), []).extend(tokens_of(data.read(n, 1))[0, 1:].tolist())
    for (corpus, epoch), found in targets.items():
        tokens = list(TOKENS.values())[corpus]
        whole_samples = (tokens - 1) // SEQ_LENGTH * SEQ_LENGTH
        assert len(found) == len(set(found)) <= whole_samples
        if epoch == 0 and len(found) == whole_samples:
            assert sorted(found) == list(range(corpus * MILLION + 1, corpus * MILLION + 1 + whole_samples))
    assert len([found for found in targets.values() if len(found) > 80]) > 8


# --- documents ---


def boundaries(mixture: Mixture) -> dict[int, set[int]]:
    """For each corpus, the tokens (as numbered in it) that begin a document."""
    starts = {}
    for place, corpus in enumerate(mixture.corpora):
        lengths = corpus.data.sequence_lengths.tolist()
        starts[place] = {sum(lengths[:i]) for i, length in enumerate(lengths) if length}
    return starts


def test_documents_begin_where_the_index_says(mixture: Mixture) -> None:
    data, starts = training_data(mixture, 6, BOTH), boundaries(mixture)
    for n in range(0, 600, 2):
        batch = data.read(n, 2)
        assert batch.loss_mask is not None
        assert batch.cu_seqlens is not None
        assert batch.cu_seqlens.dtype == np.int32
        wanted, mask = [], np.ones((2, SEQ_LENGTH))
        for row, sample in enumerate(tokens_of(batch).tolist()):
            begins = [token % MILLION in starts[token // MILLION] for token in sample]
            wanted += [row * SEQ_LENGTH + i for i in range(SEQ_LENGTH) if i == 0 or begins[i]]
            mask[row] = [not begins[i + 1] for i in range(SEQ_LENGTH)]
        assert batch.cu_seqlens.tolist() == [*wanted, 2 * SEQ_LENGTH]
        assert np.array_equal(batch.loss_mask, mask)


def test_each_option_does_its_part_only(mixture: Mixture) -> None:
    both = training_data(mixture, 6, BOTH).read(0, 6)
    only_attention = training_data(mixture, 6, DataConfig(reset_attention_mask=True)).read(0, 6)
    only_loss = training_data(mixture, 6, DataConfig(eod_mask_loss=True)).read(0, 6)
    assert only_loss.cu_seqlens is None
    assert np.array_equal(only_loss.loss_mask, both.loss_mask)  # type: ignore[arg-type]
    assert np.array_equal(only_attention.cu_seqlens, both.cu_seqlens)  # type: ignore[arg-type]
    assert only_attention.loss_mask is not None
    assert only_attention.loss_mask.min() == 1


def test_a_middle_stage_reads_no_tokens(mixture: Mixture) -> None:
    data = training_data(mixture, 6, BOTH, reads_tokens=False)
    for corpus in mixture.corpora:
        assert corpus.data.tokens.size
    batch = data.read(0, 6)
    assert (batch.tokens, batch.loss_mask) == (None, None)
    assert np.array_equal(batch.cu_seqlens, training_data(mixture, 6, BOTH).read(0, 6).cu_seqlens)  # type: ignore[arg-type]
    assert training_data(mixture, 6, reads_tokens=False).read(0, 6) == Batch(None, None, None)


def test_packing_by_hand(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, "x", "en", 20, "general", lengths=[4, 0, 5, 1, 10]).data
    assert document_starts(corpus, [(0, 20)]).tolist() == [4, 9, 10]
    assert document_starts(corpus, [(4, 6)]).tolist() == [5]  # its own beginning is not another document's
    assert document_starts(corpus, [(5, 2)]).tolist() == []
    assert document_starts(corpus, [(18, 2), (0, 6)]).tolist() == [2, 6]
    assert pack([np.array([4, 8]), np.array([], np.int64)], 8).tolist() == [0, 4, 8, 16]


# --- Megatron's own order ---


def test_megatron_order(mixture: Mixture) -> None:
    """The same batches from Megatron-LM's order: documents in its order, whole samples, another document at each part."""
    lengths = [corpus.data.sequence_lengths for corpus in mixture.corpora]
    order = MegatronOrder(lengths, [0.5, 0.2, 0.3], 120, SEQ_LENGTH, 3)
    data = TrainingData([corpus.data for corpus in mixture.corpora], order, BOTH)
    starts = boundaries(mixture)
    for n in range(0, 120, 4):
        batch = data.read(n, 4)
        for row, sample in enumerate(tokens_of(batch).tolist()):
            assert len({token // MILLION for token in sample}) == 1
            for a, b in pairwise(sample):  # the next token of the document, or the first of another
                assert b == a + 1 or b % MILLION in starts[b // MILLION]
            begins = [i for i in range(1, SEQ_LENGTH) if sample[i] % MILLION in starts[sample[i] // MILLION]]
            assert batch.cu_seqlens is not None
            inside = batch.cu_seqlens[(batch.cu_seqlens > row * SEQ_LENGTH) & (batch.cu_seqlens < (row + 1) * SEQ_LENGTH)]
            assert (inside - row * SEQ_LENGTH).tolist() == begins


# --- reading ahead ---


@settings(max_examples=30, deadline=None)
@given(threads=st.integers(0, 8), depth=st.integers(0, 20), first=st.integers(0, 30))
def test_threads_change_nothing(mixture: Mixture, threads: int, depth: int, first: int) -> None:
    (shape,) = shapes(2, 8, 1)
    data = training_data(mixture, 8, BOTH)
    wanted = [read() for step in range(5) for read in data.microbatches(8 * (first + step), shape)]
    found = list(prefetch(run_microbatches(data, 8 * first, shape, 5, lambda batch: batch), threads, depth))
    assert len(found) == len(wanted) == 20
    for ours, theirs in zip(found, wanted, strict=True):
        assert np.array_equal(tokens_of(ours), tokens_of(theirs))
        assert np.array_equal(ours.cu_seqlens, theirs.cu_seqlens)  # type: ignore[arg-type]


def reads(count: int, action: Callable[[int], int]) -> Iterator[Callable[[], int]]:
    for i in range(count):
        yield lambda i=i: action(i)  # type: ignore[misc]


def test_order_whatever_the_delays() -> None:
    def slow(i: int) -> int:
        time.sleep(0.001 * (i * 7919 % 13))
        return i

    assert list(prefetch(reads(60, slow), threads=5, depth=9)) == list(range(60))


def test_no_more_is_read_ahead_than_was_asked() -> None:
    done: list[int] = []

    def note(i: int) -> int:
        done.append(i)
        return i

    with closing(prefetch(reads(1000, note), threads=3, depth=4)) as found:
        assert next(found) == 0
        time.sleep(0.2)
        assert len(done) == 5
        next(found)
        time.sleep(0.2)
        assert len(done) == 6
    assert threading.active_count() == 1 or not [t for t in threading.enumerate() if t.name.startswith("reader")]


@pytest.mark.parametrize("threads", [0, 3])
def test_an_error_comes_in_its_turn(threads: int) -> None:
    def fail(i: int) -> int:
        if i >= 7:
            raise OSError("the disk is gone")
        return i

    found = prefetch(reads(20, fail), threads, 5)
    assert [next(found) for _ in range(7)] == list(range(7))
    with pytest.raises(OSError, match="the disk is gone"):
        next(found)
    assert not [t for t in threading.enumerate() if t.name.startswith("reader")]


# --- validation ---


def test_how_many_validation_samples(mixture: Mixture) -> None:
    corpus = mixture.validation[0]
    assert [validation_samples(corpus, SEQ_LENGTH, n) for n in (None, 1, 11, 12, 1000)] == [11, 1, 11, 11, 11]
    assert validation_samples(corpus, 89, None) == 1


@pytest.mark.parametrize("num_samples", [1, 5, 11])
@pytest.mark.parametrize("micro_batch_size", [1, 2])
@pytest.mark.parametrize("data_parallel_size", [1, 2, 4])
def test_validation_takes_each_sample_once(
    mixture: Mixture, data_parallel_size: int, micro_batch_size: int, num_samples: int
) -> None:
    corpus = mixture.validation[0]
    per_round = micro_batch_size * data_parallel_size
    size = -(-num_samples // per_round) * per_round
    seen, masked = [], 0
    for shape in shapes(micro_batch_size, size, data_parallel_size):
        for batch in validation_microbatches(corpus, SEQ_LENGTH, num_samples, shape, NEITHER):
            assert batch.loss_mask is not None
            assert tokens_of(batch).shape == (micro_batch_size, SEQ_LENGTH + 1)
            assert batch.loss_mask.shape == (micro_batch_size, SEQ_LENGTH)
            assert {tuple(set(row)) for row in batch.loss_mask.tolist()} <= {(0.0,), (1.0,)}
            seen += tokens_of(batch)[batch.loss_mask[:, 0] == 1].tolist()
            masked += int((batch.loss_mask[:, 0] == 0).sum())
    starts = [MILLION + i * SEQ_LENGTH for i in range(num_samples)]
    assert sorted(seen) == [list(range(start, start + SEQ_LENGTH + 1)) for start in starts]
    assert masked == size - num_samples


def test_more_documents_than_fit_32_bits(tmp_path: Path) -> None:
    """2**31 + 5 documents in sparse files: nothing may read, sum or copy their lengths."""
    documents, tokens = 2**31 + 5, 2**33
    with (tmp_path / "large.bin").open("wb") as stream:
        stream.truncate(4 * tokens)
    with (tmp_path / "large.idx").open("wb") as stream:
        stream.write(HEADER.pack(MAGIC, VERSION, 4, documents, documents + 1))
        stream.truncate(HEADER.size + 20 * documents + 8)
        stream.seek(HEADER.size + 4 * (documents - 1))  # the last document has all but the first 2**32 tokens
        stream.write(np.int32(2**31 - 1).tobytes())
        stream.seek(HEADER.size + 12 * documents - 8)
        stream.write(np.int64(4 * (tokens - 2**31 + 1)).tobytes())
        stream.seek(-8, 2)
        stream.write(np.int64(documents).tobytes())
    corpus = IndexedCorpus(str(tmp_path / "large"))
    assert (corpus.num_documents, corpus.num_tokens) == (documents, tokens)
    border = tokens - 2**31 + 1
    before = psutil.Process().memory_info().rss
    assert document_starts(corpus, [(border - 3, 9)]).tolist() == [3]
    assert document_starts(corpus, [(tokens - 4, 4), (0, 5)]).tolist() == [4]
    order = Case([plan(Fraction(0), 1, [Fraction(1)])], [(tokens - 1) // 2048], 1, 256, seq_length=2048).order()
    batch = TrainingData([corpus], order, BOTH).read(10**9, 4)
    assert tokens_of(batch).shape == (4, 2049)
    assert psutil.Process().memory_info().rss - before < 50 << 20


@pytest.mark.parametrize(("document", "place", "token"), [(0, 0, -1), (3, 13, 500), (3, 13, 2**31 - 1)])
def test_an_id_outside_the_vocabulary_is_named(tmp_path: Path, document: int, place: int, token: int) -> None:
    tokens = np.arange(90)
    tokens[place] = token
    with IndexedWriter(str(tmp_path / "c"), np.int32) as writer:
        writer.add_documents(tokens, np.array([3, 1, 9, 77]))
    corpus = IndexedCorpus(str(tmp_path / "c"))
    data = TrainingData([corpus], InOrder(8, 11), NEITHER, vocab_size=500)
    batch = place // 8
    with pytest.raises(
        RunError, match=rf"c\.bin: token {place} \(document {document}\) is {token}; expected ids from 0 to 499"
    ):
        data.read(batch, 1)
    data.read(batch + 2, 4)  # elsewhere all is well
    assert TrainingData([corpus], InOrder(8, 11), NEITHER).read(batch, 1).tokens is not None


def test_a_damaged_index_is_named(tmp_path: Path) -> None:
    with IndexedWriter(str(tmp_path / "c"), np.int32) as writer:
        writer.add_documents(np.arange(90), np.full(9, 10))
    with (tmp_path / "c.idx").open("r+b") as file:
        file.seek(34 + 4 * 9 + 8 * 4)
        file.write((999).to_bytes(8, "little"))  # the fifth document
    data = TrainingData([IndexedCorpus(str(tmp_path / "c"))], InOrder(60, 1), BOTH, vocab_size=500)
    with pytest.raises(RunError, match=r"c\.idx: sequences .* the file is damaged"):
        data.read(0, 1)
