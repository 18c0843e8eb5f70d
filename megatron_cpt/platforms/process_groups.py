"""The process groups of a run: megatron-core's parallel_state is touched here and nowhere else."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_cpt.config.run import ParallelConfig
from megatron_cpt.platforms import prepare_platform


@dataclass(frozen=True)
class Ranks:
    """Where this process stands, and with whom it talks."""

    rank: int
    world_size: int
    tensor_rank: int
    tensor_size: int
    pipeline_rank: int
    pipeline_size: int
    data_rank: int
    data_size: int
    device: torch.device

    @property
    def is_first_stage(self) -> bool:
        """Holds the embedding; reads input tokens."""
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Holds the output layer; computes the loss."""
        return self.pipeline_rank == self.pipeline_size - 1

    @property
    def reads_tokens(self) -> bool:
        """Its stage has inputs to embed or targets to compare with."""
        return self.is_first_stage or self.is_last_stage

    def sum_from_last_stage(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over data-parallel replicas of `values` as the last pipeline stages have them; the same on every rank.

        `values` counts on the last stage only; tensor-parallel ranks there hold equal copies, so the first speaks.
        """
        if not (self.is_last_stage and self.tensor_rank == 0):
            values = torch.zeros_like(values)
        dist.all_reduce(values)
        return values


def launched_world_size() -> int:
    """Number of processes that torchrun (or srun with its variables) started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextlib.contextmanager
def process_groups(parallel: ParallelConfig, seed: int = 1234, alone: bool = False) -> Iterator[Ranks]:
    """Join the groups that torchrun's environment describes, for the length of the block.

    A group of one if there is no such environment, or if `alone` says to ignore it (a conversion inside a job).
    """
    platform = prepare_platform()
    from megatron.core import parallel_state, tensor_parallel

    device = platform.device(int(os.environ.get("LOCAL_RANK", "0")))
    if alone or "WORLD_SIZE" not in os.environ:
        dist.init_process_group(platform.backend, store=dist.HashStore(), rank=0, world_size=1)
    else:
        dist.init_process_group(platform.backend)
    try:
        parallel_state.initialize_model_parallel(parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size)
        tensor_parallel.model_parallel_cuda_manual_seed(seed)
        yield Ranks(
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
            tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
            tensor_size=parallel_state.get_tensor_model_parallel_world_size(),
            pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
            pipeline_size=parallel_state.get_pipeline_model_parallel_world_size(),
            data_rank=parallel_state.get_data_parallel_rank(),
            data_size=parallel_state.get_data_parallel_world_size(),
            device=device,
        )
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
