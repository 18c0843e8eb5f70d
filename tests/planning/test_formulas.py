"""The planner's formulas against the real code: of the real jobs under fake tensors, and of a small job in memory."""

from __future__ import annotations

import dataclasses

import megatron_cpt.platforms.imported_megatron  # noqa: F401  isort: skip  (before megatron)
import numpy as np
import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

from megatron_cpt.config.parallel import ParallelConfig
from megatron_cpt.config.run import OptimizerConfig as Settings
from megatron_cpt.mixture.loader import Batch
from megatron_cpt.model.build import build_model, make_transformer_config
from megatron_cpt.model.flops import flops_per_token
from megatron_cpt.planning.activations import chunk_bytes
from megatron_cpt.planning.layouts import Layout, TrainingJob, chunks_of_stage
from megatron_cpt.planning.presets import MODELS
from megatron_cpt.planning.run import planned_flops
from megatron_cpt.planning.simulate import optimizer_bytes, simulate
from megatron_cpt.planning.weights import state_bytes
from megatron_cpt.platforms import current_platform
from megatron_cpt.platforms.process_groups import process_groups
from megatron_cpt.training.step import StepShape, train_step
from megatron_cpt.utils.errors import InputError

TINY = dataclasses.replace(
    MODELS["8B"],
    num_hidden_layers=4,
    hidden_size=72,  # no multiple of 64: parameters are padded to one
    intermediate_size=200,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=18,
    vocab_size=404,
)
TIED = dataclasses.replace(TINY, tie_word_embeddings=True)
SP4 = {"tensor_model_parallel_size": 4, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}


def make_layout(devices: int, micro_batch_size: int = 1, **parallel: object) -> Layout:
    config = ParallelConfig(**parallel)
    data = devices // (config.tensor_model_parallel_size * config.pipeline_model_parallel_size)
    return Layout(config, data, micro_batch_size, 4)


def check_against_simulation(job: TrainingJob, layout: Layout, rank: int) -> None:
    """Everything to the byte."""
    found = simulate(job, layout, rank)
    stage = found.pipeline_rank
    state = state_bytes(job, layout, stage, found.data_rank)
    assert (found.parameters, found.weights, found.gradients, found.optimizer) == (
        state.parameters,
        state.weights,
        state.gradients,
        state.optimizer,
    )
    assert found.optimizer <= state_bytes(job, layout, stage).optimizer
    chunks = chunks_of_stage(job.llama, layout, stage)
    assert found.activations == sum(sum(chunk_bytes(job, layout, chunk).values()) for chunk in chunks)
    if layout.parallel.recompute_granularity is None:
        assert found.flops == planned_flops(job, layout, stage)
    else:
        assert found.flops > planned_flops(job, layout, stage)
    check_traffic(job, layout, stage, found.microbatch_traffic)
    if layout.data_parallel_size > 1:
        assert found.step_traffic["reduce-scatter", layout.data_parallel_size].bytes >= found.gradients
        assert found.step_traffic["all-gather", layout.data_parallel_size].bytes == found.weights


def check_traffic(job: TrainingJob, layout: Layout, stage: int, traffic: dict) -> None:
    """The hidden states that the planner counts: of a layer, two gathered and two scattered in each pass."""
    if not layout.parallel.sequence_parallel or layout.parallel.recompute_granularity is not None:
        return
    chunks = chunks_of_stage(job.llama, layout, stage)
    hidden = layout.micro_batch_size * job.seq_length * job.llama.hidden_size * job.element_bytes
    assert traffic["reduce-scatter", layout.tensor].bytes == hidden * sum(
        4 * chunk.layers + chunk.has_embedding + chunk.has_output for chunk in chunks
    )
    # A third of what backward gathers is for weight gradients, which the planner takes to be hidden.
    assert traffic["all-gather", layout.tensor].bytes == hidden * sum(
        6 * chunk.layers + chunk.has_embedding + 2 * chunk.has_output for chunk in chunks
    )


@pytest.mark.parametrize(
    ("model", "rank", "layout"),
    [
        ("8B", 0, make_layout(32, 4, tensor_model_parallel_size=2)),
        ("8B", 31, make_layout(32, 4, tensor_model_parallel_size=2, sequence_parallel=True)),
        ("70B", 0, make_layout(128, 4, tensor_model_parallel_size=8, sequence_parallel=True, **PP2)),
        ("70B", 127, make_layout(128, 4, tensor_model_parallel_size=8, sequence_parallel=True, **PP2)),
    ],
)
def test_ranks_of_the_real_jobs(model: str, rank: int, layout: Layout) -> None:
    check_against_simulation(TrainingJob(MODELS[model], 2048, 256), layout, rank)


