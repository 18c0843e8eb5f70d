"""What a run writes down of itself: metrics of a step, the data ledger, and the manifest of its checkpoints."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import torch

from megatron_cpt.checkpoint.layout import versions
from megatron_cpt.checkpoint.save_load import Progress
from megatron_cpt.mixture.state import CorpusUse, realised_almr
from megatron_cpt.model.flops import flops_per_token
from megatron_cpt.platforms import current_platform
from megatron_cpt.platforms.process_groups import RankInfo
from megatron_cpt.training.baseline import baselines_json
from megatron_cpt.training.state import RunContext, TrainState
from megatron_cpt.training.step import StepResult
from megatron_cpt.training.throughput import step_throughput
from megatron_cpt.training.validate_config import CheckedRun


def metrics_of_step(
    context: RunContext, state: TrainState, result: StepResult, lr: float, seconds: float, data_seconds: float
) -> dict[str, Any]:
    """The row of metrics.jsonl of the step that has just been taken."""
    run, mixture = context.run, context.run.mixture
    consumed = run.data.state.consumed(mixture, run.data.schedule, state.progress.consumed_samples)
    tokens = context.config.training.global_batch_size * mixture.seq_length
    flops = flops_per_token(run.llama, mixture.seq_length, False), flops_per_token(run.llama, mixture.seq_length, True)
    peak = context.config.logging.peak_tflops or current_platform().peak_tflops()
    return {
        **dataclasses.asdict(state.progress),
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "skipped": result.skip_reason,
        "lr": lr,
        "seconds": seconds,
        "data_seconds": data_seconds,
        **step_throughput(seconds, tokens, context.ranks.world_size, flops, peak),
        "consumed_tokens": state.progress.consumed_samples * mixture.seq_length,
        "corpus_tokens": tokens_by_name(consumed, mixture.seq_length),
        "almr_realised": realised_almr(consumed),
    }


def tokens_by_name(consumed: Sequence[CorpusUse], seq_length: int) -> dict[str, int]:
    """Tokens read of each corpus."""
    tokens: dict[str, int] = {}
    for use in consumed:
        tokens[use.name] = tokens.get(use.name, 0) + use.samples * seq_length
    return tokens


def run_ledger(run: CheckedRun, progress: Progress) -> dict[str, Any]:
    """What ledger.json says: what the run will read and what it has read."""
    data, mixture = run.data, run.mixture
    consumed = data.state.consumed(mixture, data.schedule, progress.consumed_samples)
    return {
        "planned": dataclasses.asdict(data.ledger(mixture)),
        "consumed": {
            "samples": progress.consumed_samples,
            "tokens": progress.consumed_samples * mixture.seq_length,
            "almr_realised": realised_almr(consumed),
            "corpora": [dataclasses.asdict(use) for use in consumed],
        },
        "segments": [phase.to_json() for phase in data.state.phases],
    }


def run_manifest(context: RunContext, state: TrainState) -> dict[str, Any]:
    """What went into a checkpoint, and what a resume needs beside weights and optimizer."""
    run = context.run
    return run_description(context) | {
        "languages": {corpus.name: corpus.language for corpus in run.mixture.corpora},
        "data": run.data.state.to_json(run.mixture, run.data.schedule, state.progress.consumed_samples),
        "training": {
            "lr_schedule": dataclasses.asdict(run.schedule),
            "history": state.history.to_json(),
            "baseline": baselines_json(state.baselines),
            "evaluated": state.evaluated,
        },
    }


def run_description(context: RunContext) -> dict[str, Any]:
    """What went into this run, for run.json."""
    run, ranks = context.run, context.ranks
    return {
        "kind": "pretrain",
        "start_from": os.path.abspath(run.start_from),
        "began_with": os.path.realpath(run.config.checkpoint.load),
        "config": run.config.to_dict(),
        "model": dataclasses.asdict(run.llama),
        "layout": {
            "tensor_model_parallel_size": ranks.tensor_size,
            "pipeline_model_parallel_size": ranks.pipeline_size,
            "virtual_pipeline_model_parallel_size": run.config.parallel.virtual_pipeline_model_parallel_size,
            "context_parallel_size": ranks.context_size,
            "data_parallel_size": ranks.data_size,
            "sequence_parallel": run.config.parallel.sequence_parallel,
            "world_size": ranks.world_size,
            "device": ranks.device.type,
        },
        "tokenizer": dataclasses.asdict(run.mixture.manifest.tokenizer),
        "versions": versions(),
    }


def layout(ranks: RankInfo) -> str:
    """The layout in Megatron's shorthand."""
    context = f" x CP{ranks.context_size}" if ranks.context_size > 1 else ""
    return f"TP{ranks.tensor_size} x PP{ranks.pipeline_size}{context} x DP{ranks.data_size} on {ranks.device.type}"


def peak_memory(ranks: RankInfo) -> int:
    """Peak memory of all processes together, in bytes (each counts the libraries it shares with the others)."""
    total = torch.tensor([current_platform().peak_memory_bytes()], dtype=torch.int64, device=ranks.device)
    torch.distributed.all_reduce(total)
    return int(total.item())
