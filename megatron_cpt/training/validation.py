"""Validation by language: loss per token, and bits per byte, which compares across tokenizers and languages."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel

from megatron_cpt.config.run import DataConfig
from megatron_cpt.data.loader import BatchShape, validation_microbatches, validation_samples
from megatron_cpt.data.mixture import Corpus
from megatron_cpt.platforms.process_groups import Ranks
from megatron_cpt.training.step import run_schedule

ROUNDS_PER_CALL = 8  # micro-batches sent through the pipeline between two updates of the progress bar


@dataclass(frozen=True)
class ValidationResult:
    """One validation set at one moment.

    Attributes:
        loss: nats per token, over all targets that count
        bits_per_byte: bits per UTF-8 byte of text, over the targets that count and stand for text (not for
            end-of-document)
        tokens: number of targets that count
        text_bytes: UTF-8 bytes they stand for
    """

    name: str
    language: str
    loss: float
    bits_per_byte: float
    tokens: int
    text_bytes: int


@torch.no_grad()
def validate(
    model: DistributedDataParallel,
    corpora: tuple[Corpus, ...],
    token_bytes: torch.Tensor,
    seq_length: int,
    micro_batch_size: int,
    eval_samples: int | None,
    ranks: Ranks,
    data: DataConfig,
    on_samples: Callable[[int], None] = lambda samples: None,
) -> list[ValidationResult]:
    """Evaluate each set on the whole (or its first `eval_samples` samples); the same numbers for every layout.

    Args:
        token_bytes: int64 [vocab_size], UTF-8 bytes each token id stands for, 0 for special tokens
        on_samples: told how many samples were evaluated since the last call
    """

    def sums(losses: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        losses = losses.double() * mask.double()
        text_bytes = token_bytes[targets] * mask.long()
        report = [
            losses.sum(),
            losses[text_bytes > 0].sum(),
            mask.double().sum(),
            text_bytes.sum().double(),
        ]
        return losses.sum(), torch.stack(report)

    model.eval()
    results = []
    for corpus in corpora:
        samples = validation_samples(corpus, seq_length, eval_samples)
        per_round = micro_batch_size * ranks.data_size
        rounds = math.ceil(samples / per_round)
        shape = BatchShape(micro_batch_size, rounds * per_round, ranks.data_rank, ranks.data_size)
        batches = validation_microbatches(corpus, seq_length, samples, shape, data, ranks.reads_tokens)
        report = torch.zeros(4, dtype=torch.float64, device=ranks.device)
        for start in range(0, rounds, ROUNDS_PER_CALL):
            count = min(ROUNDS_PER_CALL, rounds - start)
            part = run_schedule(
                model,
                batches,
                count,
                micro_batch_size,
                seq_length,
                ranks,
                sums,
                forward_only=True,
                packed=data.reset_attention_mask,
            )
            report = report if part is None else report + part
            on_samples(min(count * per_round, samples - start * per_round))
        loss, text_loss, tokens, text_bytes = ranks.sum_from_last_stage(report).tolist()
        mean = loss / tokens if tokens else float("nan")  # with eod_mask_loss, of documents of one token none counts
        bits_per_byte = text_loss / math.log(2) / text_bytes if text_bytes else float("nan")
        results.append(ValidationResult(corpus.name, corpus.language, mean, bits_per_byte, int(tokens), int(text_bytes)))
    model.train()
    return results