@pytest.mark.parametrize(
    ("rank", "layout"),
    [
        (3, make_layout(6)),
        (11, make_layout(12, 2, **SP4, overlap_grad_reduce=True)),
        (0, make_layout(24, 1, **SP4, **PP2, overlap_grad_reduce=True, overlap_param_gather=True)),
        (23, make_layout(24, 3, **SP4, **PP2)),
        (5, make_layout(8, 1, tensor_model_parallel_size=2, pipeline_model_parallel_size=4)),  # a stage in the middle
        (0, make_layout(4, 1, tensor_model_parallel_size=2, num_layers_in_first_pipeline_stage=1, **PP2)),
        (0, make_layout(16, 1, **SP4, **PP2, virtual_pipeline_model_parallel_size=2, overlap_grad_reduce=True)),
        (15, make_layout(16, 2, **SP4, **PP2, virtual_pipeline_model_parallel_size=2)),
        (3, make_layout(12, 2, **SP4, grad_reduce_in_bf16=True)),
        (1, make_layout(4, 2, **SP4, recompute_granularity="selective")),
        (1, make_layout(4, 2, **SP4, recompute_granularity="selective", recompute_modules=["core_attn", "mlp"])),
        (1, make_layout(4, 2, **SP4, recompute_granularity="full")),
        (1, make_layout(4, 1, tensor_model_parallel_size=4, recompute_granularity="full", recompute_num_layers=2)),
        (1, make_layout(4, 1, **SP4, recompute_granularity="full", recompute_method="block", recompute_num_layers=3)),
    ],
)
def test_small_jobs(rank: int, layout: Layout) -> None:
    check_against_simulation(TrainingJob(TINY, 40, 96, "bf16" if rank % 2 else "fp32"), layout, rank)
    if layout.pipeline > 1 or rank == 3:  # where tied embeddings are laid out differently
        check_against_simulation(TrainingJob(TIED, 40, 96), layout, rank)


def test_buckets_of_a_first_stage_that_reduces_while_it_computes() -> None:
    """More than one bucket: each is padded, and each has its share of every rank."""
    wide = dataclasses.replace(MODELS["8B"], num_hidden_layers=2, vocab_size=1000)
    for rank in (0, 5):
        check_against_simulation(TrainingJob(wide, 64, 96), make_layout(6, overlap_grad_reduce=True), rank)


def test_flops_of_all_ranks_are_those_of_mfu() -> None:
    """One of each stage, times the tensor-parallel ranks: `flops_per_token(causal=False)`."""
    layout = make_layout(8, 2, **SP4, **PP2)
    job = TrainingJob(TINY, 40, 16)
    flops = sum(simulate(job, layout, rank).flops for rank in (0, 7)) * layout.tensor
    assert flops == 2 * 40 * flops_per_token(TINY, 40, causal=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_real_job_in_memory(dtype: torch.dtype) -> None:
    """Not fake: weights, gradients and optimizer states of one process after a step."""
    layout = Layout(ParallelConfig(), 1, 2, 2)
    job = TrainingJob(TINY, 40, 4, "bf16" if dtype == torch.bfloat16 else "fp32")
    with process_groups(ParallelConfig(), alone=True) as ranks:
        config = make_transformer_config(TINY, ParallelConfig(), dtype)
        config.finalize_model_grads_func = finalize_model_grads
        module = build_model(TINY, config, 40, current_platform(), ranks)
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        model = DistributedDataParallel(
            config, DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True), module
        )
        optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam", bf16=job.element_bytes == 2, params_dtype=dtype, use_distributed_optimizer=True
            ),
            [model],
        )
        config.grad_scale_func = optimizer.scale_loss
        tokens = np.random.default_rng(1).integers(0, 404, (2, 41))
        batches = [Batch(tokens, np.ones((2, 40), np.float32), None)] * 2
        train_step([model], optimizer, iter(batches), StepShape(2, 2, 40), 1e-3, Settings(), ranks)
        planned = state_bytes(job, layout, 0, 0)
        assert sum(parameter.numel() for parameter in model.parameters()) == planned.parameters
        assert sum(buffer.param_data.nbytes for buffer in model.buffers) == planned.weights
        assert sum(buffer.grad_data.nbytes for buffer in model.buffers) == planned.gradients
        assert optimizer_bytes(optimizer) == planned.optimizer


def test_what_cannot_be_simulated_is_refused() -> None:
    with pytest.raises(InputError, match="simulate is 4; expected a rank from 0 to 3"):
        simulate(TrainingJob(TINY, 40, 96), make_layout(4), 4)
