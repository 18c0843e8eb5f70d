"""Bandwidth of collectives and sends, as JSON: python -m megatron_cpt.cluster.measure_links PREFIX DEVICES_PER_NODE.

Bus bandwidth as nccl-tests has it (https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md): what the slowest
link carries in one direction, to be compared with the hardware's. All-reduce of n ranks sends 2 (n - 1) / n of its bytes,
all-gather (n - 1) / n.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from megatron_cpt.platforms import current_platform
from megatron_cpt.utils.logs import start_logs

TIMES = 10
BYTES = {"cuda": 256 << 20, "cpu": 8 << 20}


def main(prefix: str, devices_per_node: int) -> None:
    """Write `prefix`.RANK.json."""
    platform = current_platform()
    dist.init_process_group(platform.backend)
    rank, size = dist.get_rank(), dist.get_world_size()
    device = platform.device(local_rank())
    values = torch.zeros(BYTES[device.type] // 4, device=device)
    found: dict[str, Any] = {"right": sums_right(torch.full((1000,), float(rank + 1), device=device), size)}
    groups = {"": list(range(size))}
    if devices_per_node < size:
        here = rank // devices_per_node * devices_per_node
        groups = {
            "_within_a_node": list(range(here, min(here + devices_per_node, size))),
            "_across_nodes": list(range(size)),
        }
    for name, ranks in groups.items():
        group = own_group(ranks)
        if len(ranks) > 1:
            found |= {f"{key}{name}_gb_per_s": value for key, value in bandwidths(values, group, len(ranks), device).items()}
    found["send_gb_per_s"] = ring_bandwidth(values, rank, size, device)
    if devices_per_node < size:
        found["send_across_nodes_gb_per_s"] = ring_bandwidth(values, rank, size, device, devices_per_node)
    with open(f"{prefix}.{rank}.json", "w", encoding="utf-8") as file:
        json.dump(found, file)
    dist.destroy_process_group()


def local_rank() -> int:
    """Of this process on its machine."""
    import os

    return int(os.environ.get("LOCAL_RANK", "0"))


def own_group(ranks: list[int]) -> dist.ProcessGroup:
    """The group of these ranks; each rank names its own, and all of them are made everywhere."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, ranks)
    mine = None
    for one in sorted({tuple(one) for one in everyone}):
        group = dist.new_group(list(one))
        if dist.get_rank() in one:
            mine = group
    assert mine is not None
    return mine


def sums_right(values: torch.Tensor, size: int) -> bool:
    """Whether the sum over all ranks is that of 1 to `size`."""
    dist.all_reduce(values)
    return bool((values == size * (size + 1) / 2).all())


def bandwidths(values: torch.Tensor, group: dist.ProcessGroup, size: int, device: torch.device) -> dict[str, float]:
    """Bus bandwidth, GB/s."""
    volume = values.numel() * values.element_size()
    part = values[: values.numel() // size]
    whole = torch.empty(part.numel() * size, device=device)
    reduce = link_seconds(lambda: dist.all_reduce(values, group=group), device)
    gather = link_seconds(lambda: dist.all_gather_into_tensor(whole, part, group=group), device)
    share = (size - 1) / size
    return {"all_reduce": 2 * share * volume / reduce / 1e9, "all_gather": share * volume / gather / 1e9}


def ring_bandwidth(values: torch.Tensor, rank: int, size: int, device: torch.device, stride: int = 1) -> float:
    """GB/s that each rank sends to the one `stride` further on, as a pipeline does, while it receives as much."""
    volume, other = values.numel() * values.element_size(), torch.empty_like(values)

    def turn() -> None:
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, values, (rank + stride) % size),
                dist.P2POp(dist.irecv, other, (rank - stride) % size),
            ]
        )
        for work in works:
            work.wait()

    return volume / link_seconds(turn, device) / 1e9


def link_seconds(work: Callable[[], object], device: torch.device) -> float:
    """In the median of some times, after two that do not count; all ranks begin together."""
    taken = []
    for _ in range(2 + TIMES):
        dist.barrier()
        begin = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken[2:])


if __name__ == "__main__":
    start_logs()
    main(sys.argv[1], int(sys.argv[2]))
