"""The model of this rank in megatron-core's DDP, and its distributed optimizer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import megatron_cpt.platforms.imported_megatron  # noqa: F401  isort: skip  (before megatron is imported)
import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_cpt.config.parallel import ParallelConfig
from megatron_cpt.config.run import OptimizerConfig, RunConfig
from megatron_cpt.model.build import build_chunks, make_transformer_config, numerics_of
from megatron_cpt.model.dtypes import dtype_of
from megatron_cpt.model.llama import LlamaConfig
from megatron_cpt.platforms import current_platform
from megatron_cpt.platforms.process_groups import RankInfo


def build(
    config: RunConfig, llama: LlamaConfig, seq_length: int, ranks: RankInfo
) -> tuple[list[DistributedDataParallel], MegatronOptimizer]:
    """Model chunks (one, unless the pipeline is interleaved) with uninitialised weights, and their optimizer."""
    params_dtype, parallel = dtype_of(config.training.params_dtype), config.parallel
    transformer_config = make_transformer_config(llama, parallel, params_dtype, numerics_of(config.training))
    current_platform().before_layers(parallel, config.training, seq_length, llama.hidden_size)
    chunks = in_ddp(
        build_chunks(llama, transformer_config, seq_length, current_platform(), ranks), transformer_config, parallel
    )
    optimizer = get_megatron_optimizer(
        optimizer_config(config.optimizer, params_dtype, parallel.overlap_param_gather), chunks
    )
    transformer_config.finalize_model_grads_func = finalize_model_grads
    transformer_config.grad_scale_func = optimizer.scale_loss
    if parallel.overlap_grad_reduce:
        transformer_config.no_sync_func = chunks[0].no_sync if len(chunks) == 1 else [chunk.no_sync for chunk in chunks]
    return chunks, optimizer


def in_ddp(
    models: Sequence[GPTModel], transformer_config: TransformerConfig, parallel: ParallelConfig
) -> list[DistributedDataParallel]:
    """megatron-core's wrapper with its gradient buffers, for the distributed optimizer, around each model chunk."""
    settings = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        grad_reduce_in_fp32=not parallel.grad_reduce_in_bf16,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
    )
    # Chunks after the first have no buckets of their own: their reductions overlap with the other chunks' passes.
    return [
        DistributedDataParallel(transformer_config, settings, model, disable_bucketing=place > 0)
        for place, model in enumerate(models)
    ]


def optimizer_config(
    settings: OptimizerConfig, params_dtype: torch.dtype, overlap_param_gather: bool
) -> MegatronOptimizerConfig:
    """megatron-core's description of AdamW."""
    return MegatronOptimizerConfig(
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
        overlap_param_gather=overlap_param_gather,
    )


def unwrap(chunks: Sequence[DistributedDataParallel]) -> list[GPTModel]:
    """The GPTModels inside megatron-core's DDP."""
    return [chunk.module for chunk in chunks]


@contextlib.contextmanager
def gathered_parameters(chunks: Sequence[DistributedDataParallel]) -> Iterator[None]:
    """Within the block the parameters are up to date everywhere, also where the next forward pass would gather them."""
    overlapping = [chunk for chunk in chunks if chunk.ddp_config.overlap_param_gather]
    for chunk in overlapping:
        chunk.disable_forward_pre_hook()  # which gathers them
    try:
        yield
    finally:
        for chunk in overlapping:
            chunk.enable_forward_pre_hook()
