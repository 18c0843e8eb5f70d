"""What tools/inspect_data.py shows: of corpora, or of a mixture of them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_cpt.config.require import Requirements
from megatron_cpt.corpus.indexed_dataset import IndexedCorpus
from megatron_cpt.corpus.inspection import compare_corpora, describe_corpus, manifest_if_any, print_checks, print_document
from megatron_cpt.corpus.merge import find_prefixes
from megatron_cpt.mixture.file import load_mixture
from megatron_cpt.mixture.inspection import MixtureQuestions, inspect_mixture
from megatron_cpt.tokenizer import load_tokenizer
from megatron_cpt.utils.console import wide_console
from megatron_cpt.utils.errors import InputError, Refusals

MOST = 1 << 40


@dataclass(frozen=True)
class InspectConfig:
    """Which corpora, or which mixture, to look at, and how closely."""

    input: list[str] | str
    """Prefixes (paths without .bin) or quoted globs of them, or one mixture file (.yaml). May be given without `--input`."""
    document: list[int] | int = field(default_factory=list)
    """Print the text of these documents (counted from 0, negative from the end), of each corpus."""
    tokenizer: str | None = None
    """To decode documents with, when not the one the manifest names."""
    check: bool = False
    """Read all files and compare them with each other, the vocabulary and the manifest."""
    samples: int = 0
    """Of a mixture: print the text of its first samples, so many."""
    at: list[int] | int = field(default_factory=list)
    """Of a mixture: print the text of these samples, however large their numbers."""
    run_samples: int | None = None
    """Of a mixture: length of the run, for fractions and for the table (default: the stages' budgets, or all text once)."""
    global_batch_size: int = 1
    """Of a mixture: samples are shuffled within global batches."""
    overlap: bool = False
    """Of a mixture: look for documents of validation sets that are in training corpora too."""

    def __post_init__(self) -> None:
        with Requirements() as need:
            need.at_least(self, samples=0, run_samples=1, global_batch_size=1)
            for name in ("samples", "run_samples", "global_batch_size"):
                need.field(self, name, lambda value: value <= MOST, "at most 2**40")


def inspect_data(config: InspectConfig) -> None:
    """Print what was asked for. InputError: no corpus there, a document that is not there, or a check that fails."""
    inputs = _inputs(config)
    console = wide_console(sys.stdout, markup=False, highlight=False)
    if _has_mixture(inputs):
        inspect_mixture(_questions(config, inputs), console)
        return
    _refuse_questions(config, inputs)
    prefixes = find_prefixes(inputs)
    documents = [config.document] if isinstance(config.document, int) else config.document
    corpora = [(IndexedCorpus(prefix), manifest_if_any(prefix)) for prefix in prefixes]
    if documents:
        for corpus, manifest in corpora:
            for number in documents:
                print_document(console, corpus, manifest, number, config.tokenizer)
    elif config.check:
        known = load_tokenizer(config.tokenizer) if config.tokenizer else None
        vocab_size = known.vocab_size if known else None
        damaged = [c.prefix for c, manifest in corpora if not print_checks(console, c, manifest, vocab_size)]
        if damaged:
            raise InputError(f"{', '.join(damaged)}: not as it should be (see above)")
    elif len(corpora) == 1:
        console.print(describe_corpus(*corpora[0]))
    else:
        console.print(compare_corpora(corpora))


def check_inspect_files(config: InspectConfig) -> None:
    """Check what a configuration names, and that what is asked can be asked of it, whatever is wrong with it.

    Raises:
        InputError: something cannot be read; InputErrors: several things
    """
    refusals = Refusals()
    with refusals.noted():
        inputs = _inputs(config)
        with refusals.noted():
            (_questions if _has_mixture(inputs) else _refuse_questions)(config, inputs)
        for path in inputs:
            with refusals.noted():
                load_mixture(path) if _has_mixture([path]) else _check_corpora(path)
    with refusals.noted():
        if config.tokenizer is not None:
            load_tokenizer(config.tokenizer)
    refusals.raise_any()


def _inputs(config: InspectConfig) -> list[str]:
    return [config.input] if isinstance(config.input, str) else config.input


def _has_mixture(inputs: Sequence[str]) -> bool:
    return any(path.endswith((".yaml", ".yml")) for path in inputs)


def _check_corpora(pattern: str) -> None:
    """InputError unless there are corpora, with manifests that can be read where there are any."""
    refusals = Refusals()
    for prefix in find_prefixes([pattern]):
        for read in (IndexedCorpus, manifest_if_any):
            with refusals.noted():
                read(prefix)
    refusals.raise_any()


def _refuse_questions(config: InspectConfig, inputs: Sequence[str]) -> None:
    """InputError for what can be asked of a mixture only."""
    if config.overlap or config.at not in ([], ()) or config.samples:
        raise InputError(
            f"input {', '.join(inputs)}: samples, at and overlap are for a mixture file (.yaml), not for corpora"
        )


def _questions(config: InspectConfig, inputs: Sequence[str]) -> MixtureQuestions:
    """What is asked of a mixture. InputError: several, or what can be asked of corpora only."""
    if len(inputs) > 1:
        raise InputError(f"input {', '.join(inputs)}: found a mixture among {len(inputs)} inputs; expected it alone")
    if config.check or config.document not in ([], ()):
        raise InputError(f"input {inputs[0]}: check and document are for corpora, not for a mixture")
    at = (config.at,) if isinstance(config.at, int) else tuple(config.at)
    return MixtureQuestions(
        inputs[0], config.run_samples, config.global_batch_size, config.samples, at, config.overlap, config.tokenizer
    )
