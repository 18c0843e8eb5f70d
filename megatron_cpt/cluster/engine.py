"""The engine by itself: its logits against transformers', and the speed of its layers against the plan."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from megatron_cpt.cluster.check import Check, CheckFailedError, Figures, succeeded
from megatron_cpt.cluster.job import ClusterJob
from megatron_cpt.cluster.machines import read_measured
from megatron_cpt.planning.measured import known_device, planned_rate
from megatron_cpt.platforms.cuda import has_transformer_engine

# Largest difference of a logit as a share of their standard deviation; relative difference of the loss.
ALLOWED = {"fp32": (1e-3, 1e-5), "bf16": (0.2, 5e-3)}
LEAST_OF_PLAN = 0.75
GIB_OF_8_LAYERS, GIB_OF_4_LAYERS = 75, 60


def has_te() -> bool:
    """Whether Transformer Engine is there for a GPU."""
    return torch.cuda.is_available() and has_transformer_engine()


def logits(job: ClusterJob, name: str, dtype: str, transformer_impl: str) -> dict[str, Any] | None:
    """Compare with transformers, in a process of its own."""
    target = job.folder / f"{name}.json"
    words = {"fp32": "float32", "bf16": "bfloat16"}
    command = [sys.executable, "-m", "megatron_cpt.cluster.measure_logits", str(job.folder), str(target)]
    ended = job.run(name, [*command, words[dtype], transformer_impl], 1, 120)
    if ended is None:
        return None
    succeeded(ended, job.rank)
    return read_measured(target) | {"dtype": dtype}


def judge_logits(found: Sequence[dict[str, Any] | None]) -> tuple[str, Figures]:
    one = found[0]
    assert one is not None
    logit = one["largest_difference"] / one["standard_deviation"]
    loss = abs(one["loss"] / one["loss_of_transformers"] - 1)
    most_logit, most_loss = ALLOWED[one["dtype"]]
    said = f"logits within {logit:.1e} of their spread, loss within {loss:.1e} of transformers' in fp32 ({one['layers']})"
    if not (logit <= most_logit and loss <= most_loss):
        raise CheckFailedError(
            f"{said}; expected {most_logit:g} and {most_loss:g}",
            "the kernels of this GPU or build compute something else",
            one,
        )
    return said, one


def stacks(job: ClusterJob) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and settings of measure_steps."""
    if not torch.cuda.is_available():
        batch = {"model": str(job.folder / "hf"), "layers": 4, "seq_length": 64, "micro_batch_size": 1, "microbatches": 2}
        yield "speed, 4 small layers", {**batch, "params_dtype": "fp32"}
        return
    gib = torch.cuda.get_device_properties(0).total_memory / 2**30
    model, layers = ("8B", 8) if gib > GIB_OF_8_LAYERS else ("8B", 4) if gib > GIB_OF_4_LAYERS else ("1B", 8)
    batch = {
        "model": model,
        "layers": layers,
        "seq_length": 4096,
        "micro_batch_size": 1,
        "microbatches": 8,
        "params_dtype": "bf16",
    }
    shape = f"{layers} layers of {model}"
    yield f"speed, {shape}", {**batch, "transformer_impl": "local"}
    if has_te():
        yield f"speed, {shape}, Transformer Engine", {**batch, "transformer_impl": "transformer_engine"}
        yield f"speed, {shape}, FP8", {**batch, "transformer_impl": "transformer_engine", "fp8": "hybrid"}


def measure_speed(job: ClusterJob, name: str, settings: dict[str, Any]) -> dict[str, Any] | None:
    """Train such layers on all devices."""
    key = name.replace(" ", "_").replace(",", "")
    target = job.folder / f"{key}.json"
    command = [sys.executable, "-m", "megatron_cpt.cluster.measure_steps", str(target), json.dumps(settings)]
    ended = job.run(key, command, job.world_size, 180)
    succeeded(ended, job.rank)
    return read_measured(target) if job.is_rank_zero else None


def judge_speed(job: ClusterJob, settings: dict[str, Any], found: Sequence[dict[str, Any] | None]) -> tuple[str, Figures]:
    one = found[0]
    assert one is not None
    rate = one["tokens_per_second_per_device"]
    planned = planned_throughput(job, settings)
    figures = one | {"settings": settings, "planned_tokens_per_second_per_device": planned}
    if planned is None:
        return f"{rate:,.0f} tokens/s for each device; the plan does not know this device", figures
    said = f"{rate:,.0f} tokens/s for each device, {rate / planned:.0%} of the plan's {planned:,.0f}"
    if rate < LEAST_OF_PLAN * planned:
        raise CheckFailedError(said, "compare `devices` and `links` with the hardware's data sheet", figures)
    return said, figures


def planned_throughput(job: ClusterJob, settings: dict[str, Any]) -> float | None:
    """What the planner expects, tokens per second of each device; None: it does not know the device."""
    known = known_device(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    return None if known is None else planned_rate(settings, known, job.world_size)


def no_te(job: ClusterJob) -> str | None:
    """Why its layers cannot be tried."""
    return None if has_te() else "needs a GPU and Transformer Engine"


def engine_checks(job: ClusterJob) -> list[Check]:
    """Logits, then speed."""
    found = [
        Check(
            "logits",
            functools.partial(logits, name="logits", dtype="fp32", transformer_impl="local"),
            judge_logits,
            ["inputs"],
        ),
        Check(
            "logits, Transformer Engine",
            functools.partial(logits, name="logits_te", dtype="bf16", transformer_impl="transformer_engine"),
            judge_logits,
            ["inputs"],
            no_te,
        ),
    ]
    for name, settings in stacks(job):
        measure = functools.partial(measure_speed, name=name, settings=settings)
        found.append(Check(name, measure, functools.partial(judge_speed, job, settings), ["inputs"]))
    return found
