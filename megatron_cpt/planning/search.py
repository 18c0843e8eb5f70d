"""All layouts of a job on a cluster: which fit, how fast they are, and why the others do not."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_cpt.config.parallel import ParallelConfig
from megatron_cpt.errors import InputError
from megatron_cpt.planning.config import PlanConfig
from megatron_cpt.planning.hardware import Cluster, find_device
from megatron_cpt.planning.layouts import Job, Layout, check, layers_of_uneven_first_stage
from megatron_cpt.planning.memory import GIB, Memory, fullest
from megatron_cpt.planning.presets import find_model
from megatron_cpt.planning.timing import Throughput, throughput

NEARLY = 0.98


@dataclass(frozen=True)
class Candidate:
    """A layout with what it needs and what it gives."""

    layout: Layout
    memory: Memory
    throughput: Throughput

    def days(self, tokens: float) -> float:
        return tokens / self.throughput.tokens_per_second / 86400


@dataclass(frozen=True)
class Plan:
    """Attributes:
    feasible: fastest first; for each TP x PP x DP x micro-batch the best interleaving and recomputation
    infeasible: (layouts, reason), reasons with numbers
    """

    config: PlanConfig
    job: Job
    cluster: Cluster
    feasible: list[Candidate]
    infeasible: list[tuple[str, str]]


def plan(config: PlanConfig) -> Plan:
    """Try every layout.

    Raises:
        InputError: a model or device that does not exist, or nothing to try
    """
    job, cluster = make_job(config), make_cluster(config)
    check(Job(job.llama, job.seq_length, 1), Layout(ParallelConfig(), 1, 1, 1))  # a sequence that no layout can have
    feasible: list[Candidate] = []
    refused: dict[str, str] = {}  # reason -> layouts
    too_big: dict[str, str] = {}  # layouts -> reason: the smallest micro-batch that does not fit
    for tensor, pipeline in sizes(config, job, cluster, refused):
        data = config.devices // (tensor * pipeline)
        name = f"TP{tensor} PP{pipeline} DP{data}"
        for micro_batch in micro_batches(config, data, name, refused):
            variants = [
                make_candidate(config, job, cluster, layout)
                for layout in layouts(config, job, tensor, pipeline, data, micro_batch, refused)
            ]
            fitting = [v for v in variants if v.memory.total <= cluster.device.memory_gib * GIB]
            if fitting:
                feasible.append(simplest_of_fastest(fitting))
            elif variants and not any(layout.startswith(f"{name} ") for layout in too_big):
                too_big[f"{name} MB{micro_batch}+"] = too_big_because(variants, cluster)
    feasible.sort(key=lambda candidate: -candidate.throughput.tokens_per_second)
    infeasible = [(layouts_, reason) for reason, layouts_ in refused.items()] + list(too_big.items())
    return Plan(config, job, cluster, feasible, infeasible)


def simplest_of_fastest(candidates: list[Candidate]) -> Candidate:
    """Of those nearly as fast as the fastest, the one with the fewest model chunks, and of these the fastest.

    Every chunk more adds messages between stages, whose price at small sizes no formula here knows.
    """
    fastest = max(candidate.throughput.tokens_per_second for candidate in candidates)
    near = [candidate for candidate in candidates if candidate.throughput.tokens_per_second >= NEARLY * fastest]
    return min(near, key=lambda candidate: (candidate.layout.virtual, -candidate.throughput.tokens_per_second))


def make_job(config: PlanConfig) -> Job:
    return Job(find_model(config.model), config.seq_length, config.global_batch_size, config.params_dtype, config.fp8)


def make_cluster(config: PlanConfig) -> Cluster:
    device = find_device(
        config.device,
        memory_gib=config.memory_gib,
        bf16_tflops=config.bf16_tflops,
        fp8_tflops=config.fp8_tflops,
        memory_gb_per_s=config.memory_gb_per_s,
        nvlink_gb_per_s=config.nvlink_gb_per_s,
        network_gb_per_s=config.network_gb_per_s,
        devices_per_node=config.devices_per_node,
        matmul_efficiency=config.matmul_efficiency,
        fp8_efficiency=config.fp8_efficiency,
    )
    if config.fp8 and not (device.fp8_tflops and device.fp8_efficiency):
        raise InputError(f"fp8 is true but device {device.name} has no FP8 units; expected h100, h200 or b200")
    return Cluster(device, config.devices)


def sizes(config: PlanConfig, job: Job, cluster: Cluster, refused: dict[str, str]) -> Iterator[tuple[int, int]]:
    """Tensor- and pipeline-parallel sizes that divide the devices and the model."""
    most = min(2 * cluster.device.devices_per_node, config.devices)
    tensors = [config.tensor_model_parallel_size] if config.tensor_model_parallel_size else powers_of_two(most)
    for tensor in tensors:
        if config.devices % tensor:
            refuse(refused, f"{config.devices} devices are not divisible by {tensor}", f"TP{tensor}")
            continue
        for pipeline in pipeline_sizes(config, job, tensor):
            if config.devices % (tensor * pipeline):
                reason = f"{config.devices} devices are not divisible by {tensor} x {pipeline}"
                refuse(refused, reason, f"TP{tensor} PP{pipeline}")
                continue
            parallel = make_parallel(config, job, tensor, pipeline, 1, None)
            layers = job.llama.num_hidden_layers
            if layers % pipeline and parallel.num_layers_in_first_pipeline_stage is None:
                most = -(-layers // pipeline)
                reason = f"{layers} layers are too few for {pipeline} stages: {most} in each but the first leave it none"
                refuse(refused, reason, f"PP{pipeline}")
                continue
            try:
                check(Job(job.llama, job.seq_length, 1), Layout(parallel, 1, 1, 1))
            except InputError as error:
                at_fault = f"TP{tensor}" if "tensor_model_parallel_size" in str(error) else f"PP{pipeline}"
                refuse(refused, str(error), at_fault)
                continue
            yield tensor, pipeline


def refuse(refused: dict[str, str], reason: str, layouts: str) -> None:
    """Note why layouts are not possible, beside those that are not for the same reason."""
    known = refused.get(reason, "")
    if layouts not in known.split(", "):
        refused[reason] = f"{known}, {layouts}" if known else layouts


def powers_of_two(most: int) -> list[int]:
    return [2**i for i in range(most.bit_length())]


def pipeline_sizes(config: PlanConfig, job: Job, tensor: int) -> list[int]:
    if config.pipeline_model_parallel_size:
        return [config.pipeline_model_parallel_size]
    rest = max(config.devices // tensor, 1)
    return [size for size in range(1, min(rest, job.llama.num_hidden_layers) + 1) if rest % size == 0]


def micro_batches(config: PlanConfig, data: int, name: str, refused: dict[str, str]) -> list[int]:
    """Micro-batch sizes that share the global batch evenly."""
    batch = config.global_batch_size
    if batch % (data * (config.micro_batch_size or 1)):
        micro = f" x micro_batch_size {config.micro_batch_size}" if config.micro_batch_size else ""
        refuse(refused, f"global_batch_size {batch} is not divisible by data-parallel size {data}{micro}", name)
        return []
    if config.micro_batch_size:
        return [config.micro_batch_size]
    return [size for size in powers_of_two(batch // data) if (batch // data) % size == 0]


def layouts(
    config: PlanConfig, job: Job, tensor: int, pipeline: int, data: int, micro_batch: int, refused: dict[str, str]
) -> Iterator[Layout]:
    """The ways to interleave and to recompute."""
    microbatches = config.global_batch_size // (data * micro_batch)
    asked = config.virtual_pipeline_model_parallel_size
    layers = -(-job.llama.num_hidden_layers // pipeline)
    chunks = [asked] if asked else [v for v in range(1, layers + 1) if layers % v == 0] if pipeline > 1 else [1]
    granularities = [config.recompute_granularity] if config.recompute_granularity else ["none", "selective", "full"]
    for virtual in chunks:
        if virtual > 1 and pipeline == 1:
            refuse(refused, "virtual_pipeline_model_parallel_size needs pipeline_model_parallel_size 2 or more", "PP1")
            continue
        for granularity in granularities:
            parallel = make_parallel(config, job, tensor, pipeline, virtual, granularity)
            layout = Layout(parallel, data, micro_batch, microbatches)
            try:
                check(job, layout)
            except InputError as error:
                if asked:
                    refuse(refused, str(error), f"TP{tensor} PP{pipeline} DP{data} MB{micro_batch}")
                continue
            yield layout


def make_parallel(
    config: PlanConfig, job: Job, tensor: int, pipeline: int, virtual: int, granularity: str | None
) -> ParallelConfig:
    return ParallelConfig(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        num_layers_in_first_pipeline_stage=layers_of_uneven_first_stage(job.llama.num_hidden_layers, pipeline),
        sequence_parallel=config.sequence_parallel and tensor > 1,
        overlap_grad_reduce=config.overlap_grad_reduce,
        overlap_param_gather=config.overlap_param_gather,
        tp_comm_overlap=config.tp_comm_overlap and config.sequence_parallel and tensor > 1,
        recompute_granularity=granularity if granularity in ("selective", "full") else None,  # type: ignore[arg-type]
        recompute_modules=(config.recompute_modules or ["mlp"]) if granularity == "selective" else None,
    )


def make_candidate(config: PlanConfig, job: Job, cluster: Cluster, layout: Layout) -> Candidate:
    memory = fullest(job, layout, config.overhead_gib, config.fragmentation)
    return Candidate(layout, memory, throughput(job, layout, cluster))


def too_big_because(variants: list[Candidate], cluster: Cluster) -> str:
    """Of the variant that needs least: what it needs, and what there is."""
    least = min(variants, key=lambda v: v.memory.total)
    memory = least.memory
    state = memory.weights + memory.gradients + memory.optimizer + memory.fp8_weights
    activations = sum(memory.activations.values())
    needed, there = math.ceil(10 * memory.total / GIB) / 10, math.floor(10 * cluster.device.memory_gib) / 10
    return (
        f"{needed:.1f} GiB of {there:.1f} GiB with {recomputation(least.layout)}: {state / GIB:.1f} state, "
        f"{activations / GIB:.1f} activations, {(memory.total - state - activations) / GIB:.1f} other"
    )


def recomputation(layout: Layout) -> str:
    """What is computed again, in a word."""
    parallel = layout.parallel
    if parallel.recompute_granularity == "selective":
        return "+".join(parallel.recompute_modules or ["core_attn"]) + " recomputed"
    return "all recomputed" if parallel.recompute_granularity == "full" else "nothing recomputed"
