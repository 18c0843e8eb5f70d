"""Versions, devices and clocks of the machines."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from megatron_cpt.cluster.check import Check, CheckFailedError, Figures, succeeded
from megatron_cpt.cluster.job import ClusterJob
from megatron_cpt.platforms import current_platform
from megatron_cpt.platforms.cuda import import_transformer_engine

PACKAGES = (
    "torch",
    "megatron-core",
    "transformer-engine",
    "apex",
    "flash-attn",
    "transformers",
    "numpy",
    "nvidia-resiliency-ext",
)
# What was run with what is in docs/platforms.md; here is what is known not to work.
LOWEST, BELOW = (0, 16, 1), (0, 20)
SKEW_SECONDS = 1.0  # time limits and the order of log lines bear as much
ROUNDS = 20


def machine_versions(job: ClusterJob) -> dict[str, str]:
    """Of everything that computes, on this machine."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        found["driver"] = driver_version()
        if importlib.util.find_spec("transformer_engine") is not None:
            found["transformer_engine"] = importable()
    return found | current_platform().library_versions() | {"platform": current_platform().name}


def driver_version() -> str:
    """Of NVIDIA's driver, as the kernel's module says it."""
    try:
        with open("/proc/driver/nvidia/version", encoding="utf-8") as file:
            return next((word for word in file.readline().split() if word[0].isdigit()), "unknown")
    except OSError:
        return "unknown"


def importable() -> str:
    """Whether Transformer Engine can be imported: "imports", or why not."""
    try:
        import_transformer_engine()
    except (ImportError, OSError, RuntimeError) as error:
        return " ".join(f"{type(error).__name__}: {error}".split())
    return "imports"


def judge_versions(found: Sequence[dict[str, str]]) -> tuple[str, Figures]:
    first = found[0]
    for rank, other in enumerate(found):
        differing = sorted(name for name in first.keys() | other.keys() if first.get(name) != other.get(name))
        if differing:
            name = differing[0]
            raise CheckFailedError(
                f"{name} is {first.get(name, 'missing')} on rank 0 and {other.get(name, 'missing')} on rank {rank}",
                "use the same environment, or container image, on all machines",
                first,
            )
    core = tuple(int(part) for part in first["megatron-core"].split(".")[:3] if part.isdigit())
    if not LOWEST <= core < BELOW:
        raise CheckFailedError(
            f"megatron-core is {first['megatron-core']}",
            "install 0.16.1 (Python 3.11) or 0.19.2 (Python 3.12 and later)",
            first,
        )
    if first.get("transformer_engine", "imports") != "imports":
        raise CheckFailedError(
            f"Transformer Engine cannot be imported ({first['transformer_engine']}), so that torch's layers are used",
            "build its extension for the installed torch: docs/platforms.md has the command",
            first,
        )
    if first.get("cudnn", "").startswith("refused"):
        advice = "unset LD_LIBRARY_PATH, or put the folder of torch's own cuDNN (site-packages/nvidia/cudnn/lib) first in it"
        raise CheckFailedError(f"cuDNN is {first['cudnn']}", advice, first)
    names = ("python", "torch", "megatron-core", "transformer-engine", "nccl", "driver")
    return ", ".join(f"{name} {first[name]}" for name in names if name in first), first


def clock(job: ClusterJob) -> float:
    """Seconds by which this machine's clock is ahead of the first rank's, to within half of the shortest round trip."""
    if job.is_rank_zero:
        for rank in range(1, job.world_size):
            for turn in range(ROUNDS):
                job.ask(f"clock/{rank}/{turn}/asked")
                job.tell(f"clock/{rank}/{turn}/answered", time.time())
        return 0.0
    trips = []
    for turn in range(ROUNDS):
        begin = time.time()
        job.tell(f"clock/{job.rank}/{turn}/asked", True)
        theirs = job.ask(f"clock/{job.rank}/{turn}/answered")
        end = time.time()
        trips.append((end - begin, (begin + end) / 2 - theirs))
    return min(trips)[1]


def judge_clocks(ahead: Sequence[float]) -> tuple[str, Figures]:
    rank = max(range(len(ahead)), key=lambda rank: abs(ahead[rank]))
    figures = {"largest_skew_seconds": ahead[rank], "rank": rank}
    if abs(ahead[rank]) > SKEW_SECONDS:
        raise CheckFailedError(
            f"the clock of rank {rank}'s machine is {ahead[rank]:+.1f} s from the first one's",
            "have chrony or ntpd set the clocks of all machines",
            figures,
        )
    return f"at most {abs(ahead[rank]) * 1e3:.1f} ms apart", figures


def devices(job: ClusterJob) -> dict[str, Any]:
    """Measure this rank's device in a process of its own, which frees it again."""
    command = [sys.executable, "-m", "megatron_cpt.cluster.measure_device", str(job.folder / "device")]
    ended = job.run("device", command, job.world_size, 120)
    succeeded(ended, job.rank, "nvidia-smi and dmesg on that machine say whether the GPU answers")
    return read_measured(job.folder / f"device.{job.rank}.json")


def read_measured(path: os.PathLike[str]) -> dict[str, Any]:
    """What a process has measured."""
    import json

    with open(path, encoding="utf-8") as file:
        found: dict[str, Any] = json.load(file)
    return found


def judge_devices(found: Sequence[dict[str, Any]]) -> tuple[str, Figures]:
    first = found[0]
    typical = {name: statistics.median(one[name] for one in found) for name in ("matmul_tflops", "memory_gb_per_s")}
    figures = {**first, **typical, "ranks": list(found)}
    for rank, one in enumerate(found):
        if one["name"] != first["name"]:
            raise CheckFailedError(
                f"rank 0 has {first['name']}, rank {rank} {one['name']}", "ask the scheduler for one kind of GPU", figures
            )
        used = one["memory_gib"] - one["free_gib"]
        if used > 2:
            raise CheckFailedError(
                f"{used:.1f} GiB of rank {rank}'s {one['memory_gib']:.1f} GiB are taken by other processes",
                "nvidia-smi on that machine names them",
                figures,
            )
        for name, unit in (("matmul_tflops", "TFLOP/s"), ("memory_gb_per_s", "GB/s")):
            if first["kind"] == "cuda" and one[name] < 0.85 * typical[name]:
                raise CheckFailedError(
                    f"rank {rank} reaches {one[name]:,.0f} {unit}, half of them {typical[name]:,.0f}: all wait for it",
                    "look for throttling (nvidia-smi -q -d PERFORMANCE) or leave that machine out",
                    figures,
                )
    memory = f", {first['free_gib']:.0f} of {first['memory_gib']:.0f} GiB free" if first["kind"] == "cuda" else ""
    said = f"{len(found)} x {first['name']}{memory}: {typical['matmul_tflops']:,.3g} TFLOP/s {first['matmul_dtype']}"
    return f"{said}, memory {typical['memory_gb_per_s']:,.3g} GB/s", figures


CHECKS = (
    Check("versions", machine_versions, judge_versions),
    Check("clocks", clock, judge_clocks, here=lambda job: "there is one process" if job.world_size == 1 else None),
    Check("devices", devices, judge_devices),
)
