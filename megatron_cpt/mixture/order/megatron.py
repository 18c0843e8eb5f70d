"""Megatron-LM's order of the data, bit-identical, for runs that reproduce or continue one of Megatron-LM's (numpy only).

The functions build what megatron-core's GPTDataset and BlendedDataset build (datasets/gpt_dataset.py, helpers.cpp and
blended_megatron_dataset_builder.py of megatron-core 0.16), under the same names:

* document index: the documents of a corpus, once for each epoch, shuffled;
* sample index: in which entry of the document index, and where in it, each sample begins;
* shuffle index: in which order the samples are read;
* blending index: which corpus gives sample n of the run, and its which sample that is.

One extra token a sample, and the last partial sample of a corpus is dropped, as in Megatron-LM's training. The sample
and the blending index come from compiled code (csrc/) where it could be built, else from the Python here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_cpt.utils.errors import InputError

try:
    from megatron_cpt.mixture.order import _megatron_index
except ImportError:  # installed without a C++ compiler
    _megatron_index = None  # type: ignore[assignment]

INT32_MAX = 2**31 - 1
MAX_CORPORA = 32766  # Megatron's own limit: corpora are int16
FINAL_EPOCH_THRESHOLD = 0.80  # a last epoch of which less is used is shuffled by itself
MID_LEVEL_DATASET_SURPLUS = 0.005  # megatron-core's default: samples built for a corpus beyond its share of the run


@dataclass(frozen=True)
class EpochPlan:
    """How often a corpus is passed over.

    Attributes:
        num_epochs: passes over all its documents
        num_samples: samples they make, at least those asked for
        separate_final_epoch: whether the last epoch's documents and samples are shuffled apart from the others'
        num_samples_sans_final_epoch: samples of all epochs but the last
    """

    num_epochs: int
    num_samples: int
    separate_final_epoch: bool
    num_samples_sans_final_epoch: int


def plan_epochs(tokens_per_epoch: int, num_samples: int, seq_length: int) -> EpochPlan:
    """The fewest epochs that give `num_samples` samples of seq_length + 1 tokens (they overlap by one)."""
    num_epochs = max(1, -(-(num_samples * seq_length + 1) // tokens_per_epoch))
    available = (num_epochs * tokens_per_epoch - 1) // seq_length
    if num_epochs == 1:
        return EpochPlan(1, available, False, 0)
    sans_final = ((num_epochs - 1) * tokens_per_epoch - 1) // seq_length
    per_epoch = (tokens_per_epoch - 1) // seq_length
    separate = num_samples - sans_final < int(FINAL_EPOCH_THRESHOLD * per_epoch)
    return EpochPlan(num_epochs, available, separate, sans_final)


def build_document_index(
    num_documents: int, num_epochs: int, separate_final_epoch: bool, random_state: np.random.RandomState
) -> np.ndarray:
    """int32 (num_epochs * num_documents,): the documents of all epochs shuffled together, or of the last one apart."""
    if separate_final_epoch and num_epochs > 1:
        first = build_document_index(num_documents, num_epochs - 1, False, random_state)
        return np.concatenate([first, build_document_index(num_documents, 1, False, random_state)])
    document_index = np.tile(np.arange(num_documents, dtype=np.int32), num_epochs)
    random_state.shuffle(document_index)
    return document_index


def build_sample_index(
    lengths: np.ndarray, document_index: np.ndarray, seq_length: int, num_samples: int, threads: int = 1
) -> np.ndarray:
    """Where each sample begins, (num_samples + 1, 2): entry of the document index, token within its document.

    Sample k is the tokens k * seq_length to (k + 1) * seq_length of the documents put one after the other. The first
    begins at (0, 0) even when that document has no tokens.

    Args:
        lengths: int32 (documents,), tokens of each
        document_index: int32 (entries,)
        seq_length, num_samples: the documents must have num_samples * seq_length + 1 tokens
        threads: of the compiled builder; the result does not depend on them

    Returns:
        int32; int64 if there are more entries than int32 can count

    Raises:
        ValueError: a document that does not exist, or too few tokens for `num_samples`
    """
    # A length in an .idx file is not aligned: it comes after a header of 34 bytes.
    lengths = np.require(lengths, np.int32, ["C", "A"])
    document_index = np.require(document_index, np.int32, ["C", "A"])
    wide = document_index.size > INT32_MAX
    if _megatron_index:
        return _megatron_index.build_sample_index(lengths, document_index, seq_length, num_samples, threads, wide)
    return _build_sample_index(lengths, document_index, seq_length, num_samples, wide)


def _build_sample_index(
    lengths: np.ndarray, document_index: np.ndarray, seq_length: int, num_samples: int, wide: bool
) -> np.ndarray:
    """The definition. Needs 8 bytes for each entry of the document index more than the compiled twin."""
    if document_index.min() < 0 or document_index.max() >= lengths.size:
        found = f"document_index goes from {document_index.min()} to {document_index.max()}"
        raise ValueError(f"{found}; expected documents from 0 to {lengths.size - 1}")
    ends = np.cumsum(lengths[document_index], dtype=np.int64)
    if not 0 <= num_samples <= (ends[-1] - 1) // seq_length:
        raise ValueError(f"num_samples is {num_samples}; expected 0 to {(ends[-1] - 1) // seq_length}")
    positions = np.arange(num_samples + 1, dtype=np.int64) * seq_length
    entries = np.searchsorted(ends, positions, side="right")  # the entry that holds the token: none of length 0
    offsets = positions - (ends[entries] - lengths[document_index[entries]])
    sample_index = np.stack([entries, offsets], axis=1).astype(np.int64 if wide else np.int32)
    sample_index[0] = 0
    return sample_index


def build_shuffle_index(first_size: int, total_size: int, random_state: np.random.RandomState) -> np.ndarray:
    """(total_size,) the numbers 0 to first_size - 1 shuffled, then the others shuffled: uint32, int64 for too many."""
    dtype = np.int64 if total_size >= np.iinfo(np.uint32).max - 1 else np.uint32
    first = np.arange(first_size, dtype=dtype)
    random_state.shuffle(first)
    if first_size == total_size:
        return first
    last = np.arange(first_size, total_size, dtype=dtype)
    random_state.shuffle(last)
    return np.concatenate([first, last])


def build_blending_index(weights: np.ndarray, num_samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Which dataset gives each sample, int16 (num_samples,), and its which sample that is, int64 (num_samples,).

    Sample n comes from the dataset furthest behind weight * n, in double precision with each operation rounded by itself.

    Args:
        weights: float64 (datasets,), above 0 and adding up to 1
    """
    weights = np.require(weights, np.float64, ["C", "A"])
    if _megatron_index:
        return _megatron_index.build_blending_index(weights, num_samples)
    return _build_blending_index(weights, num_samples)


