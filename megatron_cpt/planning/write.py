"""A layout of a plan as a part of the configuration of a run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import yaml

from megatron_cpt.config.parallel import ParallelConfig
from megatron_cpt.planning.search import Candidate, LayoutPlan
from megatron_cpt.utils.errors import InputError
from megatron_cpt.utils.files import atomic_file


def write_layout(path: str, plan: LayoutPlan, row: int) -> None:
    """Write the layout in this row of the table (from 1), for `pretrain_cpt.py --config RUN --config PATH`.

    Raises:
        InputError: there is no such row
    """
    if row > len(plan.feasible):
        raise InputError(f"row is {row}; expected 1 to {len(plan.feasible)}, the layouts that fit")
    candidate = plan.feasible[row - 1]
    text = yaml.safe_dump(settings_of_run(candidate, plan), sort_keys=False)
    with atomic_file(Path(path)) as file:
        file.write((heading(candidate, plan) + text).encode())


def heading(candidate: Candidate, plan: LayoutPlan) -> str:
    """What the layout was planned for, as comments."""
    config, tight = plan.config, ", tight" if candidate.tight else ""
    return (
        f"# plan_run.py: {config.model} on {config.devices} x {plan.cluster.device.name}, samples of {config.seq_length} "
        "tokens (seq_length of the mixture)\n"
        f"# estimated: {candidate.memory.total / 2**30:.1f} GiB of {plan.cluster.device.memory_gib:g}{tight}; "
        f"{candidate.throughput.tokens_per_second_per_device:,.0f} tokens/s of each device\n"
    )


def settings_of_run(candidate: Candidate, plan: LayoutPlan) -> dict[str, dict[str, Any]]:
    """Sections of the configuration of a run. `parallel` has every size, and what else is not as by default."""
    layout, config = candidate.layout, plan.config
    unset = dataclasses.asdict(ParallelConfig())
    parallel = {
        name: value
        for name, value in dataclasses.asdict(layout.parallel).items()
        if value != unset[name] or name in ("tensor_model_parallel_size", "pipeline_model_parallel_size")
    }
    training: dict[str, Any] = {
        "micro_batch_size": layout.micro_batch_size,
        "global_batch_size": config.global_batch_size,
        "params_dtype": config.params_dtype,
    }
    if config.fp8:
        training["fp8"] = "hybrid"
    if config.transformer_impl is not None:
        training["transformer_impl"] = config.transformer_impl
    return {"parallel": parallel, "training": training}
