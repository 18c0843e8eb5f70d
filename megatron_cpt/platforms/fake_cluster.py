"""One rank of a cluster that is not there: torch's "fake" process group, whose collectives do nothing, and fake tensors.

Fake tensors have shapes and dtypes but no storage, so the real code of a 70B job runs in seconds on a laptop.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_cpt.config.parallel import ParallelConfig
from megatron_cpt.platforms import prepare_platform
from megatron_cpt.platforms.process_groups import RankInfo, ranks_here


@contextlib.contextmanager
def fake_rank(parallel: ParallelConfig, rank: int, world_size: int) -> Iterator[RankInfo]:
    """Be rank `rank` of `world_size`, with fake tensors, for the length of the block."""
    prepare_platform()
    from megatron.core import parallel_state, tensor_parallel
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        parallel_state.initialize_model_parallel(
            parallel.tensor_model_parallel_size,
            parallel.pipeline_model_parallel_size,
            parallel.virtual_pipeline_model_parallel_size,
            create_gloo_process_groups=False,
        )
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        with what_fake_tensors_cannot_do(), FakeTensorMode(allow_non_fake_inputs=True):
            yield ranks_here(torch.device("cpu"), model_parallel_group=None)  # nobody to agree with
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


@contextlib.contextmanager
def what_fake_tensors_cannot_do() -> Iterator[None]:
    """The few things on the way that need values, replaced for the length of the block."""
    import megatron.core.distributed.param_and_grad_buffer as param_and_grad_buffer
    import megatron.core.tensor_parallel.random as random

    def everyone_says_the_same(objects: list[Any], own: Any, group: Any = None) -> None:
        objects[:] = [own] * len(objects)

    def rms_norm(values: torch.Tensor, shape: Any, weight: torch.Tensor, eps: float | None = None) -> torch.Tensor:
        return RmsNormOfCuda.apply(values, weight)

    with contextlib.ExitStack() as stack:
        # Generator states, saved and restored for recomputation: there is no dropout, so no random number is drawn.
        stack.enter_context(replaced(random, "_get_all_rng_states", lambda: ()))
        stack.enter_context(replaced(random, "_set_all_rng_states", lambda *states: None))
        stack.enter_context(replaced(random, "_fork_rng", contextlib.nullcontext))
        stack.enter_context(replaced(random.CudaRNGStatesTracker, "fork", lambda self, name=None: contextlib.nullcontext()))
        # `to(device)` swaps parameters, which fake tensors refuse; they are made on the right device anyway.
        stack.enter_context(replaced(torch.nn.Module, "to", lambda self, *args, **kwargs: self))
        # Pickled objects of other ranks, by which the optimizer sorts its parameter groups alike.
        stack.enter_context(replaced(dist, "all_gather_object", everyone_says_the_same))
        # One kernel on a GPU, which keeps its input; on a CPU torch composes it of operations that keep fp32 copies.
        stack.enter_context(replaced(torch.nn.functional, "rms_norm", rms_norm))
        # Collectives of one group that torch sends as one; fake tensors know only the single ones.
        stack.enter_context(replaced(param_and_grad_buffer, "_coalescing_manager", one_by_one))
        yield


class RmsNormOfCuda(torch.autograd.Function):
    """Shapes of torch's CUDA kernel: it keeps its input, the weight, and 1 / rms of each row in fp32."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(values, weight, torch.empty(values.shape[:-1], dtype=torch.float32))
        return torch.empty_like(values)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        values, weight, _ = ctx.saved_tensors
        return torch.empty_like(values), torch.empty_like(weight)


class Done:
    """Handle of a collective that is over."""

    def wait(self) -> None:
        pass


@contextlib.contextmanager
def one_by_one(group: Any, async_ops: bool = False) -> Iterator[Done]:
    """In place of torch's `_coalescing_manager`."""
    yield Done()


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """`owner.name` is `value` for the length of the block."""
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)
