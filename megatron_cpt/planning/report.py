"""A plan for people (a table as wide as the terminal) and for programs (JSON)."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

from rich.console import Console

from megatron_cpt.config.parallel import ParallelConfig
from megatron_cpt.planning.hardware import ATTENTION_EFFICIENCY, LINK_EFFICIENCY
from megatron_cpt.planning.layouts import Layout, ModelChunk
from megatron_cpt.planning.memory import GIB
from megatron_cpt.planning.search import TIGHT, Candidate, LayoutPlan, recomputation
from megatron_cpt.planning.weights import Parameter, parameters_of_chunk
from megatron_cpt.utils.tables import PlainTable, number_column, text_column

# Heading, what to print, from which width of the terminal on.
Column = tuple[str, Callable[[Candidate, LayoutPlan], str], int]


def gib(size: float) -> str:
    return f"{size / GIB:.1f}"


def seconds(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"


def pipeline_name(candidate: Candidate) -> str:
    """Stages, with x chunks under the interleaved schedule, and the layers of a first stage that is shorter."""
    layout = candidate.layout
    first = layout.parallel.num_layers_in_first_pipeline_stage
    name = f"{layout.pipeline}x{layout.virtual}" if layout.virtual > 1 else str(layout.pipeline)
    return name if first is None else f"{name}:{first}"


COLUMNS: list[Column] = [
    ("TP", lambda c, p: str(c.layout.tensor), 0),
    ("PPxVP", lambda c, p: pipeline_name(c), 0),
    ("CP", lambda c, p: str(c.layout.context), 0),
    ("DP", lambda c, p: str(c.layout.data_parallel_size), 0),
    ("MB", lambda c, p: str(c.layout.micro_batch_size), 0),
    ("again", lambda c, p: recomputation(c.layout).split()[0].replace("nothing", "-"), 0),
    ("GiB", lambda c, p: gib(c.memory.total) + ("!" if c.tight else ""), 0),
    ("weights", lambda c, p: gib(c.memory.weights + c.memory.fp8_weights), 120),
    ("grads", lambda c, p: gib(c.memory.gradients), 120),
    ("optim", lambda c, p: gib(c.memory.optimizer), 120),
    ("activ", lambda c, p: gib(sum(c.memory.activations.values())), 120),
    ("work", lambda c, p: gib(c.memory.working), 160),
    ("other", lambda c, p: gib(c.memory.overhead), 160),
    ("bubble", lambda c, p: f"{c.throughput.bubble:.1%}", 0),
    ("step s", lambda c, p: seconds(c.throughput.step.total), 0),
    ("compute", lambda c, p: seconds(c.throughput.step.compute), 160),
    ("TP comm", lambda c, p: seconds(c.throughput.step.tensor_parallel), 160),
    ("CP comm", lambda c, p: seconds(c.throughput.step.context_parallel), 160),
    ("PP comm", lambda c, p: seconds(c.throughput.step.pipeline), 160),
    ("DP comm", lambda c, p: seconds(c.throughput.step.data_parallel), 160),
    ("tok/s", lambda c, p: f"{c.throughput.tokens_per_second:,.0f}", 120),
    ("/device", lambda c, p: f"{c.throughput.tokens_per_second_per_device:,.0f}", 0),
    ("MFU", lambda c, p: f"{c.throughput.mfu:.1%}", 0),
    ("causal", lambda c, p: f"{c.throughput.mfu_causal:.1%}", 0),
    ("days", lambda c, p: f"{c.days(p.config.tokens):,.1f}", 0),
]


DISPENSABLE = ("tok/s", "causal", "bubble", "step s", "again", "days")  # where long numbers make the table too wide


def show_plan(plan: LayoutPlan, console: Console) -> None:
    """Header, the fastest layouts, and why others do not do."""
    for line in header(plan):
        console.print(line, highlight=False)
    console.print()
    if plan.feasible:
        console.print(layouts_table(plan, plan.feasible[: plan.config.top], console.width))
        rest = len(plan.feasible) - plan.config.top
        if rest > 0:
            console.print(f"and {rest} more layouts (--top {len(plan.feasible)} shows all)", highlight=False)
        console.print(LEGEND, highlight=False)
        if any(candidate.tight for candidate in plan.feasible[: plan.config.top]):
            console.print(TIGHT_LEGEND, highlight=False)
    else:
        console.print("No layout fits.", highlight=False)
    if plan.compared:
        console.print(f"\n{COMPARED_LEGEND}", highlight=False)
        console.print(layouts_table(plan, plan.compared, console.width))
    if plan.infeasible:
        console.print()
        console.print(infeasible_table(plan))
        if len(plan.infeasible) > REFUSED_SHOWN:
            console.print(f"and {len(plan.infeasible) - REFUSED_SHOWN} more (--json FILE has all)", highlight=False)
        if any("MB" in layouts for layouts, _ in plan.infeasible):
            console.print(INFEASIBLE_LEGEND, highlight=False)


LEGEND = (
    "TP, PP, CP, DP: tensor, pipeline, context, data parallel; VP: model chunks per stage (8:14: 8 stages, 14 layers in "
    "the first); MB: micro batch; again: recomputed in the backward pass; GiB: of the fullest rank; /device: tokens/s; "
    "MFU: of the "
    "dense bf16 peak, with all of attention; causal: with half of it."
)
COMPARED_LEGEND = "To compare with, not ours (no run here has it): FSDP over CP x FSDP devices"
REFUSED_SHOWN = 15
TIGHT_LEGEND = f"!: needs more than {TIGHT:.0%} of the memory, so it may not fit; listed after the others."
INFEASIBLE_LEGEND = "MB8+: with that micro batch and larger ones; state: weights, gradients, optimizer."


def header(plan: LayoutPlan) -> list[str]:
    """Model, cluster, and what is assumed."""
    job, device, config = plan.job, plan.cluster.device, plan.config
    chunk = ModelChunk(job.llama.num_hidden_layers, True, True)
    parameters: tuple[Parameter, ...] = parameters_of_chunk(job.llama, 1, 1, chunk)
    peak = f"{device.fp8_tflops:g} TFLOP/s FP8" if job.fp8 else f"{device.bf16_tflops:g} TFLOP/s bf16"
    efficiency = device.fp8_efficiency if job.fp8 else device.matmul_efficiency
    overlapped = [
        name
        for name, on in (
            ("gradient reduction", config.overlap_grad_reduce),
            ("parameter gathering", config.overlap_param_gather),
            ("tensor-parallel communication", config.tp_comm_overlap),
        )
        if on
    ]
    source = "Assumed" if config.measured is None else f"Measured ({config.measured}) or assumed"
    return [
        f"{config.model}: {sum(p.elements for p in parameters) / 1e9:.2f} B parameters in {job.params_dtype}; sequence "
        f"{job.seq_length:,}, global batch {job.global_batch_size:,}; {config.tokens / 1e9:,.6g} B tokens",
        f"{config.devices} x {device.name}: {device.memory_gib:g} GiB, {peak}; {device.devices_per_node} per node",
        f"NVLink {device.nvlink_gb_per_s:g} GB/s, network {device.network_gb_per_s:g} GB/s per device",
        f"{source}: matrix products reach {efficiency:.0%} of the peak, attention {ATTENTION_EFFICIENCY:.0%} of that, links "
        f"{LINK_EFFICIENCY:.0%}; overlapped: {', '.join(overlapped) or 'nothing'}; distributed optimizer, "
        f"{'bf16' if config.grad_reduce_in_bf16 else 'fp32'} gradients; {layers_of(plan)} layers; "
        f"{config.overhead_gib:g} GiB for CUDA and NCCL, {config.fragmentation:.0%} of activations for fragmentation",
    ]


def layers_of(plan: LayoutPlan) -> str:
    """Whose layers are planned."""
    if plan.job.has_transformer_engine(Layout(ParallelConfig(), 1, 1, 1)):
        return "Transformer Engine's"
    with_context = any(candidate.layout.context > 1 for candidate in plan.feasible)
    return "torch's, with context parallelism Transformer Engine's," if with_context else "torch's"


def layouts_table(plan: LayoutPlan, candidates: list[Candidate], width: int) -> PlainTable:
    """One row for each of our layouts, numbered as `--row` counts them, or for each of FSDP's."""
    columns = layout_columns(plan, candidates, width)
    while table_width(columns) > width and (name := next((name for name in DISPENSABLE if name in columns), None)):
        del columns[name]
    table = PlainTable(*map(number_column, columns))
    for row in zip(*columns.values(), strict=True):
        table.add_row(*row)
    return table


