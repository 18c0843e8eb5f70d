"""Mixtures of tiny corpora made by hand, without a mixture file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from tiny_manifests import manifest

from megatron_cpt.corpus.indexed_dataset import IndexedCorpus, IndexedWriter
from megatron_cpt.mixture.config import CorpusConfig, Entry, GroupName, StageConfig
from megatron_cpt.mixture.mixture import Corpus, Mixture


def make_corpus(
    folder: Path,
    name: str,
    language: str,
    tokens: int,
    group: GroupName | None,
    first: int = 0,
    lengths: Sequence[int] = (),
    **fields: Any,
) -> Corpus:
    """Tokens first, first + 1, ...; documents of these `lengths`, or one."""
    prefix = str(folder / name)
    with IndexedWriter(prefix, np.int32) as writer:
        writer.add_documents(np.arange(first, first + tokens), np.array(lengths or [tokens]))
    described = manifest(language=language, tokens=tokens, **fields)
    described = replace(described, tokenizer=replace(described.tokenizer, vocab_size=first + tokens))
    return Corpus(name, prefix, language, described, IndexedCorpus(prefix), group)


def make_mixture(
    corpora: Sequence[Corpus],
    seq_length: int,
    almr: Fraction | Sequence[tuple[int | None, Fraction]],
    weights: Sequence[int] = (),
    seed: int = 1,
    validation: Sequence[Corpus] = (),
) -> Mixture:
    """One stage of this ALMR, or stages of (samples, ALMR). Without weights, corpora count by their tokens."""
    entries: dict[GroupName, list[Entry]] = {"general": [], "additional": []}
    for i, corpus in enumerate(corpora):
        assert corpus.group is not None
        weight = Fraction(weights[i]) if weights else None
        entries[corpus.group].append(CorpusConfig(corpus.prefix, corpus.name, weight))
    stages = [(None, almr)] if isinstance(almr, Fraction) else almr
    return Mixture(
        path="m.yaml",
        seq_length=seq_length,
        seed=seed,
        corpora=tuple(corpora),
        stages=tuple(
            StageConfig(str(i), None if samples is None else samples * seq_length, almr=share, **entries)
            for i, (samples, share) in enumerate(stages, start=1)
        ),
        validation=tuple(validation),
    )
