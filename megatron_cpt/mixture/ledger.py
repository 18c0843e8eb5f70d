"""The ledger: how many samples, tokens and epochs each corpus gives to a run. Counted, never assumed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from megatron_cpt.mixture.mixture import Mixture
from megatron_cpt.mixture.stages import Schedule
from megatron_cpt.utils.console import counted
from megatron_cpt.utils.errors import InputError


@dataclass(frozen=True)
class LedgerRow:
    """What one corpus gives to one stage. `share`: of the stage's samples; `epochs`: read by the end of the stage."""

    stage: str
    corpus: str
    group: str
    sub_group: str | None
    language: str
    samples: int
    tokens: int
    share: float
    epochs: float


@dataclass(frozen=True)
class StageTotal:
    """A stage as a whole, as far as the run goes."""

    stage: str
    first_sample: int
    samples: int
    almr_asked: float
    almr_realised: float


@dataclass(frozen=True)
class Ledger:
    """What samples `first_sample` to `first_sample + samples` - 1 of a run consist of."""

    first_sample: int
    samples: int
    seq_length: int
    almr_asked: float
    almr_realised: float
    stages: tuple[StageTotal, ...]
    rows: tuple[LedgerRow, ...]
    languages: dict[str, float]
    """Share of the samples by language."""


def make_ledger(mixture: Mixture, schedule: Schedule, run_samples: int, first_sample: int = 0) -> Ledger:
    """Count the samples of a run (seq_length targets each) from `first_sample` on."""
    borders = _borders(schedule, first_sample, run_samples)
    counts = {n: schedule.counts(n) for n in {n for _, *ends in borders for n in ends} | {first_sample, run_samples}}
    rows, stages = [], []
    for number, begin, end in borders:
        name = mixture.stages[number].name
        given = _difference(counts[end], counts[begin])
        stages.append(
            StageTotal(
                stage=name,
                first_sample=begin,
                samples=end - begin,
                almr_asked=_share(float(schedule.asked(end) - schedule.asked(begin)), end - begin),
                almr_realised=_share(_additional(mixture, given), end - begin),
            )
        )
        for place, corpus in enumerate(mixture.corpora):
            if not given[place] and place not in _used(mixture, number):
                continue
            rows.append(
                LedgerRow(
                    stage=name,
                    corpus=corpus.name,
                    group=corpus.group or "",
                    sub_group=corpus.sub_group,
                    language=corpus.language,
                    samples=given[place],
                    tokens=given[place] * mixture.seq_length,
                    share=_share(given[place], end - begin),
                    epochs=counts[end][place] / corpus.num_samples(mixture.seq_length),
                )
            )
    total = run_samples - first_sample
    given = _difference(counts[run_samples], counts[first_sample])
    languages: dict[str, float] = {}
    for corpus, samples in zip(mixture.corpora, given, strict=True):
        languages[corpus.language] = languages.get(corpus.language, 0.0) + _share(samples, total)
    return Ledger(
        first_sample=first_sample,
        samples=total,
        seq_length=mixture.seq_length,
        almr_asked=_share(float(schedule.asked(run_samples) - schedule.asked(first_sample)), total),
        almr_realised=_share(_additional(mixture, given), total),
        stages=tuple(stages),
        rows=tuple(rows),
        languages=languages,
    )


def unreached(mixture: Mixture, schedule: Schedule, run_samples: int) -> str | None:
    """What to say where the run ends before the last stages begin; None: it reaches all of them."""
    late = [
        (stage.name, start) for stage, start in zip(mixture.stages, schedule.starts, strict=True) if start >= run_samples
    ]
    if not late:
        return None
    names, (_, start) = ", ".join(name for name, _ in late), late[0]
    return (
        f"{mixture.path}: the run ends after {counted(run_samples, 'sample')}, and stage {names} would begin at sample "
        f"{start:,}: never reached; give the stages before it less, or train longer"
    )


def check_max_epochs(mixture: Mixture, schedule: Schedule, run_samples: int) -> None:
    """InputError when the run would read a corpus more often than its max_epochs."""
    for corpus, count in zip(mixture.corpora, schedule.counts(run_samples), strict=True):
        epochs = Fraction(count, corpus.num_samples(mixture.seq_length))
        if corpus.max_epochs is not None and epochs > corpus.max_epochs:
            raise InputError(
                f"{mixture.path}: {run_samples:,} samples of {mixture.seq_length} would read corpus {corpus.name} "
                f"({corpus.data.num_tokens:,} tokens) {float(epochs):.4f} times; its max_epochs is "
                f"{float(corpus.max_epochs):g}: give it a smaller weight or almr, more text, or a higher limit"
            )


def _borders(schedule: Schedule, first_sample: int, run_samples: int) -> list[tuple[int, int, int]]:
    """(stage, its first sample, the one after its last), as far as they lie in the run."""
    ends = [*schedule.starts[1:], max(run_samples, schedule.starts[-1])]
    found = [
        (number, max(start, first_sample), min(end, run_samples))
        for number, (start, end) in enumerate(zip(schedule.starts, ends, strict=True))
    ]
    return [(number, begin, end) for number, begin, end in found if begin < end]


def _used(mixture: Mixture, number: int) -> set[int]:
    """Corpora that a stage lists."""
    stage = mixture.stages[number]
    groups = (mixture.group(stage.general), mixture.group(stage.additional))
    return {position for group in groups if group for position in group.corpora()}


def _difference(counts: Sequence[int], before: Sequence[int]) -> list[int]:
    return [a - b for a, b in zip(counts, before, strict=True)]


def _additional(mixture: Mixture, counts: Sequence[int]) -> int:
    return sum(count for corpus, count in zip(mixture.corpora, counts, strict=True) if corpus.group == "additional")


def _share(part: float, whole: int) -> float:
    return part / whole if whole else 0.0
