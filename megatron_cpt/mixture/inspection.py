"""What is in a mixture: the table of its stages and corpora, any of its samples as text, and documents that are in twice."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt
from rich.console import Console

from megatron_cpt.corpus.indexed_dataset import IndexedCorpus
from megatron_cpt.mixture.file import load_mixture
from megatron_cpt.mixture.ledger import Ledger, check_max_epochs, make_ledger, unreached
from megatron_cpt.mixture.loader import read_token_ranges
from megatron_cpt.mixture.mixture import Mixture
from megatron_cpt.mixture.order.order import MAX_SAMPLES
from megatron_cpt.mixture.stages import whole
from megatron_cpt.tokenizer import load_tokenizer
from megatron_cpt.utils.console import counted, print_heading
from megatron_cpt.utils.errors import InputError
from megatron_cpt.utils.tables import PlainTable, number_column, text_column

LONGEST_LISTED = 5  # documents that are named of those in twice


@dataclass(frozen=True)
class MixtureQuestions:
    """What to show of a mixture; see `inspect_data.InspectConfig` for the fields."""

    path: str
    run_samples: int | None
    global_batch_size: int
    samples: int
    at: tuple[int, ...]
    overlap: bool
    tokenizer: str | None


def inspect_mixture(questions: MixtureQuestions, console: Console) -> None:
    """Print the table, or the samples, or the overlap that was asked for.

    InputError: a mixture that no run would take, or documents that are both trained on and validated with.
    """
    mixture = load_mixture(questions.path)
    if questions.overlap and not mixture.validation:
        raise InputError(f"{mixture.path}: lists no validation sets; expected some to look for in the training corpora")
    if questions.overlap:
        _print_overlap(mixture, console)
        return
    run_samples = questions.run_samples or default_run(mixture)
    numbers = [*range(questions.samples), *questions.at]
    if not numbers or questions.samples:
        schedule = mixture.schedule(run_samples)
        console.print(ledger_table(make_ledger(mixture, schedule, run_samples)))
        if note := unreached(mixture, schedule, run_samples):
            console.print(f"note: {note}")
        check_max_epochs(mixture, schedule, run_samples)
    if numbers:
        _print_samples(mixture, max(run_samples, 1), numbers, questions, console)


def default_run(mixture: Mixture) -> int:
    """Samples of a run to show when none is given: all budgets, or else as many as the corpora have together."""
    if all(stage.tokens is not None for stage in mixture.stages):
        return whole(Fraction(sum(stage.tokens or 0 for stage in mixture.stages), mixture.seq_length))
    return sum(corpus.num_samples(mixture.seq_length) for corpus in mixture.corpora)


def depends_on_length(mixture: Mixture) -> bool:
    """Whether another length of the run is another order: fractions of it, and an ALMR that changes until its end."""
    *_, last = mixture.stages
    ramps_to_the_end = last.tokens is None and last.almr_parts[-1].first != last.almr_parts[-1].last
    return ramps_to_the_end or any(stage.fraction is not None for stage in mixture.stages)


def ledger_table(ledger: Ledger) -> PlainTable:
    """What a run will consume, by stage and corpus."""
    begun = f" from {ledger.first_sample:,} on" if ledger.first_sample else ""
    several = len(ledger.stages) > 1
    table = PlainTable(
        *(text_column(name) for name in (["stage"] if several else []) + ["corpus", "group", "language"]),
        *(number_column(name) for name in ("samples", "tokens", "share", "epochs")),
        title=f"{ledger.samples:,} samples{begun} of {ledger.seq_length:,} tokens; "
        f"ALMR asked {ledger.almr_asked:.4f}, realised {ledger.almr_realised:.4f}",
        caption="by language: " + ", ".join(f"{code} {share:.4f}" for code, share in sorted(ledger.languages.items())),
    )
    for stage in ledger.stages:
        if several:
            almr = f"ALMR {stage.almr_realised:.4f}, asked {stage.almr_asked:.4f}"
            tokens = f"{stage.samples * ledger.seq_length:,}"
            table.add_section()
            table.add_row(stage.stage, almr, "", "", f"{stage.samples:,}", tokens, "", "", style="bold")
        for row in ledger.rows:
            if row.stage == stage.stage:
                group = row.group if row.sub_group is None else f"{row.group}/{row.sub_group}"
                names = (row.corpus, group, row.language)
                figures = (f"{row.samples:,}", f"{row.tokens:,}", f"{row.share:.4f}", f"{row.epochs:.2f}")
                table.add_row(*([""] if several else []), *names, *figures)
    return table


def _print_samples(
    mixture: Mixture, run_samples: int, numbers: Sequence[int], questions: MixtureQuestions, console: Console
) -> None:
    """Where samples lie, and their text."""
    if min(numbers) < 0 or max(numbers) >= MAX_SAMPLES:
        raise InputError(
            f"sample {min(numbers) if min(numbers) < 0 else max(numbers)}: expected a number from 0 to 2**62 - 1"
        )
    if max(numbers) >= run_samples and not questions.run_samples:
        if depends_on_length(mixture):
            raise InputError(
                f"sample {max(numbers)}: {mixture.path}: stages depend on the length of the run; expected run_samples"
            )
        run_samples = max(numbers) + 1
    schedule = mixture.schedule(run_samples)
    order = mixture.sample_order(schedule, questions.global_batch_size)
    tokenizer = load_tokenizer(questions.tokenizer or mixture.manifest.tokenizer.path)
    for n in numbers:
        place, ((_, token_ranges),) = order.lookup(n), order.token_ranges(n, 1)
        corpus = mixture.corpora[place.corpus]
        tokens = np.empty(mixture.seq_length + 1, np.int64)
        read_token_ranges(corpus.data, token_ranges, tokens)
        where = f"sample {n:,}: {corpus.name}, epoch {place.epoch:,}, sample {place.sample:,}, tokens from {place.begin:,}"
        print_heading(console, where)
        print(tokenizer.decode(tokens.tolist()))  # as it is: no wrapping


def _print_overlap(mixture: Mixture, console: Console) -> None:
    """Say which documents of validation sets are in training corpora too. InputError: there are some."""
    problems = []
    for valid in mixture.validation:
        for corpus in mixture.corpora:
            found = list(overlapping(valid.data, corpus.data))
            console.print(f"{valid.name}, {corpus.name}: {counted(len(found), 'document')} in common", highlight=False)
            if found:
                some = ", ".join(f"{a} = {b}" for a, b in found[:LONGEST_LISTED])
                problems.append(f"{counted(len(found), 'document')} of {valid.name} in {corpus.name} ({some})")
    if problems:
        raise InputError(f"{mixture.path}: {'; '.join(problems)}; expected none that is both trained on and validated with")


def overlapping(valid: IndexedCorpus, training: IndexedCorpus) -> Iterator[tuple[int, int]]:
    """(sequence of `valid`, sequence of `training`) with equal tokens, each of `valid` once; empty ones do not count.

    Reads the lengths of all training documents, and the tokens of those that are as long as one of `valid`.
    """
    wanted: dict[bytes, int] = {}
    for number in range(len(valid)):
        tokens = valid[number]
        if tokens.size:
            wanted.setdefault(_digest(tokens), number)
    lengths = np.unique(valid.lengths())
    for number in np.flatnonzero(np.isin(training.lengths(), lengths[lengths > 0])).tolist():
        twin = wanted.pop(_digest(training[number]), None)
        if twin is not None:
            yield twin, number


def _digest(tokens: npt.NDArray[np.generic]) -> bytes:
    return hashlib.blake2b(tokens.astype("<i4").tobytes(), digest_size=16).digest()
