"""The ledger against a sample-by-sample count."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_cpt.data.indexed import IndexedCorpus, IndexedWriter
from megatron_cpt.data.ledger import make_ledger
from megatron_cpt.data.mixture import Corpus, Mixture
from tests.tiny_manifests import manifest

SEQ_LENGTH = 4


def make_corpus(folder: Path, name: str, language: str, tokens: int, weight: int) -> Corpus:
    prefix = str(folder / name)
    with IndexedWriter(prefix, np.uint16) as writer:
        writer.add_document(np.arange(tokens))
    return Corpus(name, prefix, Fraction(weight), manifest(language=language, tokens=tokens), IndexedCorpus(prefix))


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> list[Corpus]:
    """10, 20 and 5 samples of 4 tokens."""
    folder = tmp_path_factory.mktemp("ledger")
    described = [("wiki", "en", 43, 3), ("books", "en", 81, 1), ("news", "zh", 21, 1)]
    return [make_corpus(folder, *description) for description in described]


def make_mixture(corpora: list[Corpus], almr: Fraction) -> Mixture:
    return Mixture("m.yaml", SEQ_LENGTH, 1, almr, tuple(corpora[:2]), tuple(corpora[2:]), ())


def test_a_ledger_by_hand(corpora: list[Corpus]) -> None:
    ledger = make_ledger(make_mixture(corpora, Fraction(1, 5)), 100)
    assert (ledger.samples, ledger.seq_length) == (100, 4)
    assert (ledger.almr_asked, ledger.almr_realised) == (0.2, 0.2)
    wiki, books, news = ledger.rows
    assert [(row.corpus, row.group, row.language) for row in ledger.rows] == [
        ("wiki", "general", "en"),
        ("books", "general", "en"),
        ("news", "additional", "zh"),
    ]
    assert (wiki.samples, wiki.tokens, wiki.share, wiki.epochs) == (60, 240, 0.6, 6.0)
    assert (books.samples, books.tokens, books.share, books.epochs) == (20, 80, 0.2, 1.0)
    assert (news.samples, news.tokens, news.share, news.epochs) == (20, 80, 0.2, 4.0)


@settings(max_examples=40, deadline=None)
@given(samples=st.integers(1, 400), almr=st.fractions(0, 1), batch=st.integers(1, 16))
def test_the_ledger_is_what_the_run_reads(corpora: list[Corpus], samples: int, almr: Fraction, batch: int) -> None:
    samples -= samples % batch  # runs take whole global batches
    mixture = make_mixture(corpora, almr)
    order = mixture.sample_order(batch)
    read = [order.locate(n) for n in range(samples)]
    counts = Counter(corpus for corpus, *_ in read)
    ledger = make_ledger(mixture, samples)
    assert [row.samples for row in ledger.rows] == [counts[i] for i in range(3)]
    assert sum(row.tokens for row in ledger.rows) == samples * SEQ_LENGTH
    for place, row in enumerate(ledger.rows):
        epochs = {epoch for corpus, epoch, _ in read if corpus == place}
        assert len(epochs) == -(-row.samples // corpora[place].num_samples(SEQ_LENGTH))
        assert row.epochs == row.samples / corpora[place].num_samples(SEQ_LENGTH)
    if samples:
        assert sum(row.share for row in ledger.rows) == pytest.approx(1)
        assert ledger.almr_realised == counts[2] / samples
        assert abs(ledger.almr_realised - ledger.almr_asked) * samples <= 0.5 + 1e-9


def test_nothing_read(corpora: list[Corpus]) -> None:
    ledger = make_ledger(make_mixture(corpora, Fraction(1, 5)), 0)
    assert (ledger.samples, ledger.almr_realised) == (0, 0.0)
    assert [(row.samples, row.share, row.epochs) for row in ledger.rows] == [(0, 0.0, 0.0)] * 3


@pytest.mark.parametrize(("almr", "realised"), [(Fraction(0), 0.0), (Fraction(1), 1.0)])
def test_one_group_only(corpora: list[Corpus], almr: Fraction, realised: float) -> None:
    assert make_ledger(make_mixture(corpora, almr), 7).almr_realised == realised
