"""The ledger against a sample-by-sample count."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_mixtures import make_corpus, make_mixture

from megatron_cpt.mixture.config import AlmrRamp
from megatron_cpt.mixture.ledger import check_max_epochs, make_ledger
from megatron_cpt.mixture.mixture import Corpus, Mixture
from megatron_cpt.utils.errors import InputError

SEQ_LENGTH = 4


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> list[Corpus]:
    """10, 20 and 5 samples of 4 tokens."""
    folder = tmp_path_factory.mktemp("ledger")
    described = [("wiki", "en", 43, "general"), ("books", "en", 81, "general"), ("news", "zh", 21, "additional")]
    return [make_corpus(folder, *description) for description in described]


def mixture_of(corpora: list[Corpus], almr: Fraction | list[tuple[int | None, Fraction]]) -> Mixture:
    """wiki has three times the weight of books; `almr`: one, or (samples, ALMR) of each stage."""
    return make_mixture(corpora, SEQ_LENGTH, almr, weights=[3, 1, 1])


def test_a_ledger_by_hand(corpora: list[Corpus]) -> None:
    mixture = mixture_of(corpora, Fraction(1, 5))
    ledger = make_ledger(mixture, mixture.schedule(100), 100)
    assert (ledger.first_sample, ledger.samples, ledger.seq_length) == (0, 100, 4)
    assert (ledger.almr_asked, ledger.almr_realised) == (0.2, 0.2)
    assert ledger.languages == {"en": 0.8, "zh": 0.2}
    wiki, books, news = ledger.rows
    assert [(row.corpus, row.group, row.language) for row in ledger.rows] == [
        ("wiki", "general", "en"),
        ("books", "general", "en"),
        ("news", "additional", "zh"),
    ]
    assert (wiki.samples, wiki.tokens, wiki.share, wiki.epochs) == (60, 240, 0.6, 6.0)
    assert (books.samples, books.tokens, books.share, books.epochs) == (20, 80, 0.2, 1.0)
    assert (news.samples, news.tokens, news.share, news.epochs) == (20, 80, 0.2, 4.0)


def test_three_stages_by_hand(corpora: list[Corpus]) -> None:
    """0.2 -> 0.33 -> 0.5, every sample accounted for."""
    stages = [(1000, Fraction(1, 5)), (2000, Fraction(33, 100)), (None, Fraction(1, 2))]
    mixture = mixture_of(corpora, stages)
    ledger = make_ledger(mixture, mixture.schedule(7001), 7001)
    assert [(s.stage, s.first_sample, s.samples) for s in ledger.stages] == [
        ("1", 0, 1000),
        ("2", 1000, 2000),
        ("3", 3000, 4001),
    ]
    assert [row.samples for row in ledger.rows if row.corpus == "news"] == [200, 660, 2001]  # 2000.5 is rounded up
    assert [s.almr_realised for s in ledger.stages] == [0.2, 0.33, 2001 / 4001]
    assert [s.almr_asked for s in ledger.stages] == [0.2, 0.33, 0.5]
    assert sum(row.samples for row in ledger.rows) == 7001
    assert ledger.rows[-1].epochs == 2861 / 5  # by the end of the run
    assert ledger.almr_realised == 2861 / 7001
    short = make_ledger(mixture, mixture.schedule(1500), 1500)
    assert [(s.stage, s.samples) for s in short.stages] == [("1", 1000), ("2", 500)]
    later = make_ledger(mixture, mixture.schedule(7001), 7001, first_sample=2000)
    assert [(s.stage, s.first_sample, s.samples) for s in later.stages] == [("2", 2000, 1000), ("3", 3000, 4001)]
    assert (later.first_sample, later.samples) == (2000, 5001)


@settings(max_examples=40, deadline=None)
@given(
    samples=st.integers(1, 400),
    almrs=st.lists(st.tuples(st.integers(1, 150), st.fractions(0, 1)), min_size=1, max_size=4),
    batch=st.integers(1, 16),
)
def test_the_ledger_is_what_the_run_reads(
    corpora: list[Corpus], samples: int, almrs: list[tuple[int, Fraction]], batch: int
) -> None:
    samples -= samples % batch  # runs take whole global batches
    mixture = mixture_of(corpora, [*almrs[:-1], (None, almrs[-1][1])])
    schedule = mixture.schedule(samples)
    order = mixture.sample_order(schedule, batch)
    read = [order.lookup(n) for n in range(samples)]
    counts = Counter(place.corpus for place in read)
    ledger = make_ledger(mixture, schedule, samples)
    given_ = {corpus.name: 0 for corpus in corpora}
    for row in ledger.rows:
        given_[row.corpus] += row.samples
    assert list(given_.values()) == [counts[i] for i in range(3)]
    assert sum(row.tokens for row in ledger.rows) == samples * SEQ_LENGTH
    if samples:
        for place, corpus in enumerate(corpora):
            last = [row for row in ledger.rows if row.corpus == corpus.name][-1]
            assert last.epochs == counts[place] / corpus.num_samples(SEQ_LENGTH)
        assert sum(ledger.languages.values()) == pytest.approx(1)
        assert ledger.almr_realised == counts[2] / samples
        assert abs(ledger.almr_realised - ledger.almr_asked) * samples <= 0.5 + 1e-9


def test_nothing_read(corpora: list[Corpus]) -> None:
    mixture = mixture_of(corpora, Fraction(1, 5))
    ledger = make_ledger(mixture, mixture.schedule(1), 0)
    assert (ledger.samples, ledger.almr_realised, ledger.rows, ledger.stages) == (0, 0.0, (), ())


@pytest.mark.parametrize(("almr", "realised"), [(Fraction(0), 0.0), (Fraction(1), 1.0)])
def test_one_group_only(corpora: list[Corpus], almr: Fraction, realised: float) -> None:
    mixture = mixture_of(corpora, almr)
    assert make_ledger(mixture, mixture.schedule(7), 7).almr_realised == realised


def test_limits(corpora: list[Corpus]) -> None:
    limited = [*corpora[:2], replace(corpora[2], max_epochs=Fraction(4))]
    mixture = mixture_of(limited, Fraction(1, 5))
    check_max_epochs(mixture, mixture.schedule(100), 100)  # 20 samples of 5: four times
    wanted = r"m\.yaml: 103 samples of 4 would read corpus news \(21 tokens\) 4\.2000 times; its max_epochs is 4: give it"
    with pytest.raises(InputError, match=wanted):
        check_max_epochs(mixture, mixture.schedule(103), 103)
    check_max_epochs(mixture, replace(mixture.schedule(100), moved=(0, 0, 0)), 100)
    with pytest.raises(InputError, match=r"4\.2000 times"):
        check_max_epochs(
            mixture, replace(mixture.schedule(100), moved=(0, 0, 1)), 100
        )  # read once more by an earlier mixture


@pytest.mark.parametrize("samples", range(1, 60))
def test_exactly_as_many_epochs_as_allowed(corpora: list[Corpus], samples: int) -> None:
    """No rounding: 11 of 10 samples are 1.1 epochs, which 1.1 in the file allows."""
    limit = Fraction(samples, 10)
    mixture = mixture_of([replace(corpora[0], max_epochs=Fraction(str(float(limit))))], Fraction(0))
    check_max_epochs(mixture, mixture.schedule(samples), samples)
    with pytest.raises(InputError, match="would read corpus wiki"):
        check_max_epochs(mixture, mixture.schedule(samples + 1), samples + 1)


def test_a_ramp_is_summed_up(corpora: list[Corpus]) -> None:
    mixture = mixture_of(corpora, Fraction(0))
    ramp = replace(mixture.stages[0], almr=AlmrRamp(Fraction(1, 5), Fraction(3, 5)))
    mixture = replace(mixture, stages=(ramp,))
    ledger = make_ledger(mixture, mixture.schedule(1000), 1000)
    assert (ledger.almr_asked, ledger.almr_realised) == (0.4, 0.4)
    assert ledger.stages[0].samples == 1000


def test_a_corpus_name_is_no_path(tmp_path: Path) -> None:
    """The ledger knows corpora by name, whatever their place on disk."""
    corpus = make_corpus(tmp_path, "x", "en", 43, "general")
    named = replace(corpus, name="en/wiki: 1")
    mixture = make_mixture([named], SEQ_LENGTH, Fraction(0))
    assert [row.corpus for row in make_ledger(mixture, mixture.schedule(8), 8).rows] == ["en/wiki: 1"]
