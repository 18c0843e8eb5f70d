"""Counting what a rank sends: every collective torch dispatches, by kind and group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

# Operators of torch's c10d library -> their usual names
KINDS = {
    "allreduce_": "all-reduce",
    "_allgather_base_": "all-gather",
    "allgather_": "all-gather",
    "allgather_into_tensor_coalesced_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_": "reduce-scatter",
    "reduce_scatter_tensor_coalesced_": "reduce-scatter",
    "broadcast_": "broadcast",
    "send": "send",
    "recv_": "receive",
}


@dataclass
class Traffic:
    """Collectives of one kind: how many, and bytes of the whole tensors that the group reduces, gathers or scatters."""

    count: int = 0
    bytes: int = 0


class CollectiveCounter(TorchDispatchMode):
    """Counts the collectives that run within its block, by (kind, ranks in the group)."""

    def __init__(self) -> None:
        super().__init__()
        self.traffic: dict[tuple[str, int], Traffic] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "c10d" and name in KINDS:
            tensors = [x for x in tree_iter((args, kwargs or {})) if isinstance(x, torch.Tensor)]
            group = next((x for x in tree_iter((args, kwargs or {})) if isinstance(x, torch.ScriptObject)), None)
            size = dist.ProcessGroup.unbox(group).size() if group is not None else 1
            traffic = self.traffic.setdefault((KINDS[name], size), Traffic())
            traffic.count += 1
            traffic.bytes += max(tensor.nbytes for tensor in tensors)  # the gathered output, the input to be scattered
        return func(*args, **(kwargs or {}))
