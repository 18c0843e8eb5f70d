"""What the command does: a plan, or one rank of it simulated."""

from __future__ import annotations

import dataclasses
import sys
from typing import TYPE_CHECKING, Any

from rich.console import Console

from megatron_cpt.model.flops import flops_per_token
from megatron_cpt.planning.activations import chunk_bytes
from megatron_cpt.planning.config import PlanConfig
from megatron_cpt.planning.layouts import Layout, TrainingJob, check_job, chunks_of_stage
from megatron_cpt.planning.measured import with_measured
from megatron_cpt.planning.one_run import plan_one, read_planned_run
from megatron_cpt.planning.report import plan_json, show_plan, write_plan_json
from megatron_cpt.planning.run_files import check_place
from megatron_cpt.planning.search import Size, make_job, make_parallel, plan_layouts
from megatron_cpt.planning.weights import state_bytes
from megatron_cpt.planning.write import write_layout
from megatron_cpt.utils.console import wide_console
from megatron_cpt.utils.errors import InputError, RunError
from megatron_cpt.utils.tables import PlainTable, number_column, text_column

if TYPE_CHECKING:
    from megatron_cpt.planning.simulate import Simulation


def run_plan(config: PlanConfig) -> str | None:
    """Print a plan or a simulation; returns the path of the file that is asked for: a layout's, else the JSON.

    Raises:
        RunError: no layout fits; what is needed has been printed
    """
    for name in ("json", "write"):
        check_place(name, getattr(config, name))
    console = wide_console(sys.stdout)
    asked = read_planned_run(config) if config.run is not None else None
    config = with_measured(asked.config if asked else config)
    asked = None if asked is None else dataclasses.replace(asked, config=config)
    if config.simulate is not None:
        content = run_simulation(config, config.simulate, console, asked.layout if asked else None)
    else:
        result = plan_one(asked) if asked else plan_layouts(config)
        show_plan(result, console)
        content = plan_json(result)
    if config.json is not None:
        write_plan_json(config.json, content)
    if config.simulate is None and not content["layouts"]:
        raise RunError(f"no layout of {config.model} fits {config.devices} x {config.device}")
    if config.write is not None:
        write_layout(config.write, result, config.row)
    return config.write or config.json


def simulated_layout(config: PlanConfig, job: TrainingJob) -> Layout:
    """The layout that the configuration names.

    Raises:
        InputError: the job cannot be spread this way
    """
    tensor, pipeline = config.tensor_model_parallel_size or 1, config.pipeline_model_parallel_size or 1
    if config.devices % (tensor * pipeline):
        raise InputError(f"{config.devices} devices are not divisible by {tensor} x {pipeline}")
    data, micro_batch = config.devices // (tensor * pipeline), config.micro_batch_size or 1
    virtual = config.virtual_pipeline_model_parallel_size or 1
    parallel = make_parallel(config, job, Size(tensor, pipeline, 1, data), virtual, config.recompute_granularity)
    layout = Layout(parallel, data, micro_batch, config.global_batch_size // (data * micro_batch))
    check_job(job, layout)
    return layout


def run_simulation(config: PlanConfig, rank: int, console: Console, layout: Layout | None = None) -> dict[str, Any]:
    """Simulate a rank and print it beside the plan's numbers. `layout`: default, the one that the configuration names."""
    if (config.context_parallel_size or 1) > 1:
        size = config.context_parallel_size
        raise InputError(f"context_parallel_size is {size} with simulate, which has torch's layers; expected 1")
    job = dataclasses.replace(make_job(config), fp8=False, transformer_impl="local")
    layout = layout or simulated_layout(config, job)
    from megatron_cpt.planning.simulate import simulate  # imports torch and megatron, which takes seconds

    result = simulate(job, layout, rank)
    console.print(
        f"{config.model}, rank {rank} of {layout.devices}: tensor rank {result.tensor_rank} of {layout.tensor}, pipeline "
        f"rank {result.pipeline_rank} of {layout.pipeline}, data rank {result.data_rank} of {layout.data_parallel_size}; "
        f"micro batch {layout.micro_batch_size} x {job.seq_length} tokens",
        highlight=False,
    )
    console.print(simulation_table(job, layout, result))
    console.print(traffic_table(result))
    fields = {f.name: getattr(result, f.name) for f in dataclasses.fields(result)}
    for name in ("microbatch_traffic", "step_traffic"):
        fields[name] = [
            {"kind": kind, "group_size": size} | dataclasses.asdict(traffic)
            for (kind, size), traffic in fields[name].items()
        ]
    return {"config": dataclasses.asdict(config), "simulation": fields}


def planned_flops(job: TrainingJob, layout: Layout, stage: int) -> float:
    """Of one micro-batch on one rank of a stage, recomputation left out: its share of `flops_per_token`."""
    llama, tokens = job.llama, layout.micro_batch_size * job.seq_length
    layers = sum(chunk.layers for chunk in chunks_of_stage(llama, layout, stage))
    without_output = dataclasses.replace(llama, vocab_size=0)
    flops = flops_per_token(without_output, job.seq_length, causal=False) * layers / llama.num_hidden_layers
    if stage == layout.pipeline - 1:
        flops += 6.0 * llama.hidden_size * llama.padded_vocab_size(layout.tensor)
    return flops * tokens / layout.tensor


def simulation_table(job: TrainingJob, layout: Layout, result: Simulation) -> PlainTable:
    """Simulated and planned, side by side."""
    stage = result.pipeline_rank
    state = state_bytes(job, layout, stage, result.data_rank)
    activations = sum(sum(chunk_bytes(job, layout, chunk).values()) for chunk in chunks_of_stage(job.llama, layout, stage))
    table = PlainTable(text_column(), number_column("simulated"), number_column("planned"))
    rows: list[tuple[str, float, float]] = [
        ("parameters", result.parameters, state.parameters),
        ("weights, bytes", result.weights, state.weights),
        ("gradients, bytes", result.gradients, state.gradients),
        ("optimizer states, bytes", result.optimizer, state.optimizer),
        ("activations of a micro-batch, bytes", result.activations, activations),
        ("FLOPs of a micro-batch", result.flops, planned_flops(job, layout, stage)),
    ]
    for name, simulated, planned in rows:
        table.add_row(name, f"{simulated:,.0f}", f"{planned:,.0f}")
    return table


def traffic_table(result: Simulation) -> PlainTable:
    """Collectives of one micro-batch and of the end of a step."""
    texts = (text_column(heading, no_wrap=True) for heading in ("collectives", "kind"))
    table = PlainTable(*texts, *map(number_column, ("ranks", "number", "bytes")))
    for when, traffics in (("of a micro-batch", result.microbatch_traffic), ("of a step's end", result.step_traffic)):
        for (kind, size), traffic in sorted(traffics.items()):
            table.add_row(when, kind, str(size), f"{traffic.count:,}", f"{traffic.bytes:,}")
    return table
