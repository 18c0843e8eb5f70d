"""Speed and memory of this process's device, as JSON: python -m megatron_cpt.cluster.measure_device PREFIX."""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable

import torch

from megatron_cpt.platforms import current_platform
from megatron_cpt.utils.logs import start_logs

TIMES = 10


def main(prefix: str) -> None:
    """Write `prefix`.RANK.json."""
    platform = current_platform()
    device = platform.device(int(os.environ.get("LOCAL_RANK", "0")))
    on_gpu = device.type == "cuda"
    free, total = torch.cuda.mem_get_info(device) if on_gpu else (0, 0)
    size, dtype = (8192, torch.bfloat16) if on_gpu else (512, torch.float32)
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    source = torch.zeros((1 << 30) if on_gpu else (1 << 24), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found = {
        "kind": device.type,
        "name": platform.device_name(),
        "memory_gib": total / 2**30,
        "free_gib": free / 2**30,
        "matmul_dtype": str(dtype).removeprefix("torch."),
        "matmul_tflops": 2 * size**3 / device_seconds(lambda: torch.mm(left, right), device) / 1e12,
        "memory_gb_per_s": 2 * source.numel() / device_seconds(lambda: target.copy_(source), device) / 1e9,
    }
    with open(f"{prefix}.{os.environ.get('RANK', '0')}.json", "w", encoding="utf-8") as file:
        json.dump(found, file)


def device_seconds(work: Callable[[], object], device: torch.device) -> float:
    """In the median of some times, after three that do not count."""
    taken = []
    for _ in range(3 + TIMES):
        begin = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken[3:])


if __name__ == "__main__":
    start_logs()
    main(sys.argv[1])
