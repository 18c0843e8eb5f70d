"""Continual pre-training: setup -> main -> fit -> evaluate -> save."""

from __future__ import annotations

import dataclasses
import os
import time
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
from megatron_cpt.data.ledger import make_ledger, realised_almr
from megatron_cpt.data.loader import BatchShape, TrainingData, validation_samples
from megatron_cpt.model.build import build_model, transformer_config
from megatron_cpt.platforms import current_platform
from megatron_cpt.platforms.process_groups import Ranks, launched_world_size, process_groups
from megatron_cpt.training.checks import CheckedRun, check_run
from megatron_cpt.training.log import RunLog, ledger_table, step_note
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
        samples = config.training.train_iters * config.training.global_batch_size
        log = RunLog(config.checkpoint.save, active=True)
        log.say(ledger_table(make_ledger(run.mixture, samples)))
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
    run, config, ranks = context.run, context.config, context.ranks
    context.log.say(f"{'resuming' if run.resumes else 'starting'} from {run.start_from}; {layout(ranks)}")
    model, optimizer = build(context)
    progress = Progress()
    if run.resumes:
        progress = load_checkpoint(run.start_from, unwrap(model), optimizer)
    else:
        load_checkpoint(run.start_from, unwrap(model))
        optimizer.reload_model_params()
    left = config.training.train_iters - progress.iteration
    samples = progress.consumed_samples + left * config.training.global_batch_size  # the batch may change on resume
    context.log.start(describe(context), make_ledger(run.mixture, samples), progress.iteration)
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
    data = TrainingData(mixture, training.global_batch_size)
    shape = BatchShape(
        training.micro_batch_size, training.global_batch_size, context.ranks.data_rank, context.ranks.data_size
    )
    if progress.iteration == 0:
        evaluate(context, model, 0)
    task = log.progress.add_task("training", total=training.train_iters, completed=progress.iteration, note="")
    while progress.iteration < training.train_iters:
        start = time.perf_counter()
        lr = learning_rate(progress.iteration, training.train_iters, config.optimizer)
        result = train_step(
            model,
            optimizer,
            data.microbatches(progress.consumed_samples, shape),
            shape.num_microbatches,
            training.micro_batch_size,
            mixture.seq_length,
            lr,
            config.optimizer,
            context.ranks,
        )
        progress = Progress(progress.iteration + 1, progress.consumed_samples + training.global_batch_size)
        seconds = time.perf_counter() - start
        row = {
            **dataclasses.asdict(progress),
            "consumed_tokens": progress.consumed_samples * mixture.seq_length,
            **dataclasses.asdict(result),
            "lr": lr,
            "seconds": seconds,
            "tokens_per_second": training.global_batch_size * mixture.seq_length / seconds,
            "almr_realised": realised_almr(mixture, progress.consumed_samples),
        }
        log.metrics(row)
        log.progress.update(task, completed=progress.iteration, note=step_note(row))
        if progress.iteration % config.log_interval == 0:
            log.step(row, training.train_iters)
        finish_step(context, model, optimizer, progress)
    log.metrics({"iteration": progress.iteration, "peak_memory_bytes": peak_memory(context.ranks)})


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
            describe(context),
            optimizer if config.checkpoint.save_optim else None,
            progress,
        )
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
        on_samples=lambda samples: context.log.progress.advance(task, samples),
    )
    context.log.progress.remove_task(task)
    context.log.validation(iteration, results)


def describe(context: RunContext) -> dict[str, Any]:
    """What went into this run, for run.json and the manifest of its checkpoints."""
    run, ranks = context.run, context.ranks
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
        "data": run.mixture.fingerprint(),
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
