"""Which documents the samples of a run hold: rows of (step, sample, corpus, document, tokens), for any stretch of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from megatron_cpt.corpus.document_origins import DocumentOrigins, origins_of
from megatron_cpt.corpus.indexed_dataset import IndexedCorpus
from megatron_cpt.mixture.loader import Order
from megatron_cpt.mixture.mixture import Corpus
from megatron_cpt.mixture.order.order import SampleLocations, SampleOrder

CHUNK = 1 << 16  # samples at a time: some megabytes of rows
Numbers = npt.NDArray[np.int64]
Lookup = Callable[[SampleOrder, int, int], SampleLocations]


@dataclass(frozen=True)
class Stretch:
    """Steps of a run with one order and one global batch size. Samples are numbered from 0 on, steps from 1 on.

    Attributes:
        first_step: the step that begins with `first_sample`
        end_sample: the first sample that is not of it any more
    """

    first_step: int
    first_sample: int
    end_sample: int
    global_batch_size: int
    order: Order

    @property
    def end_step(self) -> int:
        """The step after the last."""
        return self.first_step + -(-(self.end_sample - self.first_sample) // self.global_batch_size)

    def step_of(self, samples: Numbers) -> Numbers:
        """The steps that samples are of."""
        return self.first_step + (samples - self.first_sample) // self.global_batch_size

    def samples_of(self, first_step: int, last_step: int) -> range:
        """The samples of those of its steps that are neither before `first_step` nor after `last_step`."""
        begin = self.first_sample + max(first_step - self.first_step, 0) * self.global_batch_size
        end = self.first_sample + max(last_step + 1 - self.first_step, 0) * self.global_batch_size
        return range(min(begin, self.end_sample), min(end, self.end_sample))


@dataclass(frozen=True)
class Reads:
    """Rows of documents, or of parts of them, as samples read them; int64 (rows,) each.

    A sample has seq_length + 1 tokens; its last one is a target only, and the first input of the sample behind it in the
    corpus.

    Attributes:
        step, sample: of the run
        corpus: place in the mixture
        document: of the corpus, from 0 on
        first_token: within the document
        tokens: how many of the document
        file, line: where the document comes from, see `DocumentOrigins.lookup`
    """

    step: Numbers
    sample: Numbers
    corpus: Numbers
    document: Numbers
    first_token: Numbers
    tokens: Numbers
    file: Numbers
    line: Numbers

    def __len__(self) -> int:
        return len(self.step)

    def only(self, rows: npt.NDArray[np.bool_]) -> Reads:
        """Some of the rows."""
        return Reads(*(getattr(self, field.name)[rows] for field in fields(self)))


class CorpusDocuments:
    """Where the documents of a corpus begin and end in its tokens, and where they come from."""

    def __init__(self, corpus: Corpus, first_file: int) -> None:
        """`first_file`: the number of its first input file among those of all corpora."""
        self.corpus, self.first_file = corpus, first_file
        self.bounds = document_bounds(corpus.data)
        self.origins: DocumentOrigins = origins_of(corpus.prefix, corpus.manifest)

    def parts(self, begin: Numbers, tokens: Numbers) -> tuple[Numbers, Numbers, Numbers, Numbers]:
        """Token ranges (ranges,), `tokens` of them from `begin` on -> the documents in them.

        Returns: the span, the document, its first token that is in it, and how many are; (parts,) each, by span.
        """
        first = np.searchsorted(self.bounds, begin, side="right") - 1
        last = np.searchsorted(self.bounds, begin + tokens - 1, side="right") - 1
        counts = last - first + 1
        span = np.repeat(np.arange(begin.size), counts)
        document = first[span] + np.arange(span.size) - np.repeat(np.cumsum(counts) - counts, counts)
        start = np.maximum(begin[span], self.bounds[document])
        length = np.minimum(begin[span] + tokens[span], self.bounds[document + 1]) - start
        some = length > 0  # documents without tokens lie between others
        return span[some], document[some], (start - self.bounds[document])[some], length[some]


def document_bounds(corpus: IndexedCorpus) -> Numbers:
    """(documents + 1,) the first token of each document, and where the last one ends."""
    begins = np.append(corpus.pointers() // corpus.dtype.itemsize, corpus.num_tokens)
    return np.asarray(begins[corpus.documents(0, corpus.num_documents + 1)], np.int64)


def documents_of(corpora: Sequence[Corpus]) -> list[CorpusDocuments]:
    """The documents of each corpus of a mixture."""
    found: list[CorpusDocuments] = []
    files = 0
    for corpus in corpora:
        found.append(CorpusDocuments(corpus, files))
        files += len(found[-1].origins.files)
    return found


def token_ranges_of(order: Order, first: int, count: int, lookup: Lookup) -> tuple[Numbers, Numbers, Numbers, Numbers]:
    """The parts of samples first to first + count - 1: sample, corpus, first token in the corpus, tokens; (parts,) each."""
    if not isinstance(order, SampleOrder):
        parts = [
            (first + i, corpus, begin, tokens)
            for i, (corpus, token_ranges) in enumerate(order.token_ranges(first, count))
            for begin, tokens in token_ranges
        ]
        columns = np.array(parts, np.int64).reshape(-1, 4).T
        return columns[0], columns[1], columns[2], columns[3]
    places, length = lookup(order, first, count), order.seq_length + 1
    sizes = np.array([corpus.tokens for corpus in order.corpora], np.int64)
    samples, corpora = np.arange(first, first + count), places.corpus.astype(np.int64)
    here = np.minimum(length, sizes[corpora] - places.begin)
    wraps = np.flatnonzero(here < length)  # goes on at the corpus's beginning
    return (
        np.insert(samples, wraps + 1, samples[wraps]),
        np.insert(corpora, wraps + 1, corpora[wraps]),
        np.insert(places.begin, wraps + 1, 0),
        np.insert(here, wraps + 1, length - here[wraps]),
    )


def read_samples(stretch: Stretch, documents: Sequence[CorpusDocuments], first: int, count: int, lookup: Lookup) -> Reads:
    """The rows of samples first to first + count - 1, in the order in which each sample reads them."""
    samples, corpora, begin, tokens = token_ranges_of(stretch.order, first, count, lookup)
    parts: list[tuple[Numbers, ...]] = []
    for number, one in enumerate(documents):
        token_ranges = np.flatnonzero(corpora == number)
        span, document, first_token, length = one.parts(begin[token_ranges], tokens[token_ranges])
        file, line = one.origins.lookup(document)
        file = np.where(file < 0, file, file + one.first_file)
        parts.append((token_ranges[span], document, first_token, length, file, line))
    span, *columns = (np.concatenate(column) for column in zip(*parts, strict=True))
    by_span = np.argsort(span, kind="stable")
    sample = samples[span[by_span]]
    sorted_columns = (column[by_span] for column in columns)
    return Reads(stretch.step_of(sample), sample, corpora[span[by_span]], *sorted_columns)


def read_steps(
    stretches: Iterable[Stretch],
    documents: Sequence[CorpusDocuments],
    first_step: int,
    last_step: int,
    lookup: Lookup,
    threads: int = 1,
) -> Iterator[Reads]:
    """The rows of all samples of some steps, in their order, a piece at a time; `threads` work ahead."""
    ahead: deque[Future[Reads]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for stretch in stretches:
            samples = stretch.samples_of(first_step, last_step)
            for first in range(samples.start, samples.stop, CHUNK):
                count = min(CHUNK, samples.stop - first)
                ahead.append(pool.submit(read_samples, stretch, documents, first, count, lookup))
                if len(ahead) > threads:
                    yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def reads_of_documents(
    stretches: Sequence[Stretch],
    documents: Sequence[CorpusDocuments],
    places: Sequence[tuple[int, int]],
    first_step: int,
    last_step: int,
) -> Iterator[Reads]:
    """The rows of some documents, one document after the other; `places`: corpus and document of each.

    They are found by the inverse of the order, or, in Megatron-LM's, by looking at all samples, once.
    """
    if not all(isinstance(stretch.order, SampleOrder) for stretch in stretches):
        scanned = [_only(reads, places) for reads in read_steps(stretches, documents, first_step, last_step, locate_on_cpu)]
        for place in places:
            for reads in scanned:
                yield _only(reads, [place])
        return
    for corpus, document in places:
        begin, end = documents[corpus].bounds[document : document + 2].tolist()
        for stretch in stretches:
            samples = stretch.samples_of(first_step, last_step)
            if samples and isinstance(stretch.order, SampleOrder):
                for n in stretch.order.find_tokens(corpus, begin, end, samples.stop, samples.start):
                    yield _only(read_samples(stretch, documents, n, 1, locate_on_cpu), [(corpus, document)])


def _only(reads: Reads, places: Sequence[tuple[int, int]]) -> Reads:
    """The rows of some documents."""
    rows = np.zeros(len(reads), np.bool_)
    for corpus, document in places:
        rows |= (reads.corpus == corpus) & (reads.document == document)
    return reads.only(rows)


def locate_on_cpu(order: SampleOrder, first: int, count: int) -> SampleLocations:
    """Places of samples, by the compiled order where there is one."""
    return order.lookup_many(first, count)
