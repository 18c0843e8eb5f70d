"""What a checkpoint holds, as megatron-core's dist_checkpointing wants it described: which rank has which part of what.

Nothing is copied or gathered here: on CPU every tensor of the state dict is the memory that training works in.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import megatron_cpt.platforms.imported_megatron  # noqa: F401  isort: skip  (before megatron is imported)
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
    apply_factories,
)
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.tensor_parallel import random

# Every optimizer shard can be loaded by any other layout.
OPTIMIZER_METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}
OPTIMIZER_KEYS = ("param", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Progress:
    """How far a run has come; with the weights and the optimizer's state, all that a resume needs."""

    iteration: int = 0
    consumed_samples: int = 0


def chunk_names(chunks: Sequence[GPTModel]) -> list[str]:
    """Keys of the model chunks of a rank in a state dict, as Megatron-LM has them."""
    return ["model"] if len(chunks) == 1 else [f"model{index}" for index in range(len(chunks))]


def state_to_save(
    chunks: Sequence[GPTModel], optimizer: MegatronOptimizer | None, progress: Progress | None
) -> dict[str, Any]:
    """The state dict of a save. Its tensors are the live ones: write it before training goes on, or fork."""
    weights = {name: chunk.sharded_state_dict() for name, chunk in zip(chunk_names(chunks), chunks, strict=True)}
    state: dict[str, Any] = {"checkpoint_version": 3.0} | weights
    if optimizer is not None:
        state["optimizer"] = optimizer_state(optimizer, weights)
        state["content_metadata"] = dict(OPTIMIZER_METADATA)
    if progress is not None:
        state |= {"iteration": progress.iteration, "consumed_samples": progress.consumed_samples}
        name = rng_name(chunks)
        rank, size = dist.get_rank(), dist.get_world_size()
        state |= {"rng_name": name, "rng_state": ShardedObject(name, rng_state(), (size,), (rank,))}
    apply_factories(state)
    for tensor in nested_values(state):
        if isinstance(tensor, ShardedTensor):
            tensor.data = alias(tensor.data)
    return state


def state_to_load(
    chunks: Sequence[GPTModel], optimizer: MegatronOptimizer | None, saved_rng_name: str | None
) -> dict[str, Any]:
    """The state dict that says what to load."""
    weights = {name: chunk.sharded_state_dict() for name, chunk in zip(chunk_names(chunks), chunks, strict=True)}
    state: dict[str, Any] = dict(weights)
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(weights, is_loading=True, metadata=OPTIMIZER_METADATA)
        if saved_rng_name == rng_name(chunks):
            state["rng_state"] = ShardedObject(saved_rng_name, None, (dist.get_world_size(),), (dist.get_rank(),))
    return state


def optimizer_state(optimizer: MegatronOptimizer, weights: dict[str, Any]) -> dict[str, Any]:
    """The optimizer's state in the form that megatron-core's "fully_reshardable" loading reads.

    megatron-core itself gathers it for that, at about seven times the fp32 size of a rank's parameters. Here every rank
    describes its own part of the data-parallel shards as boxes of the whole tensors, which load just the same.
    """
    parts = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    if len(parts) != 1 or not isinstance(parts[0], DistributedOptimizer):  # mixture of experts; let megatron-core do it
        return optimizer.sharded_state_dict(weights, metadata=OPTIMIZER_METADATA)
    inner = parts[0]
    sharded, _ = extract_sharded_tensors_and_factories(weights)
    described = {base.data: base for base in nested_values(sharded)}
    shards: dict[int, dict[str, list[ShardedTensor]]] = {}
    for ranges_of_type in inner.gbuf_ranges:
        for buckets in ranges_of_type.values():
            for bucket in buckets:
                for param, ranges in bucket["param_map"].items():
                    shards[len(shards)] = parameter_shards(inner, param, ranges["param"], described[param])
    return inner.state_dict() | {
        "param_state": shards,
        "param_state_sharding_type": OPTIMIZER_METADATA["distrib_optim_sharding_type"],
    }


