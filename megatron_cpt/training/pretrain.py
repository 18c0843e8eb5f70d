"""Continual pre-training: setup -> main -> fit -> evaluate -> save."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig

from megatron_cpt.checkpoint.layout import versions
from megatron_cpt.checkpoint.save_load import Progress, dtype_of, load_checkpoint, save_checkpoint, unwrap
from megatron_cpt.config.run import RunConfig
from megatron_cpt.data.loader import BatchShape, TrainingData, Waited, prefetch, run_microbatches, validation_samples
from megatron_cpt.data.mixture_inspection import ledger_table
from megatron_cpt.data.state import CorpusUse, almr_of
from megatron_cpt.model.build import build_model, transformer_config
from megatron_cpt.platforms import current_platform
from megatron_cpt.platforms.process_groups import Ranks, launched_world_size, process_groups
from megatron_cpt.training.checks import CheckedRun, check_run
from megatron_cpt.training.log import RunLog, step_note
from megatron_cpt.training.schedule import learning_rate
from megatron_cpt.training.step import train_step
from megatron_cpt.training.validation import validate


@dataclass(frozen=True)
class RunContext:
    """What every part of the run needs: passed by argument, never global."""

    run: CheckedRun
    ranks: Ranks
    log: RunLog

    @property
    def config(self) -> RunConfig:
        return self.run.config


def setup(config: RunConfig) -> str | None:
    """Check everything, then start the process groups and run; returns the folder of the run (on the first rank)."""
    if config.check_only:
        run = check_run(config, config.world_size or launched_world_size())
        RunLog(config.checkpoint.save, active=True).say(ledger_table(run.data.ledger(run.mixture)))
        return None
    run = check_run(config, launched_world_size())
    first = os.environ.get("RANK", "0") == "0"
    if run.complete:
        RunLog(config.checkpoint.save, active=first).say(
            f"{run.start_from} is the last checkpoint of this run: nothing to do"
        )
        return config.checkpoint.save if first else None
    torch.set_float32_matmul_precision(config.training.float32_matmul_precision)
    torch.manual_seed(config.training.seed)
    with (
        process_groups(config.parallel, config.training.seed) as ranks,
        RunLog(config.checkpoint.save, active=first) as log,
    ):
        main(RunContext(run, ranks, log))
    return config.checkpoint.save if first else None


def main(context: RunContext) -> None:
    """Build, load, and run to the last iteration."""
    run, ranks = context.run, context.ranks
    context.log.say(f"{'resuming' if run.resumes else 'starting'} from {run.start_from}; {layout(ranks)}")
    model, optimizer = build(context)
    progress = Progress()
    if run.resumes:
        progress = load_checkpoint(run.start_from, unwrap(model), optimizer)
    else:
        load_checkpoint(run.start_from, unwrap(model))
        optimizer.reload_model_params()
    context.log.start(
        describe(context, progress), run_ledger(context, progress), run.data.ledger(run.mixture), progress.iteration
    )
    fit(context, model, optimizer, progress)


def build(context: RunContext) -> tuple[DistributedDataParallel, MegatronOptimizer]:
    """The model of this rank in megatron-core's DDP, and its distributed optimizer."""
    run, config = context.run, context.config
    params_dtype = dtype_of(config.training.params_dtype)
    megatron_config = transformer_config(run.llama, config.parallel, params_dtype)
    model = DistributedDataParallel(
        megatron_config,
        DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True),
        build_model(run.llama, megatron_config, run.mixture.seq_length, current_platform(), context.ranks),
    )
    settings = config.optimizer
    optimizer = get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            adam_beta1=settings.adam_beta1,
            adam_beta2=settings.adam_beta2,
            adam_eps=settings.adam_eps,
            clip_grad=settings.clip_grad,
            bf16=params_dtype == torch.bfloat16,
            params_dtype=params_dtype,
            use_distributed_optimizer=True,
        ),
        [model],
    )
    megatron_config.finalize_model_grads_func = finalize_model_grads
    megatron_config.grad_scale_func = optimizer.scale_loss
    return model, optimizer


def fit(context: RunContext, model: DistributedDataParallel, optimizer: MegatronOptimizer, progress: Progress) -> None:
    """Train to the last iteration, evaluating and saving on the way and at the end."""
    config, log = context.config, context.log
    training, mixture = config.training, context.run.mixture
    data, ranks = context.run.data, context.ranks
    shape = BatchShape(training.micro_batch_size, training.global_batch_size, ranks.data_rank, ranks.data_size)
    reader = TrainingData(
        [corpus.data for corpus in mixture.corpora],
        data.state.order(mixture, data.schedule),
        config.data,
        ranks.reads_tokens,
    )
    if progress.iteration == 0:
        evaluate(context, model, 0)
    steps = training.train_iters - progress.iteration
    reads = run_microbatches(reader, progress.consumed_samples, shape, steps, current_platform().page_locked)
    with closing(prefetch(reads, config.data.num_workers, config.data.prefetch)) as read:
        batches = Waited(read)
        task = log.progress.add_task("training", total=training.train_iters, completed=progress.iteration, note="")
        while progress.iteration < training.train_iters:
            start, waited = time.perf_counter(), batches.seconds
            lr = learning_rate(progress.iteration, training.train_iters, config.optimizer)
            result = train_step(
                model,
                optimizer,
                batches,
                shape.num_microbatches,
                training.micro_batch_size,
                mixture.seq_length,
                lr,
                config.optimizer,
                ranks,
                packed=config.data.reset_attention_mask,
            )
            progress = Progress(progress.iteration + 1, progress.consumed_samples + training.global_batch_size)
            row = {
                **dataclasses.asdict(progress),
                **dataclasses.asdict(result),
                "lr": lr,
                "seconds": time.perf_counter() - start,
                "data_seconds": batches.seconds - waited,
                **data_metrics(context, progress),
            }
            row["tokens_per_second"] = training.global_batch_size * mixture.seq_length / row["seconds"]
            log.metrics(row)
            log.progress.update(task, completed=progress.iteration, note=step_note(row))
            if progress.iteration % config.log_interval == 0:
                log.step(row, training.train_iters)
            finish_step(context, model, optimizer, progress)
    log.metrics({"iteration": progress.iteration, "peak_memory_bytes": peak_memory(ranks)})


