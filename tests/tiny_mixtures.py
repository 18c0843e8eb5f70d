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
from megatron_cpt.mixture.mixture import Corpus, GroupName, Mixture
from megatron_cpt.mixture.order.splitters import Group
from megatron_cpt.mixture.stages import AlmrPart, MixtureStage


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
    groups: dict[str, Group | None] = {}
    for name in ("general", "additional"):
        members = [i for i, corpus in enumerate(corpora) if corpus.group == name]
        shares = [Fraction(weights[i] if weights else corpora[i].data.num_tokens) for i in members]
        groups[name] = Group(tuple(members), tuple(shares)) if members else None
    stages = [(None, almr)] if isinstance(almr, Fraction) else almr
    return Mixture(
        path="m.yaml",
        seq_length=seq_length,
        seed=seed,
        corpora=tuple(corpora),
        stages=tuple(
            MixtureStage(
                name=str(i),
                tokens=None if samples is None else samples * seq_length,
                fraction=None,
                almr=(AlmrPart(0, share, share),),
                general=groups["general"],
                additional=groups["additional"],
            )
            for i, (samples, share) in enumerate(stages, start=1)
        ),
        validation=tuple(validation),
    )
