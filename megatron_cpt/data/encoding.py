"""Documents -> token ids on several cores, in the order of the input whatever the number of workers."""

from __future__ import annotations

import math
import os
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_cpt.data.documents import BATCH_BYTES, Chunk, batches, read_chunks, texts_of
from megatron_cpt.data.indexed import best_dtype
from megatron_cpt.errors import InputError
from megatron_cpt.tokenizer import Tokenizer, load_tokenizer

BATCHES_PER_WORKER = 4
"""Batches in flight per worker: enough to keep all of them busy, few enough to bound memory."""


@dataclass(frozen=True)
class EncodeSettings:
    """What a worker needs to know; hashable, so that each worker makes its encoder once."""

    tokenizer: str
    eos_token: str | None
    text_key: str
    eos: Literal["none", "document"]
    bos: Literal["none", "document"]


class EncodedBatch(NamedTuple):
    """Documents in order: ids back to back (tokens,) in the corpus dtype, tokens of each (documents,), and counts."""

    tokens: npt.NDArray[Any]
    lengths: npt.NDArray[np.int64]
    sources: npt.NDArray[np.int64]
    text_bytes: int
    empty: int
    read_bytes: int


class Encoder:
    """Chunks -> EncodedBatch, with the eos and bos policy applied."""

    def __init__(self, tokenizer: Tokenizer, settings: EncodeSettings) -> None:
        if settings.bos == "document" and tokenizer.bos_id is None:
            raise InputError(f"bos is 'document' but {settings.tokenizer} has no beginning-of-text token; wanted 'none'")
        self.settings = settings
        self._tokenizer = tokenizer
        self._before = [tokenizer.bos_id] if settings.bos == "document" and tokenizer.bos_id is not None else []
        self._after = [tokenizer.eos_id] if settings.eos == "document" else []
        self.dtype = best_dtype(tokenizer.vocab_size)

    def __call__(self, batch: list[Chunk]) -> EncodedBatch:
        found = [(text, chunk.source) for chunk in batch for text in texts_of(chunk, self.settings.text_key)]
        kept = [(text, source) for text, source in found if text.strip()]
        encoded = self._tokenizer.encode_batch([text for text, _ in kept])
        documents = [[*self._before, *ids, *self._after] for ids in encoded]
        lengths = np.array([len(ids) for ids in documents], dtype=np.int64)
        return EncodedBatch(
            tokens=np.fromiter(chain.from_iterable(documents), dtype=self.dtype, count=int(lengths.sum())),
            lengths=lengths,
            sources=np.array([source for _, source in kept], dtype=np.int64),
            text_bytes=sum(len(text.encode()) for text, _ in kept),
            empty=len(found) - len(kept),
            read_bytes=sum(chunk.nbytes() for chunk in batch),
        )


@cache
def _worker_encoder(settings: EncodeSettings) -> Encoder:
    return Encoder(load_tokenizer(settings.tokenizer, settings.eos_token), settings)


def _encode_in_worker(settings: EncodeSettings, batch: list[Chunk]) -> EncodedBatch:
    return _worker_encoder(settings)(batch)


def ordered_map(
    executor: ProcessPoolExecutor,
    function: Callable[[list[Chunk]], EncodedBatch],
    items: Iterable[list[Chunk]],
    in_flight: int,
) -> Iterator[EncodedBatch]:
    """Results in the order of `items`, with at most `in_flight` items given out and not yet taken back."""
    pending: deque[Future[EncodedBatch]] = deque()
    try:
        for item in items:
            pending.append(executor.submit(function, item))
            if len(pending) >= in_flight:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()


def encode_files(encoder: Encoder, files: list[Path], workers: int) -> Generator[EncodedBatch]:
    """All documents of `files`, in order. Close it to stop the workers early."""
    work = batches(read_chunks(files))
    # Small inputs are not worth the start of other processes.
    workers = min(workers, math.ceil(sum(file.stat().st_size for file in files) / BATCH_BYTES))
    if workers <= 1:
        yield from map(encoder, work)
        return
    # spawn: forking a process that has threads (torch, a progress bar) can deadlock
    context = get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_leave_interrupts_to_parent) as executor:
        task = partial(_encode_in_worker, encoder.settings)
        yield from ordered_map(executor, task, work, in_flight=workers * BATCHES_PER_WORKER)


def _leave_interrupts_to_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def one_thread_per_process() -> Iterator[None]:
    """Cores are shared out by `workers`: keep `tokenizers` from starting a thread pool in each (they inherit it)."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        os.environ.pop(name) if before is None else os.environ.update({name: before})