def data_metrics(context: RunContext, progress: Progress) -> dict[str, Any]:
    """What was read so far: tokens, by corpus too, and the realised ALMR."""
    data, mixture = context.run.data, context.run.mixture
    consumed = data.state.consumed(mixture, data.schedule, progress.consumed_samples)
    return {
        "consumed_tokens": progress.consumed_samples * mixture.seq_length,
        "corpus_tokens": tokens_by_name(consumed, mixture.seq_length),
        "almr_realised": almr_of(consumed),
    }


def finish_step(
    context: RunContext, model: DistributedDataParallel, optimizer: MegatronOptimizer, progress: Progress
) -> None:
    """Evaluate and save where the configuration asks for it, and always after the last step."""
    config, iteration = context.config, progress.iteration
    last = iteration == config.training.train_iters
    if last or due(iteration, config.validation.eval_interval):
        evaluate(context, model, iteration)
    if last or due(iteration, config.checkpoint.save_interval):
        start = time.perf_counter()
        folder = save_checkpoint(
            config.checkpoint.save,
            unwrap(model),
            context.run.hf_folder,
            describe(context, progress),
            optimizer if config.checkpoint.save_optim else None,
            progress,
        )
        context.log.ledger(run_ledger(context, progress))
        context.log.say(f"saved {folder} in {time.perf_counter() - start:.1f} s")


def due(iteration: int, interval: int) -> bool:
    """Whether something done every `interval` steps (0: never) is to be done now."""
    return interval > 0 and iteration % interval == 0


def evaluate(context: RunContext, model: DistributedDataParallel, iteration: int) -> None:
    """Validate on every set of the mixture, if it has any."""
    mixture, config = context.run.mixture, context.config
    if not mixture.validation:
        return
    token_bytes = torch.from_numpy(context.run.token_bytes).to(context.ranks.device)
    samples = sum(validation_samples(c, mixture.seq_length, config.validation.eval_samples) for c in mixture.validation)
    task = context.log.progress.add_task("validation", total=samples, note="")
    results = validate(
        model,
        mixture.validation,
        token_bytes,
        mixture.seq_length,
        config.training.micro_batch_size,
        config.validation.eval_samples,
        context.ranks,
        config.data,
        on_samples=lambda samples: context.log.progress.advance(task, samples),
    )
    context.log.progress.remove_task(task)
    context.log.validation(iteration, results)


def tokens_by_name(consumed: Sequence[CorpusUse], seq_length: int) -> dict[str, int]:
    """Tokens read of each corpus."""
    tokens: dict[str, int] = {}
    for use in consumed:
        tokens[use.name] = tokens.get(use.name, 0) + use.samples * seq_length
    return tokens


def run_ledger(context: RunContext, progress: Progress) -> dict[str, Any]:
    """What ledger.json says: what the run will read and what it has read."""
    data, mixture = context.run.data, context.run.mixture
    consumed = data.state.consumed(mixture, data.schedule, progress.consumed_samples)
    return {
        "planned": dataclasses.asdict(data.ledger(mixture)),
        "consumed": {
            "samples": progress.consumed_samples,
            "tokens": progress.consumed_samples * mixture.seq_length,
            "almr_realised": almr_of(consumed),
            "corpora": [dataclasses.asdict(use) for use in consumed],
        },
        "segments": [dataclasses.asdict(segment) for segment in data.state.segments],
    }


def describe(context: RunContext, progress: Progress) -> dict[str, Any]:
    """What went into this run, for run.json and the manifest of its checkpoints."""
    run, ranks = context.run, context.ranks
    consumed = run.data.state.consumed(run.mixture, run.data.schedule, progress.consumed_samples)
    return {
        "kind": "pretrain",
        "start_from": os.path.abspath(run.start_from),
        "config": run.config.to_dict(),
        "model": dataclasses.asdict(run.llama),
        "layout": {
            "tensor_model_parallel_size": ranks.tensor_size,
            "pipeline_model_parallel_size": ranks.pipeline_size,
            "data_parallel_size": ranks.data_size,
            "sequence_parallel": run.config.parallel.sequence_parallel,
            "world_size": ranks.world_size,
            "device": ranks.device.type,
        },
        "data": run.data.state.to_json(consumed),
        "tokenizer": dataclasses.asdict(run.mixture.manifest.tokenizer),
        "versions": versions(),
    }


def layout(ranks: Ranks) -> str:
    """The layout in Megatron's shorthand."""
    return f"TP{ranks.tensor_size} x PP{ranks.pipeline_size} x DP{ranks.data_size} on {ranks.device.type}"


def peak_memory(ranks: Ranks) -> int:
    """Peak memory of all processes together, in bytes (each counts the libraries it shares with the others)."""
    total = torch.tensor([current_platform().peak_memory_bytes()], dtype=torch.int64, device=ranks.device)
    torch.distributed.all_reduce(total)
    return int(total.item())
