"""Samples of a mixture as micro-batches of one data-parallel rank (numpy; no torch here)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megatron_cpt.data.mixture import Corpus, Mixture
from megatron_cpt.data.sampling import SampleOrder


@dataclass(frozen=True)
class Batch:
    """One micro-batch.

    Attributes:
        tokens: int64 [micro_batch_size, seq_length + 1]; inputs are all but the last column, targets all but the first
        mask: float32 [micro_batch_size]; 0 for samples that only fill up a validation batch
    """

    tokens: np.ndarray
    mask: np.ndarray


@dataclass(frozen=True)
class BatchShape:
    """How a global batch is dealt out: micro-batch m of data-parallel rank r holds the samples from (m * dp + r) * mbs."""

    micro_batch_size: int
    global_batch_size: int
    data_parallel_rank: int
    data_parallel_size: int

    @property
    def num_microbatches(self) -> int:
        return self.global_batch_size // (self.micro_batch_size * self.data_parallel_size)

    def offsets(self) -> Iterator[range]:
        """Places within the global batch, one range for each micro-batch of this rank."""
        for m in range(self.num_microbatches):
            start = (m * self.data_parallel_size + self.data_parallel_rank) * self.micro_batch_size
            yield range(start, start + self.micro_batch_size)


class TrainingData:
    """The samples of a mixture in their order. `consumed_samples` is the whole state of a run's data."""

    def __init__(self, mixture: Mixture, global_batch_size: int) -> None:
        self.corpora = mixture.corpora
        self.seq_length = mixture.seq_length
        self.order: SampleOrder = mixture.sample_order(global_batch_size)

    def sample(self, n: int) -> np.ndarray:
        """Tokens of the n-th sample of the run, int64 [seq_length + 1]."""
        corpus, _, i = self.order.locate(n)
        return self._read(corpus, i)

    def _read(self, corpus: int, i: int) -> np.ndarray:
        return self.corpora[corpus].data.sample(i * self.seq_length, self.seq_length + 1)

    def microbatches(self, consumed_samples: int, shape: BatchShape) -> Iterator[Batch]:
        """This rank's micro-batches of the global batch that starts at `consumed_samples`."""
        corpora, _, samples = self.order.locate_many(consumed_samples, shape.global_batch_size)
        for offsets in shape.offsets():
            tokens = np.stack([self._read(int(corpora[place]), int(samples[place])) for place in offsets])
            yield Batch(tokens, np.ones(len(tokens), np.float32))


def validation_samples(corpus: Corpus, seq_length: int, eval_samples: int | None) -> int:
    """How many samples of a validation set an evaluation takes."""
    available = corpus.num_samples(seq_length)
    return available if eval_samples is None else min(eval_samples, available)


def validation_microbatches(corpus: Corpus, seq_length: int, num_samples: int, shape: BatchShape) -> Iterator[Batch]:
    """The first samples of a validation set, in order; `shape.global_batch_size` covers them all, masked past the end."""
    for offsets in shape.offsets():
        mask = np.array([place < num_samples for place in offsets], np.float32)
        starts = [min(place, num_samples - 1) * seq_length for place in offsets]
        yield Batch(np.stack([corpus.data.sample(start, seq_length + 1) for start in starts]), mask)
