"""Micro-batches: all ranks together read the samples of the run in their order, whatever the layout."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_cpt.data.indexed import IndexedCorpus, IndexedWriter
from megatron_cpt.data.loader import BatchShape, TrainingData, validation_microbatches, validation_samples
from megatron_cpt.data.manifest import TokenizerInfo
from megatron_cpt.data.mixture import Corpus, Mixture
from tests.tiny_manifests import manifest

SEQ_LENGTH = 8
MILLION = 1_000_000
TOKENS = {"en": 331, "code": 90, "zh": 205}  # 41, 11 and 25 samples
MANIFEST = manifest(language="en", tokenizer=TokenizerInfo("/t", "hf:t", 4 * MILLION, 0, None, "ab" * 32, "cd" * 32))


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Mixture:
    """Three corpora whose tokens tell where they are from: corpus x 1,000,000 + position."""
    folder = tmp_path_factory.mktemp("loader")
    corpora = []
    for place, (name, tokens) in enumerate(TOKENS.items()):
        prefix = str(folder / name)
        with IndexedWriter(prefix, np.int32) as writer:
            for part in np.array_split(np.arange(tokens) + place * MILLION, 7):
                writer.add_document(part)
        corpora.append(Corpus(name, prefix, Fraction(tokens), MANIFEST, IndexedCorpus(prefix)))
    english, code, chinese = corpora
    return Mixture("m.yaml", SEQ_LENGTH, 5, Fraction(1, 3), (english, code), (chinese,), (replace(code, name="valid"),))


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
        reference = TrainingData(mixture, global_batch_size=8)
        wanted = np.stack([reference.sample(consumed + i) for i in range(8)])
        parts = []
        for shape in shapes(micro_batch_size, 8, data_parallel_size):
            data = TrainingData(mixture, global_batch_size=8)  # as in another process
            batches = list(data.microbatches(consumed, shape))
            assert len(batches) == shape.num_microbatches == 8 // data_parallel_size // micro_batch_size
            for batch in batches:
                assert batch.tokens.shape == (micro_batch_size, SEQ_LENGTH + 1)
                assert batch.tokens.dtype == np.int64
                assert batch.mask.dtype == np.float32
                assert batch.mask.tolist() == [1.0] * micro_batch_size
            parts.append([batch.tokens for batch in batches])
        dealt = np.concatenate([tokens for microbatch in zip(*parts, strict=True) for tokens in microbatch])
        assert np.array_equal(dealt, wanted)


def test_samples_are_what_the_order_says(mixture: Mixture) -> None:
    data = TrainingData(mixture, global_batch_size=6)
    for n in range(120):
        corpus, _, sample = data.order.locate(n)
        start = corpus * MILLION + sample * SEQ_LENGTH
        assert data.sample(n).tolist() == list(range(start, start + SEQ_LENGTH + 1))


def test_labels_are_the_inputs_shifted_and_every_token_is_a_target_once(mixture: Mixture) -> None:
    """Inputs tokens[:, :-1], targets tokens[:, 1:]: a sample's last target is the next sample's first input."""
    data = TrainingData(mixture, global_batch_size=1)
    targets: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for n in range(200):
        corpus, epoch, _ = data.order.locate(n)
        tokens = data.sample(n)
        assert tokens[1:].tolist() == (tokens[:-1] + 1).tolist()
        if epoch == 0:
            targets[corpus] += tokens[1:].tolist()
    for corpus, tokens in enumerate(TOKENS.values()):
        whole_samples = (tokens - 1) // SEQ_LENGTH * SEQ_LENGTH
        assert sorted(targets[corpus]) == list(range(corpus * MILLION + 1, corpus * MILLION + 1 + whole_samples))


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
        for batch in validation_microbatches(corpus, SEQ_LENGTH, num_samples, shape):
            assert batch.tokens.shape == (micro_batch_size, SEQ_LENGTH + 1)
            assert batch.mask.shape == (micro_batch_size,)
            assert set(batch.mask.tolist()) <= {0.0, 1.0}
            seen += batch.tokens[batch.mask == 1].tolist()
            masked += int((batch.mask == 0).sum())
    starts = [MILLION + i * SEQ_LENGTH for i in range(num_samples)]
    assert sorted(seen) == [list(range(start, start + SEQ_LENGTH + 1)) for start in starts]
    assert masked == size - num_samples