def layout_columns(plan: LayoutPlan, candidates: list[Candidate], width: int) -> dict[str, list[str]]:
    """Heading -> cells. Without context parallelism none is about it; FSDP has no rows to choose from, and no pipeline."""
    sharded = candidates[0].layout.fully_sharded
    left_out = {"#", "PPxVP", "PP comm"} if sharded else set[str]()
    if all(candidate.layout.context == 1 for candidate in candidates):
        left_out |= {"CP", "CP comm"}
    order = [str(number) for number in range(1, len(candidates) + 1)]
    columns = {"#": order} | {
        heading: [cell(candidate, plan) for candidate in candidates] for heading, cell, least in COLUMNS if width >= least
    }
    names = {"DP": "FSDP"} if sharded else {}
    return {names.get(heading, heading): found for heading, found in columns.items() if heading not in left_out}


def table_width(columns: dict[str, list[str]]) -> int:
    """Of a table without lines, whose columns stand two apart."""
    return sum(max(map(len, (heading, *found))) + 2 for heading, found in columns.items()) - 2


def infeasible_table(plan: LayoutPlan) -> PlainTable:
    table = PlainTable(text_column("not", max_width=30), text_column("because"))
    for layouts, reason in plan.infeasible[:REFUSED_SHOWN]:
        table.add_row(layouts, reason)
    return table


