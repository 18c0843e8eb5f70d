"""The plan of one run, as its configuration for pretrain_cpt.py says it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from megatron_cpt.config.fields import config_from
from megatron_cpt.config.run import RunConfig, TrainingConfig
from megatron_cpt.mixture.file import read_seq_length
from megatron_cpt.planning.config import PlanConfig
from megatron_cpt.planning.layouts import Layout, check_job
from megatron_cpt.planning.search import LayoutPlan, fits, make_candidate, make_cluster, make_job, too_big_because
from megatron_cpt.utils.errors import InputError
from megatron_cpt.utils.input_files import load_yaml


@dataclass(frozen=True)
class PlannedRun:
    """A plan's settings with those of the run in their place, and the run's layout."""

    config: PlanConfig
    layout: Layout


def read_planned_run(config: PlanConfig) -> PlannedRun:
    """Read the configuration that `config.run` names, and its mixture; neither corpora nor checkpoints are opened.

    Raises:
        InputError: it cannot be spread over the devices, or has what the estimates do not know
    """
    path = str(config.run)
    return spread_run(config, parse_run(path))


def spread_run(config: PlanConfig, run: RunConfig) -> PlannedRun:
    """A run on the devices of a plan, whose `run` names it in messages.

    Raises:
        InputError: as read_run
    """
    path, parallel, training = str(config.run), run.parallel, run.training
    uneven = parallel.pipeline_model_parallel_layout
    if uneven is not None:
        name = "parallel.pipeline_model_parallel_layout"
        raise InputError(f"{path}: {name} is {uneven}, which the estimates do not know; plan it with None")
    tensor, pipeline, context = (
        getattr(parallel, f"{name}_parallel_size") for name in ("tensor_model", "pipeline_model", "context")
    )
    ranks = tensor * pipeline * context
    if config.devices % ranks:
        sizes = (
            f"tensor x pipeline size {tensor} x {pipeline}"
            if context == 1
            else (f"tensor x pipeline x context size {tensor} x {pipeline} x {context}")
        )
        raise InputError(f"{path}: {config.devices} devices are not divisible by {sizes} = {ranks}")
    seq_length, data = read_seq_length(run.mixture), config.devices // ranks
    planned = dataclasses.replace(
        config,
        seq_length=seq_length,
        global_batch_size=training.global_batch_size,
        tokens=run_tokens(training, seq_length),
        params_dtype=training.params_dtype,
        fp8=training.fp8 is not None,
        transformer_impl=training.transformer_impl,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        context_parallel_size=context,
        micro_batch_size=training.micro_batch_size,
        sequence_parallel=parallel.sequence_parallel,
        recompute_granularity=parallel.recompute_granularity or "none",
        recompute_modules=parallel.recompute_modules,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        grad_reduce_in_bf16=parallel.grad_reduce_in_bf16,
        tp_comm_overlap=parallel.tp_comm_overlap,
    )
    micro_batch = training.micro_batch_size
    layout = Layout(parallel, data, micro_batch, training.global_batch_size // (data * micro_batch))
    try:
        check_job(make_job(planned), layout)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return PlannedRun(planned, layout)


def parse_run(path: str) -> RunConfig:
    """The file as pretrain_cpt.py reads it.

    Raises:
        InputError: it would refuse it
    """
    return config_from(RunConfig, load_yaml(path, "configuration"), path)


def run_tokens(training: TrainingConfig, seq_length: int) -> float:
    """The run's length in tokens, whichever way it is given."""
    training = training.extended()
    if training.train_tokens is not None:
        return training.train_tokens
    samples = training.train_samples or (training.train_iters or 0) * training.global_batch_size
    return samples * seq_length


def plan_one(run: PlannedRun) -> LayoutPlan:
    """The run's own layout as a plan.

    Raises:
        InputError: it does not fit into the devices' memory, with what it needs
    """
    config = run.config
    job, cluster = make_job(config), make_cluster(config)
    candidate = make_candidate(config, job, cluster, run.layout)
    if not fits(candidate, cluster):
        reason = too_big_because([candidate], cluster)
        raise InputError(f"{config.run} does not fit into {config.devices} x {cluster.device.name}: {reason}")
    return LayoutPlan(config, job, cluster, [candidate], [])
