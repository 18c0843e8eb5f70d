"""What is wrong with a mixture that no single line of its file can tell. Every message names the file."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence

from megatron_cpt.corpus.curation_origins import common_origin
from megatron_cpt.corpus.holdout import are_apart
from megatron_cpt.corpus.sources import parse_partition
from megatron_cpt.mixture.config import StageConfig
from megatron_cpt.mixture.mixture import Corpus, Mixture
from megatron_cpt.utils.console import counted
from megatron_cpt.utils.errors import InputError, Refusals

MAX_TOKENS = 1 << 62


def check_mixture(mixture: Mixture) -> None:
    """What no single corpus can tell: enough text, one tokenizer, names, and nothing both trained on and validated with.

    Of a mixture with mistakes (see config/partial.py): of what can be read in it.

    Raises:
        InputError: one of it is wrong; InputErrors: several are
    """
    refusals = Refusals()
    with refusals.noted():
        _check_stages(mixture, refusals)
    corpora = mixture.corpora + mixture.validation
    if corpora:
        _check_corpora(mixture, corpora, refusals)
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


def _check_corpora(mixture: Mixture, corpora: Sequence[Corpus], refusals: Refusals) -> None:
    """Note those that are too short, and those with another tokenizer than most of them."""
    made_with = Counter(corpus.manifest.tokenizer.fingerprint for corpus in corpora)
    usual = max(corpora, key=lambda one: made_with[one.manifest.tokenizer.fingerprint])
    for corpus in corpora:
        with refusals.noted():
            _check_length(mixture, corpus)
        with refusals.noted():
            _check_tokenizer(usual, corpus)


def _check_tokenizer(usual: Corpus, corpus: Corpus) -> None:
    first, other = usual.manifest.tokenizer, corpus.manifest.tokenizer
    if other.fingerprint != first.fingerprint:
        raise InputError(
            f"{corpus.prefix}.json was made with tokenizer {other.name} ({other.path}, {other.vocab_size} tokens) but "
            f"{usual.prefix}.json with {first.name} ({first.path}, {first.vocab_size} tokens)"
        )


def _check_stages(mixture: Mixture, refusals: Refusals) -> None:
    """Note what can be said of the stages' names and lengths whatever the run's; what was refused in one hides no other."""
    for stage in mixture.stages:
        with refusals.noted():
            _check_seq_length(mixture, stage)
        with refusals.noted():
            _check_steps(mixture.path, stage)
        with refusals.noted():
            _check_shares(mixture.path + (f": stage {stage.name}" if len(mixture.stages) > 1 else ""), stage)
    for check in (_check_names, _check_tokens, _check_fractions):
        with refusals.noted():
            check(mixture.path, mixture.stages)


def _check_seq_length(mixture: Mixture, stage: StageConfig) -> None:
    if stage.tokens is not None and stage.tokens < mixture.seq_length:
        found = counted(stage.tokens, "token")
        raise InputError(f"{mixture.path}: stage {stage.name} has {found}; one sample takes {mixture.seq_length}")


def _check_steps(path: str, stage: StageConfig) -> None:
    last = stage.almr_parts[-1].begin_tokens
    if stage.tokens is not None and last >= stage.tokens:
        raise InputError(
            f"{path}: stage {stage.name}: almr.steps has a step at {last} tokens; the stage ends at {stage.tokens}"
        )


def _check_shares(where: str, stage: StageConfig) -> None:
    """InputError where a group that gets a share has no corpus."""
    almr = [share for part in stage.almr_parts for share in (part.first, part.last)]
    shares = {"additional": max(almr), "general": 1 - min(almr)}
    for group, share in shares.items():
        if share and not getattr(stage, group):
            raise InputError(f"{where}: almr gives the {group} group a share of {float(share):g} but it lists no corpus")


def _check_names(path: str, stages: Sequence[StageConfig]) -> None:
    names = [stage.name for stage in stages]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{path}: two stages are named {name!r}; set different names")


def _check_tokens(path: str, stages: Sequence[StageConfig]) -> None:
    tokens = sum(stage.tokens or 0 for stage in stages)
    if tokens > MAX_TOKENS:
        raise InputError(f"{path}: the stages have {float(tokens):g} tokens; expected at most 2**62")


def _check_fractions(path: str, stages: Sequence[StageConfig]) -> None:
    fractions = [stage.fraction for stage in stages]
    total = sum(fraction or 0 for fraction in fractions)
    if total > 1 or (None not in fractions and total != 1):
        raise InputError(
            f"{path}: the fractions of the stages sum to {float(total):g}; expected 1, or less and a last stage without a "
            "budget"
        )
    if total == 1 and None in fractions:
        raise InputError(f"{path}: the fractions of the stages sum to 1, which leaves nothing for the others")


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