def parameter_shards(
    optimizer: DistributedOptimizer, param: torch.nn.Parameter, owned: Any, base: ShardedTensor | ShardedTensorFactory
) -> dict[str, list[ShardedTensor]]:
    """This rank's part of the state of one parameter: of its flat range `owned` (start, end)."""
    state = optimizer._get_main_param_and_optimizer_states(param)
    shards: dict[str, list[ShardedTensor]] = {key: [] for key in OPTIMIZER_KEYS}
    for piece in base.build() if isinstance(base, ShardedTensorFactory) else [base]:
        assert piece.data.is_contiguous(), f"{piece.key}: its parts are not contiguous"
        # Where in the parameter this piece (all of it, or the gate or up projection of linear_fc1) begins
        first = piece.data.storage_offset() - param.storage_offset()
        start, end = max(owned.start, first), min(owned.end, first + piece.data.numel())
        for offset, shape in boxes(tuple(piece.local_shape), start - first, end - first):
            numel = math.prod(shape)
            for key in OPTIMIZER_KEYS:
                tensor = state.get(key)  # the moments are not there before the first step
                flat = torch.zeros(numel) if tensor is None else tensor.detach().view(-1)[start - owned.start :][:numel]
                shards[key].append(box_tensor(f"optimizer.state.{key}.{piece.key}", flat, piece, offset, shape, optimizer))
            start += numel
    return shards


def box_tensor(
    key: str,
    flat: torch.Tensor,
    piece: ShardedTensor,
    offset: tuple[int, ...],
    shape: tuple[int, ...],
    optimizer: DistributedOptimizer,
) -> ShardedTensor:
    """A box of a tensor that has the shape and place of a weight (`piece`)."""
    begin = piece.prepend_axis_num
    return ShardedTensor(
        key,
        flat.view((1,) * begin + shape),
        flat.dtype,
        (1,) * begin + shape,
        piece.global_shape,
        (
            *piece.global_offset[:begin],
            *(whole + part for whole, part in zip(piece.global_offset[begin:], offset, strict=True)),
        ),
        axis_fragmentations=None,  # no regular grid
        # A replica of a weight for each data-parallel rank, but a shard of the optimizer's state is there once
        replica_id=(*piece.replica_id[:2], optimizer.distributed_optimizer_instance_id),
    )


def boxes(shape: tuple[int, ...], start: int, end: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(offset, shape) of the boxes that the flat range [start, end) of a row-major array consists of, in order."""
    if start >= end:
        return
    if len(shape) == 1:
        yield (start,), (end - start,)
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), end // row  # whole rows
    if first > last:  # within one row
        yield from ((((last, *o), (1, *s)) for o, s in boxes(shape[1:], start - last * row, end - last * row)))
        return
    yield from (
        ((first - 1, *o), (1, *s)) for o, s in boxes(shape[1:], start - (first - 1) * row, row) if start < first * row
    )
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    yield from (((last, *o), (1, *s)) for o, s in boxes(shape[1:], 0, end - last * row))


def alias(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as a tensor whose storage is just it, so that saving neither copies nor writes what is around it."""
    tensor = tensor.detach()
    if tensor.device.type != "cpu" or tensor.numel() == 0 or not tensor.is_contiguous():
        return tensor
    return torch.from_numpy(tensor.view(-1).view(torch.uint8).numpy()).view(tensor.dtype).view(tensor.shape)


def rng_name(chunks: Sequence[GPTModel]) -> str:
    """Says for which layout the states of the random number generators hold."""
    config = chunks[0].config
    device = next(chunks[0].parameters()).device.type
    return (
        f"rng_state.tp{config.tensor_model_parallel_size}.pp{config.pipeline_model_parallel_size}"
        f".world{dist.get_world_size()}.{device}"
    )


def rng_state() -> dict[str, Any]:
    """States of this rank's generators that training draws from; nothing in it draws from Python's or numpy's."""
    return {
        "torch": torch.get_rng_state(),
        "device": random._get_cuda_rng_state(),
        "tracker": random.get_cuda_rng_tracker().get_states(),
    }


def restore_rng(state: dict[str, Any]) -> None:
    """The inverse of `rng_state`."""
    torch.set_rng_state(state["torch"])
    random._set_cuda_rng_state(state["device"])
    random.get_cuda_rng_tracker().set_states(state["tracker"])