def plan_json(plan: LayoutPlan) -> dict[str, Any]:
    """Everything, in bytes and seconds."""
    return {
        "config": dataclasses.asdict(plan.config),
        "model": dataclasses.asdict(plan.job.llama),
        "device": dataclasses.asdict(plan.cluster.device),
        "layouts": [candidate_json(candidate, plan) for candidate in plan.feasible],
        "compared": [candidate_json(candidate, plan) for candidate in plan.compared],
        "infeasible": [{"layouts": layouts, "reason": reason} for layouts, reason in plan.infeasible],
    }


def candidate_json(candidate: Candidate, plan: LayoutPlan) -> dict[str, Any]:
    layout, result = candidate.layout, candidate.throughput
    return {
        "parallel": dataclasses.asdict(layout.parallel),
        "data_parallel_size": layout.data_parallel_size,
        "micro_batch_size": layout.micro_batch_size,
        "num_microbatches": layout.num_microbatches,
        "fully_sharded": layout.fully_sharded,
        "tight": candidate.tight,
        "memory_bytes": dataclasses.asdict(candidate.memory) | {"total": candidate.memory.total},
        "step_seconds": dataclasses.asdict(result.step) | {"total": result.step.total},
        "tokens_per_second": result.tokens_per_second,
        "tokens_per_second_per_device": result.tokens_per_second_per_device,
        "mfu": result.mfu,
        "mfu_causal": result.mfu_causal,
        "bubble": result.bubble,
        "days": candidate.days(plan.config.tokens),
    }


def write_plan_json(path: str, content: dict[str, Any]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2)
        file.write("\n")