def _build_blending_index(weights: np.ndarray, num_samples: int) -> tuple[np.ndarray, np.ndarray]:
    """The definition."""
    dataset_index, dataset_sample_index = np.empty(num_samples, np.int16), np.empty(num_samples, np.int64)
    taken = np.zeros(weights.size, np.int64)
    for n in range(num_samples):
        dataset = np.argmax(weights * max(n, 1) - taken)  # the first of those that are equally far behind
        dataset_index[n], dataset_sample_index[n] = dataset, taken[dataset]
        taken[dataset] += 1
    return dataset_index, dataset_sample_index


class DocumentStarts:
    """Where documents begin in their .bin, from a sum for every BLOCK documents: an eighth of a byte for each, not eight.

    Args:
        lengths: int32 (documents,), tokens of each; kept, not copied
    """

    BLOCK = 64

    def __init__(self, lengths: np.ndarray) -> None:
        self.lengths = lengths
        ends = np.cumsum(np.add.reduceat(lengths, np.arange(0, lengths.size, self.BLOCK), dtype=np.int64))
        self.block_starts = np.concatenate([[0], ends[:-1]])

    def __call__(self, documents: np.ndarray) -> np.ndarray:
        """int64 (n,): the first token of each of `documents` (n,)."""
        documents = documents.astype(np.int64)
        blocks = documents // self.BLOCK
        others = blocks[:, None] * self.BLOCK + np.arange(self.BLOCK)
        before = others < documents[:, None]
        return self.block_starts[blocks] + (self.lengths[np.where(before, others, 0)] * before).sum(axis=1, dtype=np.int64)


