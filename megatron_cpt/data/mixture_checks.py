"""What is wrong with a mixture that no single line of its file can tell. Every message names the file."""

from __future__ import annotations

import os

from megatron_cpt.data.curation_origins import common_origin
from megatron_cpt.data.holdout import are_apart
from megatron_cpt.data.mixture import Corpus, Mixture
from megatron_cpt.data.sources import parse_partition
from megatron_cpt.errors import InputError, Refusals
from megatron_cpt.screen import counted

MAX_TOKENS = 1 << 62


def check_mixture(mixture: Mixture) -> None:
    """What no single corpus can tell: enough text, one tokenizer, names, and nothing both trained on and validated with.

    Raises:
        InputError: one of it is wrong; InputErrors: several are
    """
    refusals = Refusals()
    with refusals.noted():
        _check_budgets(mixture)
    for corpus in mixture.corpora + mixture.validation:
        with refusals.noted():
            _check_length(mixture, corpus)
        with refusals.noted():
            _check_tokenizer(mixture, corpus)
    names = [corpus.name for corpus in mixture.validation]  # what the metrics know them by
    for name in names:
        if names.count(name) > 1:
            refusals.add(InputError(f"{mixture.path}: two validation sets are named {name!r}; set different names"))
    for corpus in mixture.validation:
        for training in mixture.corpora:
            with refusals.noted():
                _check_apart(mixture.path, training, corpus)
    refusals.raise_any()


def _check_length(mixture: Mixture, corpus: Corpus) -> None:
    if corpus.num_samples(mixture.seq_length) < 1:
        raise InputError(
            f"{mixture.path}: seq_length is {mixture.seq_length} but {corpus.prefix}.bin has only "
            f"{counted(corpus.data.num_tokens, 'token')}; expected {mixture.seq_length + 1} or more, for one sample"
        )


def _check_tokenizer(mixture: Mixture, corpus: Corpus) -> None:
    first, other = mixture.manifest.tokenizer, corpus.manifest.tokenizer
    if other.fingerprint != first.fingerprint:
        raise InputError(
            f"{corpus.prefix}.json was made with tokenizer {other.name} ({other.path}, {other.vocab_size} tokens) but "
            f"{mixture.corpora[0].prefix}.json with {first.name} ({first.path}, {first.vocab_size} tokens)"
        )


def _check_budgets(mixture: Mixture) -> None:
    """What can be said of the stages' names and lengths whatever the run's."""
    names = [stage.name for stage in mixture.stages]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{mixture.path}: two stages are named {name!r}; set different names")
    tokens = sum(stage.tokens or 0 for stage in mixture.stages)
    if tokens > MAX_TOKENS:
        raise InputError(f"{mixture.path}: the stages have {float(tokens):g} tokens; expected at most 2**62")
    for stage in mixture.stages:
        if stage.tokens is not None and stage.tokens < mixture.seq_length:
            found = counted(stage.tokens, "token")
            raise InputError(f"{mixture.path}: stage {stage.name} has {found}; one sample takes {mixture.seq_length}")
        begins = [part.begin_tokens for part in stage.almr]
        if stage.tokens is not None and begins[-1] >= stage.tokens:
            raise InputError(
                f"{mixture.path}: stage {stage.name}: almr.steps has a step at {begins[-1]} tokens; the stage ends at "
                f"{stage.tokens}"
            )
    fractions = [stage.fraction for stage in mixture.stages]
    total = sum(fraction or 0 for fraction in fractions)
    if total > 1 or (None not in fractions and total != 1):
        raise InputError(
            f"{mixture.path}: the fractions of the stages sum to {float(total):g}; expected 1, or less and a last stage "
            f"without a budget"
        )
    if total == 1 and None in fractions:
        raise InputError(f"{mixture.path}: the fractions of the stages sum to 1, which leaves nothing for the others")


def _check_apart(path: str, training: Corpus, validation: Corpus) -> None:
    """InputError when two corpora share documents, as far as their manifests tell."""
    if os.path.realpath(training.prefix) == os.path.realpath(validation.prefix):
        raise InputError(f"{path}: {validation.prefix} is both a training corpus and a validation set")
    ours, theirs = training.manifest, validation.manifest
    if ours.files["bin"].sha256 == theirs.files["bin"].sha256:
        raise InputError(f"{path}: {validation.prefix}.bin and {training.prefix}.bin, of a training corpus, are equal")
    if ours.partition and theirs.partition:
        (mine, count), (other, other_count) = parse_partition(ours.partition), parse_partition(theirs.partition)
        if mine != other and count == other_count:
            return  # different parts of one input
    if are_apart(ours.holdout, theirs.holdout):
        return
    if raw := common_origin(ours, theirs):
        raise InputError(
            f"{path}: validation set {validation.name} and training corpus {training.name} may have documents in common: "
            f"both were made from {raw}, one of them curated; use different files, or hold out of one (--holdout)"
        )
    read = {source.sha256: source.path for source in ours.sources if source.sha256 and source.documents}
    for source in theirs.sources:
        if source.sha256 in read and source.documents:
            raise InputError(
                f"{path}: validation set {validation.name} and training corpus {training.name} have documents in common: "
                f"both were made from {read[source.sha256]}; use different files, or hold out of one (--holdout)"
            )
