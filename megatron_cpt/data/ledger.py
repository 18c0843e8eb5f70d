"""The ledger: how many samples, tokens and epochs each corpus gives to a run. Counted, never assumed."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_cpt.data.mixture import Mixture


@dataclass(frozen=True)
class LedgerRow:
    """One corpus of a run."""

    corpus: str
    group: str
    language: str
    samples: int
    tokens: int
    share: float
    epochs: float


@dataclass(frozen=True)
class Ledger:
    """What the first `samples` samples of a run consist of."""

    samples: int
    seq_length: int
    almr_asked: float
    almr_realised: float
    rows: tuple[LedgerRow, ...]


def make_ledger(mixture: Mixture, samples: int) -> Ledger:
    """Count the first `samples` samples of the run (targets: seq_length tokens each)."""
    counts = mixture.splitter_tree().counts(samples)
    rows = tuple(
        LedgerRow(
            corpus=corpus.name,
            group="general" if place < len(mixture.general) else "additional",
            language=corpus.language,
            samples=count,
            tokens=count * mixture.seq_length,
            share=count / samples if samples else 0.0,
            epochs=count / corpus.num_samples(mixture.seq_length),
        )
        for place, (corpus, count) in enumerate(zip(mixture.corpora, counts, strict=True))
    )
    return Ledger(
        samples=samples,
        seq_length=mixture.seq_length,
        almr_asked=float(mixture.almr),
        almr_realised=realised_almr(mixture, samples),
        rows=rows,
    )


def realised_almr(mixture: Mixture, samples: int) -> float:
    """Share of the additional group in the first `samples` samples of the run."""
    counts = mixture.splitter_tree().counts(samples)
    return sum(counts[len(mixture.general) :]) / samples if samples else 0.0
