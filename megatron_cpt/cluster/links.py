"""Bandwidth between the devices: within a machine and across machines."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from megatron_cpt.cluster.check import Check, CheckFailedError, Figures, succeeded
from megatron_cpt.cluster.job import ClusterJob
from megatron_cpt.cluster.machines import read_measured

ADVICE = (
    "NCCL_DEBUG=INFO in the environment has NCCL say which links it takes; look for NCCL_IB_DISABLE, NCCL_P2P_DISABLE and "
    "NCCL_SOCKET_IFNAME, and for missing peer access (nvidia-smi topo -m)"
)


def exchange(job: ClusterJob) -> dict[str, Any]:
    """All-reduce, all-gather and sends between neighbours, in processes of their own."""
    command = [
        sys.executable,
        "-m",
        "megatron_cpt.cluster.measure_links",
        str(job.folder / "links"),
        str(job.devices_per_node),
    ]
    ended = job.run("links", command, job.world_size, 180)
    succeeded(ended, job.rank, ADVICE)
    return read_measured(job.folder / f"links.{job.rank}.json")


def judge_links(found: Sequence[dict[str, Any]]) -> tuple[str, Figures]:
    wrong = [rank for rank, one in enumerate(found) if not one["right"]]
    names = [name for name in found[0] if name != "right"]
    slowest = {name: min(one[name] for one in found) for name in names}
    figures = {**slowest, "ranks": list(found)}
    if wrong:
        raise CheckFailedError(
            f"sums are wrong on rank {wrong[0]}" + f" and {len(wrong) - 1} more" * (len(wrong) > 1), ADVICE, figures
        )
    words = (f"{name.removesuffix('_gb_per_s').replace('_', ' ')} {value:,.3g}" for name, value in slowest.items())
    return f"{', '.join(words)} GB/s", figures


CHECKS = (Check("links", exchange, judge_links, here=lambda job: "there is one process" if job.world_size == 1 else None),)
