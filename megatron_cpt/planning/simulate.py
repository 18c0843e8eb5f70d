"""One rank of the real job, built by the code that trains, with fake tensors and a fake process group."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import megatron_cpt.platforms.imported_megatron  # noqa: F401  isort: skip  (before megatron is imported)
import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import get_megatron_optimizer
from torch.utils.flop_counter import FlopCounterMode

from megatron_cpt.config.run import OptimizerConfig
from megatron_cpt.model.build import build_chunks, make_transformer_config
from megatron_cpt.planning.collectives import CollectiveCounter, Traffic
from megatron_cpt.planning.layouts import Layout, TrainingJob
from megatron_cpt.platforms import current_platform
from megatron_cpt.platforms.fake_cluster import fake_rank
from megatron_cpt.training.model_setup import in_ddp, optimizer_config
from megatron_cpt.utils.errors import InputError


@dataclass(frozen=True)
class Simulation:
    """What one rank holds and does.

    Attributes:
        parameters: elements
        weights, gradients, optimizer: bytes of buffers and states, padding included
        activations: bytes saved for the backward pass of one micro-batch, each storage once, parameters left out
        flops: of forward and backward pass of one micro-batch (a multiply-add is two), as torch counts them
        microbatch_traffic, step_traffic: collectives of one micro-batch, and of the end of a step, by (kind, group size)
    """

    rank: int
    tensor_rank: int
    pipeline_rank: int
    data_rank: int
    parameters: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    flops: int
    microbatch_traffic: dict[tuple[str, int], Traffic]
    step_traffic: dict[tuple[str, int], Traffic]


def simulate(job: TrainingJob, layout: Layout, rank: int) -> Simulation:
    """Build rank `rank` of `layout` and run one micro-batch forward and backward.

    With several model chunks (the interleaved pipeline) each takes the micro-batch in its turn.

    Raises:
        InputError: no such rank
    """
    if not 0 <= rank < layout.devices:
        raise InputError(f"simulate is {rank}; expected a rank from 0 to {layout.devices - 1}")
    dtype = torch.bfloat16 if job.params_dtype == "bf16" else torch.float32
    with warnings.catch_warnings(), fake_rank(layout.parallel, rank, layout.devices) as ranks:
        warnings.simplefilter("ignore")
        config = make_transformer_config(job.llama, layout.parallel, dtype)
        models = build_chunks(job.llama, config, job.seq_length, current_platform(), ranks)
        chunks = in_ddp(models, config, layout.parallel)
        optimizer = build_optimizer(chunks, dtype)
        with contextlib.ExitStack() as stack:
            for chunk in chunks:
                stack.enter_context(chunk.no_sync())
            activations = sum(saved_bytes(chunk, job, layout, dtype) for chunk in chunks)
            microbatch, flops = stack.enter_context(CollectiveCounter()), stack.enter_context(counted_flops())
            for chunk in chunks:
                chunk.zero_grad_buffer()
                output = forward(chunk, job, layout, dtype)
                output.backward(torch.ones_like(output))
        with CollectiveCounter() as step:
            for chunk in chunks:
                if layout.parallel.overlap_grad_reduce:
                    chunk.start_grad_sync()
            finalize_model_grads(chunks)
            for chunk in chunks:
                chunk.start_param_sync(force_sync=True)
        buffers = [buffer for chunk in chunks for buffer in chunk.buffers]
        return Simulation(
            rank=rank,
            tensor_rank=ranks.tensor_rank,
            pipeline_rank=ranks.pipeline_rank,
            data_rank=ranks.data_rank,
            parameters=sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters()),
            weights=sum(buffer.param_data.nbytes for buffer in buffers),
            gradients=sum(buffer.grad_data.nbytes for buffer in buffers),
            optimizer=optimizer_bytes(optimizer),
            activations=activations,
            flops=flops.get_total_flops(),
            microbatch_traffic=microbatch.traffic,
            step_traffic=step.traffic,
        )


def counted_flops() -> FlopCounterMode:
    """torch's counter, which does not know the attention of CPUs.

    Attention counts in full, not half for being causal, and its backward pass as twice the forward, whatever the kernel
    computes again: model FLOPs, as `flops_per_token(causal=False)`.
    """

    def forward(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
        batch, heads, length, dim = query
        return 4 * batch * heads * length * key[-2] * dim

    def backward(gradient: torch.Size, query: torch.Size, key: torch.Size, *_: Any, **__: Any) -> int:
        return 2 * forward(query, key, key)

    aten = torch.ops.aten
    return FlopCounterMode(
        display=False,
        custom_mapping={
            aten._scaled_dot_product_flash_attention_for_cpu: forward,
            aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
        },
    )


def build_optimizer(chunks: Sequence[DistributedDataParallel], dtype: torch.dtype) -> Any:
    """megatron-core's distributed optimizer with its states, as after a first step."""
    settings = optimizer_config(OptimizerConfig(), dtype, overlap_param_gather=False)
    optimizer = get_megatron_optimizer(settings, list(chunks), use_gloo_process_groups=False)
    for part in optimizer.chained_optimizers:
        inner = part.optimizer
        for group in inner.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        inner.step()
        inner.zero_grad()
    return optimizer


def optimizer_bytes(optimizer: Any) -> int:
    """Bytes of moments, and of the fp32 main weights where there are any, each storage once."""
    total = 0
    for part in optimizer.chained_optimizers:
        for state in part.optimizer.state.values():
            total += sum(value.nbytes for value in state.values() if isinstance(value, torch.Tensor))
        for group in part.shard_fp32_from_float16_groups:
            total += sum(parameter.nbytes for parameter in group if parameter is not None)
    return total


def forward(chunk: DistributedDataParallel, job: TrainingJob, layout: Layout, dtype: torch.dtype) -> torch.Tensor:
    """A model chunk's losses or hidden states of one micro-batch."""
    batch, seq_length, model = layout.micro_batch_size, job.seq_length, chunk.module
    tokens = torch.zeros(batch, seq_length, dtype=torch.long)
    if not model.pre_process:
        local = seq_length // layout.tensor if layout.parallel.sequence_parallel else seq_length
        model.set_input_tensor(torch.zeros(local, batch, job.llama.hidden_size, dtype=dtype, requires_grad=True))
    return chunk(tokens, None, None, labels=tokens if model.post_process else None)


def saved_bytes(chunk: DistributedDataParallel, job: TrainingJob, layout: Layout, dtype: torch.dtype) -> int:
    """Bytes that one micro-batch keeps for its backward pass, which is not run.

    A weight that has been through the hooks that see them is an alias, without the attributes by which megatron-core's fused
    gradients are summed.
    """
    own = {parameter.untyped_storage()._cdata for parameter in chunk.parameters()}
    with saved_storages() as storages:
        output = forward(chunk, job, layout, dtype)  # noqa: F841  (alive until the bytes are counted)
    return sum(storage.nbytes() for key, storage in storages.items() if key not in own)


@contextlib.contextmanager
def saved_storages() -> Iterator[dict[int, torch.UntypedStorage]]:
    """The storages that autograd saves for the backward pass of what runs in the block."""
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage  # kept, so that no other storage takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield storages
