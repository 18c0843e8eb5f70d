"""Validation by language: loss per token, and bits per byte, which compares across tokenizers and languages."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import megatron_cpt.platforms.imported_megatron  # noqa: F401  isort: skip  (before megatron is imported)
import torch
from megatron.core.distributed import DistributedDataParallel

from megatron_cpt.config.run import DataConfig
from megatron_cpt.mixture.loader import BatchShape, validation_microbatches, validation_samples
from megatron_cpt.mixture.mixture import Corpus
from megatron_cpt.platforms.process_groups import RankInfo
from megatron_cpt.training.step import StepShape, never, run_schedule
from megatron_cpt.training.stopping import StopRequestedError
from megatron_cpt.training.validation_result import ValidationResult

ROUNDS_PER_CALL = 8  # micro-batches sent through the pipeline between two updates of the progress bar


@torch.no_grad()
def validate(
    chunks: Sequence[DistributedDataParallel],
    corpora: tuple[Corpus, ...],
    token_bytes: torch.Tensor,
    shape: StepShape,
    eval_samples: int | None,
    ranks: RankInfo,
    data: DataConfig,
    on_samples: Callable[[int], None] = lambda samples: None,
    stopping: Callable[[], bool] = never,
) -> list[ValidationResult]:
    """Evaluate each set on the whole (or its first `eval_samples` samples); the same numbers for every layout.

    Args:
        token_bytes: int64 [vocab_size], UTF-8 bytes each token id stands for, 0 for special tokens
        shape: of a training step; num_microbatches does not matter
        on_samples: told how many samples were evaluated since the last call

    Raises:
        StopRequestedError: `stopping` said so on the way
    """
    sums = partial(sums_to_report, token_bytes)
    for chunk in chunks:
        chunk.eval()
    results = []
    for corpus in corpora:
        samples = validation_samples(corpus, shape.seq_length, eval_samples)
        per_round = shape.micro_batch_size * ranks.data_size
        # The interleaved schedule takes a multiple of the pipeline's stages; what is too much is masked.
        rounds = round_up(math.ceil(samples / per_round), ranks.pipeline_size if len(chunks) > 1 else 1)
        per_call = round_up(ROUNDS_PER_CALL, ranks.pipeline_size)
        batch = BatchShape(shape.micro_batch_size, rounds * per_round, ranks.data_rank, ranks.data_size)
        batches = validation_microbatches(corpus, shape.seq_length, samples, batch, data, ranks.reads_tokens)
        report, skipped = torch.zeros(4, dtype=torch.float64, device=ranks.device), False
        for start in range(0, rounds, per_call):
            call = replace(shape, num_microbatches=min(per_call, rounds - start))
            part, left_out = run_schedule(chunks, batches, call, ranks, sums, forward_only=True, stopping=stopping)
            report, skipped = report if part is None else report + part, skipped or left_out
            on_samples(max(min(call.num_microbatches * per_round, samples - start * per_round), 0))
        totals, (any_skipped,) = ranks.reduce_from_last_pipeline_stage(report, skipped)
        if any_skipped:
            raise StopRequestedError
        results.append(result_of(corpus, *totals))
    for chunk in chunks:
        chunk.train()
    return results


def sums_to_report(
    token_bytes: torch.Tensor, losses: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of all targets that count, loss of those that stand for text, number of the former, bytes of the latter."""
    losses = losses.double() * mask.double()
    text_bytes = token_bytes[targets] * mask.long()
    report = [losses.sum(), losses[text_bytes > 0].sum(), mask.double().sum(), text_bytes.sum().double()]
    return losses.sum(), torch.stack(report)


def result_of(corpus: Corpus, loss: float, text_loss: float, tokens: float, text_bytes: float) -> ValidationResult:
    """From the sums over all ranks."""
    mean = loss / tokens if tokens else math.nan  # with eod_mask_loss, of documents of one token none counts
    bits_per_byte = text_loss / math.log(2) / text_bytes if text_bytes else math.nan
    return ValidationResult(corpus.name, corpus.language, mean, bits_per_byte, int(tokens), int(text_bytes))


def round_up(number: int, multiple: int) -> int:
    """The next multiple."""
    return -(-number // multiple) * multiple
