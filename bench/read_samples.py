"""Samples a second from corpora that are in the page cache: python -m bench.read_samples {ours|megatron} PREFIX PREFIX"""

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
    from megatron_cpt.data.indexed import IndexedCorpus
    from megatron_cpt.data.loader import TrainingData
    from megatron_cpt.data.sampling.order import CorpusTokens, SampleOrder
    from megatron_cpt.data.sampling.splitters import Group, StagePlan, build_stages

    corpora = [IndexedCorpus(prefix) for prefix in prefixes]
    groups = [Group((i,), (Fraction(1),)) for i in range(2)]
    almr = Fraction(str(WEIGHTS[1]))
    stages = build_stages([StagePlan(None, (almr, almr), *groups)], 2)
    tokens = [CorpusTokens(str(i), corpus.num_tokens) for i, corpus in enumerate(corpora)]
    data = TrainingData(corpora, SampleOrder(stages, tokens, SEQ_LENGTH, 1234, 256), DataConfig())
    return lambda n: data.read(n, 1)


def megatron(prefixes: list[str]) -> Any:
    """The same from megatron-core's BlendedDataset of GPTDatasets."""
    from megatron_cpt.platforms import current_platform

    current_platform().prepare()
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


if __name__ == "__main__":
    read = {"ours": ours, "megatron": megatron}[sys.argv[1]](sys.argv[2:4])
    best = np.inf
    for _ in range(3):
        began = time.perf_counter()
        for n in range(0, SAMPLES, 4):
            read(n)
        best = min(best, time.perf_counter() - began)
    print(SAMPLES / 4 * SEQ_LENGTH / best)