@dataclass(frozen=True)
class CorpusIndex:
    """What a GPTDataset holds of one corpus.

    Attributes:
        document_index: int32 (epochs * documents,)
        sample_index: int32 or int64 (samples + 1, 2)
        shuffle_index: uint32 or int64 (samples,)
    """

    document_index: np.ndarray
    sample_index: np.ndarray
    shuffle_index: np.ndarray

    @classmethod
    def build(cls, lengths: np.ndarray, num_samples: int, seq_length: int, seed: int, threads: int = 1) -> CorpusIndex:
        """For at least `num_samples` samples of a corpus with documents of these `lengths`, int32 (documents,)."""
        plan = plan_epochs(int(lengths.sum(dtype=np.int64)), num_samples, seq_length)
        random_state = np.random.RandomState(seed)  # the shuffles below draw from it in Megatron's order
        document_index = build_document_index(lengths.size, plan.num_epochs, plan.separate_final_epoch, random_state)
        sample_index = build_sample_index(lengths, document_index, seq_length, plan.num_samples, threads)
        first_size = plan.num_samples_sans_final_epoch if plan.separate_final_epoch else plan.num_samples
        return cls(document_index, sample_index, build_shuffle_index(first_size, plan.num_samples, random_state))

    def __len__(self) -> int:
        return self.shuffle_index.size


