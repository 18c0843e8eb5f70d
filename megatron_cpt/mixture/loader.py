"""Samples of a mixture as micro-batches of one data-parallel rank (numpy; no torch here)."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from threading import Thread
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from megatron_cpt.config.run import DataConfig
from megatron_cpt.corpus.indexed_dataset import IndexedCorpus
from megatron_cpt.mixture.mixture import Corpus
from megatron_cpt.utils.errors import RunError

T = TypeVar("T")
STOP_POLL_SECONDS = 0.2
TokenRange = tuple[int, int]  # first token in the .bin, number of tokens


@dataclass(frozen=True)
class Batch:
    """One micro-batch. A pipeline stage that reads no tokens has `cu_seqlens` only.

    Attributes:
        tokens: int64 [micro_batch_size, seq_length + 1]; inputs are all but the last column, targets all but the first
        loss_mask: float32 [micro_batch_size, seq_length]; 0 where a target does not count
        cu_seqlens: int32 [documents + 1]; where documents begin in the inputs laid end to end, and their end
            (micro_batch_size * seq_length); every sample begins one. None: attention over whole samples
    """

    tokens: npt.NDArray[np.int64] | None
    loss_mask: npt.NDArray[np.float32] | None
    cu_seqlens: npt.NDArray[np.int32] | None = None


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


class Order(Protocol):
    """Which tokens are the samples of a run."""

    @property
    def seq_length(self) -> int:
        """Inputs of a sample; it has one token more."""

    def token_ranges(self, first: int, count: int) -> list[tuple[int, list[TokenRange]]]:
        """Of samples first to first + count - 1: the corpus, and its parts, seq_length + 1 tokens together."""


class TrainingData:
    """The samples of a run in their order: a pure function of the sample number.

    `reads_tokens` False: a pipeline stage in the middle, which needs to know where documents begin, if anything.
    """

    def __init__(
        self,
        corpora: Sequence[IndexedCorpus],
        order: Order,
        config: DataConfig,
        reads_tokens: bool = True,
        vocab_size: int | None = None,
    ) -> None:
        self.corpora, self.order, self.config, self.reads_tokens = corpora, order, config, reads_tokens
        self.vocab_size = vocab_size

    def microbatches(self, consumed_samples: int, shape: BatchShape) -> Iterator[Callable[[], Batch]]:
        """What reads this rank's micro-batches of the global batch that starts at `consumed_samples`."""
        for offsets in shape.offsets():
            yield partial(self.read, consumed_samples + offsets.start, len(offsets))

    def read(self, first: int, count: int) -> Batch:
        """Samples first to first + count - 1 of the run.

        RunError: a file has changed or cannot be read, or has ids that are not below `vocab_size`.
        """
        samples, length = self.order.token_ranges(first, count), self.order.seq_length
        tokens: npt.NDArray[np.int64] | None = None
        loss_mask: npt.NDArray[np.float32] | None = None
        cu_seqlens: npt.NDArray[np.int32] | None = None
        if self.reads_tokens:
            tokens = np.empty((count, length + 1), np.int64)
            loss_mask = np.ones((count, length), np.float32)
            for row, (corpus, token_ranges) in zip(tokens, samples, strict=True):
                read_token_ranges(self.corpora[corpus], token_ranges, row)
                if self.vocab_size is not None and row.view(np.uint64).max() >= self.vocab_size:  # negative ones as well
                    raise wrong_id(self.corpora[corpus], token_ranges, row, self.vocab_size)
        if self.config.eod_mask_loss or self.config.reset_attention_mask:
            starts = [document_starts(self.corpora[corpus], token_ranges) for corpus, token_ranges in samples]
            if self.config.eod_mask_loss and loss_mask is not None:
                for row, found in zip(loss_mask, starts, strict=True):
                    row[found - 1] = 0  # the input before a document's first token
            if self.config.reset_attention_mask:
                cu_seqlens = pack(starts, length)
        return Batch(tokens, loss_mask, cu_seqlens)


def read_token_ranges(corpus: IndexedCorpus, token_ranges: Sequence[TokenRange], out: npt.NDArray[np.int64]) -> None:
    """Fill `out` with the tokens of (first token, number of tokens) one after the other."""
    place = 0
    for first, count in token_ranges:
        out[place : place + count] = corpus.read(first, count)
        place += count


def wrong_id(
    corpus: IndexedCorpus, token_ranges: Sequence[TokenRange], row: npt.NDArray[np.int64], vocab_size: int
) -> RunError:
    """What to say of a sample that was read from these token ranges and has an id that is in no vocabulary of this size."""
    wrong = int(np.flatnonzero(row.view(np.uint64) >= vocab_size)[0])
    position, place = 0, wrong
    for first, count in token_ranges:
        if place < count:
            position = first + place
            break
        place -= count
    return RunError(
        f"{corpus.prefix}.bin: token {position:,} (document {corpus.document_at(position):,}) is {row[wrong]}; expected ids "
        f"from 0 to {vocab_size - 1}, the vocabulary of the tokenizer in its manifest: the file is damaged"
    )


