"""Samples from corpora that are in the page cache: python -m bench.read_samples {ours|megatron} PREFIX PREFIX

Prints tokens a second. With `documents-ours` or `documents-megatron`: samples a second of which the documents are told.
"""

from __future__ import annotations

import sys
import time
from types import SimpleNamespace
from typing import Any

import numpy as np

SEQ_LENGTH, SAMPLES, WEIGHTS = 2048, 16_000, [0.67, 0.33]


def ours(prefixes: list[str]) -> Any:
    """A function that reads sample n."""
    from fractions import Fraction

    from megatron_cpt.config.run import DataConfig
    from megatron_cpt.corpus.indexed_dataset import IndexedCorpus
    from megatron_cpt.mixture.loader import TrainingData
    from megatron_cpt.mixture.order.order import CorpusTokens, SampleOrder
    from megatron_cpt.mixture.order.splitters import Group, StagePlan, build_stages

    corpora = [IndexedCorpus(prefix) for prefix in prefixes]
    groups = [Group((i,), (Fraction(1),)) for i in range(2)]
    almr = Fraction(str(WEIGHTS[1]))
    stages = build_stages([StagePlan(None, (almr, almr), *groups)], 2)
    tokens = [CorpusTokens(str(i), corpus.num_tokens) for i, corpus in enumerate(corpora)]
    data = TrainingData(corpora, SampleOrder(stages, tokens, SEQ_LENGTH, 1234, 256), DataConfig())
    return lambda n: data.read(n, 1)


def megatron(prefixes: list[str]) -> Any:
    """The same from megatron-core's BlendedDataset of GPTDatasets."""
    from megatron_cpt.platforms import prepare_platform

    prepare_platform()
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    config = GPTDatasetConfig(
        random_seed=1234,
        sequence_length=SEQ_LENGTH,
        tokenizer=SimpleNamespace(eod=0, pad=-1, vocab_size=10**6, unique_identifiers={}),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        blend_per_split=[(prefixes, WEIGHTS), None, None],
    )
    dataset, _, _ = BlendedMegatronDatasetBuilder(GPTDataset, [SAMPLES, 0, 0], lambda: True, config).build()
    return dataset.__getitem__


def documents_ours(prefixes: list[str]) -> Any:
    """A function that tells the documents of samples `first` to `first` + `count` - 1, as tools/export_order.py does."""
    from fractions import Fraction

    from megatron_cpt.corpus.indexed_dataset import IndexedCorpus
    from megatron_cpt.corpus.manifest import read_corpus_manifest
    from megatron_cpt.mixture.document_reads import CorpusDocuments, Stretch, locate_on_cpu, read_samples
    from megatron_cpt.mixture.mixture import Corpus
    from megatron_cpt.mixture.order.order import CorpusTokens, SampleOrder
    from megatron_cpt.mixture.order.splitters import Group, StagePlan, build_stages

    corpora = [Corpus(p, p, "en", read_corpus_manifest(p), IndexedCorpus(p)) for p in prefixes]
    groups = [Group((i,), (Fraction(1),)) for i in range(2)]
    almr = Fraction(str(WEIGHTS[1]))
    stages = build_stages([StagePlan(None, (almr, almr), *groups)], 2)
    tokens = [CorpusTokens(corpus.name, corpus.data.num_tokens) for corpus in corpora]
    order = SampleOrder(stages, tokens, SEQ_LENGTH, 1234, 256)
    documents = [CorpusDocuments(corpus, 0) for corpus in corpora]
    stretch = Stretch(1, 0, 1 << 40, 256, order)
    return lambda first, count: read_samples(stretch, documents, first, count, locate_on_cpu)


def documents_megatron(prefixes: list[str]) -> Any:
    """The same from megatron-core's datasets, which tell the documents of one sample."""
    blended = megatron(prefixes).__self__

    def tell(first: int, count: int) -> None:
        for n in range(first, first + count):
            dataset = blended.datasets[blended.dataset_index[n]]
            dataset._query_document_sample_shuffle_indices(int(blended.dataset_sample_index[n]))

    return tell


def documents_per_second(tell: Any) -> float:
    """Samples a second, the best of three rounds."""
    best = np.inf
    for _ in range(3):
        began = time.perf_counter()
        tell(0, SAMPLES)
        best = min(best, time.perf_counter() - began)
    return float(SAMPLES / best)


if __name__ == "__main__":
    if sys.argv[1].startswith("documents"):
        makers = {"documents-ours": documents_ours, "documents-megatron": documents_megatron}
        print(documents_per_second(makers[sys.argv[1]](sys.argv[2:4])))
        sys.exit()
    read = {"ours": ours, "megatron": megatron}[sys.argv[1]](sys.argv[2:4])
    best = np.inf
    for _ in range(3):
        began = time.perf_counter()
        for n in range(0, SAMPLES, 4):
            read(n)
        best = min(best, time.perf_counter() - began)
    print(SAMPLES / 4 * SEQ_LENGTH / best)