class MegatronOrder:
    """The order in which Megatron-LM would read these corpora in a run of `num_samples` samples.

    Several corpora are blended as BlendedMegatronDatasetBuilder does with weights; a single one is read as a plain
    GPTDataset (`--data-path PREFIX`). Unlike the default order (`sampling.SampleOrder`) it depends on the length of the
    run: another `num_samples` may be other numbers of epochs and so another order, from the first sample on.

    Everything is built here and kept, in every process: 4 bytes for each document and epoch and 12 for each sample of
    every corpus (8 more for large ones), 10 for each sample of a blend; up to twice that of one corpus while it is built.

    Args:
        document_lengths: for each corpus int32 (documents,), tokens of each: `IndexedCorpus.lengths`. Of a corpus that
            Megatron-LM split (`--split`), the documents of the training part only
        weights: of each corpus, on any scale
        num_samples: samples of the run, Megatron-LM's train_iters * global_batch_size or train_samples
        seq_length: tokens of a sample, without the extra one
        seed: Megatron-LM's `--seed`
        threads: for the sample indices
        mid_level_dataset_surplus: megatron-core's setting of that name

    Attributes:
        corpora: one CorpusIndex for each corpus
        dataset_index, dataset_sample_index: the blending index; None for a single corpus

    Raises:
        InputError: a corpus without tokens or too large for Megatron, an argument out of range, or a blend that
            takes more samples of a corpus than Megatron-LM builds (there it is an IndexError)
    """

    def __init__(
        self,
        document_lengths: Sequence[np.ndarray],
        weights: Sequence[float],
        num_samples: int,
        seq_length: int,
        seed: int,
        threads: int = 1,
        mid_level_dataset_surplus: float = MID_LEVEL_DATASET_SURPLUS,
    ) -> None:
        _check_numbers(num_samples, seq_length, seed, threads, mid_level_dataset_surplus)
        _check_corpora(document_lengths, weights)
        self.seq_length, self.num_samples = seq_length, num_samples
        self.dataset_index: np.ndarray | None = None
        self.dataset_sample_index: np.ndarray | None = None
        sizes = [num_samples]
        if len(weights) > 1:
            normalized = _normalize(weights)
            targets = _sizes_per_dataset(normalized, num_samples, 0.0)
            sizes = _sizes_per_dataset(normalized, num_samples, mid_level_dataset_surplus)
            # Normalized again, as BlendedDataset does with weights that its builder has normalized: the last bit may differ.
            self.dataset_index, self.dataset_sample_index = build_blending_index(_normalize(normalized), sum(targets))
        self.corpora = [
            CorpusIndex.build(lengths, size, seq_length, seed, threads)
            for lengths, size in zip(document_lengths, sizes, strict=True)
        ]
        if self.dataset_index is not None:
            _check_blend(self.dataset_index, self.corpora, mid_level_dataset_surplus)
        self._starts = [DocumentStarts(lengths) for lengths in document_lengths]

    def __len__(self) -> int:
        """Samples that Megatron-LM's dataset has: those of the run and, because of how it rounds, some more."""
        return len(self.corpora[0]) if self.dataset_index is None else self.dataset_index.size

    def lookup_many(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Samples first to first + count - 1 of the run -> (int32 corpus, int64 sample of the corpus), (count,) each."""
        if first < 0 or count < 0 or first + count > len(self):
            raise InputError(f"{count} samples from {first} were asked for; the order was built for 0 to {len(self) - 1}")
        if self.dataset_index is None or self.dataset_sample_index is None:
            return np.zeros(count, np.int32), np.arange(first, first + count, dtype=np.int64)
        part = slice(first, first + count)
        return self.dataset_index[part].astype(np.int32), self.dataset_sample_index[part].copy()

    def counts(self, n: int) -> list[int]:
        """How many of the first n samples of the run each corpus gives."""
        if self.dataset_index is None:
            return [n]
        return np.bincount(self.dataset_index[:n], minlength=len(self.corpora)).tolist()

    def token_ranges(self, first: int, count: int) -> list[tuple[int, list[tuple[int, int]]]]:
        """Of samples first to first + count - 1 of the run: the corpus, and what `parts` says."""
        corpora, samples = (array.tolist() for array in self.lookup_many(first, count))
        return [(corpus, self.parts(corpus, sample)) for corpus, sample in zip(corpora, samples, strict=True)]

    def parts(self, corpus: int, sample: int) -> list[tuple[int, int]]:
        """The tokens of a sample of `lookup_many`: (first token in the .bin, number of tokens) of each of its parts.

        In order and none empty, together seq_length + 1 tokens: what GPTDataset concatenates.
        """
        index, starts = self.corpora[corpus], self._starts[corpus]
        if not 0 <= sample < len(index):
            raise IndexError(f"sample {sample} of corpus {corpus}; it has 0 to {len(index) - 1}")
        place = int(index.shuffle_index[sample])
        (first, offset), (last, end) = index.sample_index[place : place + 2].tolist()
        documents = index.document_index[first : last + 1]
        begins = starts(documents)
        ends = begins + starts.lengths[documents]
        ends[-1] = begins[-1] + end + 1  # the extra token
        begins[0] += offset
        return [(begin, end - begin) for begin, end in zip(begins.tolist(), ends.tolist(), strict=True) if end > begin]


def _normalize(weights: Sequence[float] | np.ndarray) -> np.ndarray:
    """float64, adding up to 1: numpy's sum, whose rounding is Megatron's."""
    array = np.array(weights, np.float64)
    return array / np.sum(array)


def _sizes_per_dataset(normalized: np.ndarray, num_samples: int, surplus: float) -> list[int]:
    """Samples of each corpus; rounded up twice and in doubles, because Megatron does."""
    return [math.ceil(math.ceil(num_samples * weight) * (1 + surplus)) for weight in normalized.tolist()]


def _check_numbers(num_samples: int, seq_length: int, seed: int, threads: int, surplus: float) -> None:
    for name, value, low, high in (
        ("num_samples", num_samples, 1, 2**53),  # above, doubles cannot count them
        ("seq_length", seq_length, 1, INT32_MAX - 1),
        ("seed", seed, 0, 2**32 - 1),
        ("threads", threads, 1, 1024),
        ("mid_level_dataset_surplus", surplus, 0, 1000),
    ):
        if not low <= value <= high:
            raise InputError(f"{name} is {value}; expected {low} to {high}")


def _check_corpora(document_lengths: Sequence[np.ndarray], weights: Sequence[float]) -> None:
    if not 1 <= len(document_lengths) <= MAX_CORPORA or len(document_lengths) != len(weights):
        found = f"{len(document_lengths)} corpora and {len(weights)} weights"
        raise InputError(f"{found}; expected as many of each, from 1 to {MAX_CORPORA}")
    for corpus, (lengths, weight) in enumerate(zip(document_lengths, weights, strict=True)):
        if not 0 < weight < math.inf:
            raise InputError(f"weight of corpus {corpus} is {weight}; expected a number above 0")
        if lengths.ndim != 1 or lengths.dtype != np.int32:
            found = f"{lengths.dtype} of shape {lengths.shape}"
            raise InputError(f"document lengths of corpus {corpus} are {found}; expected int32 (documents,)")
        if lengths.size > INT32_MAX:
            raise InputError(f"corpus {corpus} has {lengths.size} documents; expected at most {INT32_MAX}, Megatron's limit")
        if lengths.size == 0 or lengths.min() < 0 or lengths.max() == 0:
            found = f"{lengths.size} documents of {lengths.min(initial=0)} to {lengths.max(initial=0)} tokens"
            raise InputError(f"corpus {corpus} has {found}; expected tokens in at least one, and no negative number in any")


def _check_blend(dataset_index: np.ndarray, corpora: Sequence[CorpusIndex], surplus: float) -> None:
    for corpus, taken in enumerate(np.bincount(dataset_index, minlength=len(corpora)).tolist()):
        if taken > len(corpora[corpus]):
            raise InputError(
                f"the blend takes {taken} samples of corpus {corpus}; expected at most {len(corpora[corpus])}, which is "
                f"what Megatron-LM builds with mid_level_dataset_surplus {surplus}"
            )