def document_starts(corpus: IndexedCorpus, token_ranges: Sequence[TokenRange]) -> npt.NDArray[np.int64]:
    """(n,) places of a sample, from 1 to that of the last target, where another document begins.

    They are found in the index, not by looking for an end token. Each span but the first begins with a document.
    """
    found: list[npt.NDArray[np.int64]] = []
    place = 0
    for first, count in token_ranges:
        if place:
            found.append(np.array([place]))
        found.append(corpus.sequences_at(first, first + count) - first + place)
        place += count
    return np.concatenate(found)


def pack(starts: Sequence[npt.NDArray[np.int64]], length: int) -> npt.NDArray[np.int32]:
    """`Batch.cu_seqlens` of samples of `length` inputs with these document starts."""
    rows = [np.concatenate([[0], found[found < length]]) + i * length for i, found in enumerate(starts)]
    return np.concatenate([*rows, [len(starts) * length]]).astype(np.int32)


def prefetch(
    reads: Iterable[Callable[[], T]], threads: int, depth: int, stopping: Callable[[], bool] = lambda: False
) -> Generator[T | None]:
    """The results of `reads` in order; `threads` of them read ahead by up to `depth` results (0 threads: none does).

    What a read raises is raised in its turn. None comes in place of a result that is not there yet when `stopping` says so.
    Close the iterator to stop reading ahead.
    """
    if threads == 0:
        for read in reads:
            yield read()
        return
    ahead: deque[Future[T]] = deque()
    todo: SimpleQueue[tuple[Future[T], Callable[[], T]] | None] = SimpleQueue()
    # Not a ThreadPoolExecutor: the interpreter would wait at its end for a read that hangs.
    readers = [Thread(target=_read_all, args=(todo,), name=f"reader-{n}", daemon=True) for n in range(threads)]
    for reader in readers:
        reader.start()
    try:
        for read in reads:
            ahead.append(Future())
            todo.put((ahead[-1], read))
            if len(ahead) > depth:
                yield _result(ahead.popleft(), stopping)
        while ahead:
            yield _result(ahead.popleft(), stopping)
    finally:
        for future in ahead:
            future.cancel()
        for _ in readers:
            todo.put(None)
        for reader in readers:
            reader.join(STOP_POLL_SECONDS)


def _read_all(todo: SimpleQueue[tuple[Future[T], Callable[[], T]] | None]) -> None:
    """What a reader thread does until it gets None."""
    while (item := todo.get()) is not None:
        future, read = item
        if not future.set_running_or_notify_cancel():
            continue
        try:
            future.set_result(read())
        except BaseException as error:  # raised again where the result is asked for
            future.set_exception(error)


def _result(future: Future[T], stopping: Callable[[], bool]) -> T | None:
    """The result, or None when `stopping` while it is waited for."""
    while not wait([future], timeout=STOP_POLL_SECONDS).done:
        if stopping():
            return None
    return future.result()


class Waited(Iterator[T]):
    """An iterator that counts the seconds its consumer waits for it."""

    def __init__(self, inner: Iterator[T]) -> None:
        self._inner, self.seconds = inner, 0.0

    def __next__(self) -> T:
        began = time.perf_counter()
        try:
            return next(self._inner)
        finally:
            self.seconds += time.perf_counter() - began


def run_microbatches(
    data: TrainingData, consumed_samples: int, shape: BatchShape, steps: int, finish: Callable[[Batch], Any]
) -> Iterator[Callable[[], Any]]:
    """What reads all of this rank's micro-batches of `steps` global batches; `finish` is done to each by its reader."""
    for step in range(steps):
        for read in data.microbatches(consumed_samples + step * shape.global_batch_size, shape):
            yield partial(_read_and_finish, read, finish)


def _read_and_finish(read: Callable[[], Batch], finish: Callable[[Batch], Any]) -> Any:
    return finish(read())


def validation_samples(corpus: Corpus, seq_length: int, eval_samples: int | None) -> int:
    """How many samples of a validation set an evaluation takes."""
    available = corpus.num_samples(seq_length)
    return available if eval_samples is None else min(eval_samples, available)


@dataclass(frozen=True)
class InOrder:
    """The first samples of one corpus, in order; after the last comes that one again, to fill batches."""

    seq_length: int
    num_samples: int

    def token_ranges(self, first: int, count: int) -> list[tuple[int, list[TokenRange]]]:
        """See `Order`."""
        places = [min(n, self.num_samples - 1) for n in range(first, first + count)]
        return [(0, [(place * self.seq_length, self.seq_length + 1)]) for place in places]


def validation_microbatches(
    corpus: Corpus, seq_length: int, num_samples: int, shape: BatchShape, config: DataConfig, reads_tokens: bool = True
) -> Iterator[Batch]:
    """The first samples of a validation set, in order; `shape.global_batch_size` covers them all, masked past the end."""
    vocab_size = corpus.manifest.tokenizer.vocab_size
    data = TrainingData([corpus.data], InOrder(seq_length, num_samples), config, reads_tokens, vocab_size)
    for offsets in shape.offsets():
        batch = data.read(offsets.start, len(offsets))
        if batch.loss_mask is not None:
            batch.loss_mask[max(0, num_samples - offsets.start) :] = 0
        yield batch
