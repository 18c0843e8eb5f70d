"""All layouts of a job on a cluster: which fit, how fast they are, and why the others do not."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from megatron_cpt.config.parallel import ParallelConfig
from megatron_cpt.planning.config import PlanConfig
from megatron_cpt.planning.hardware import Cluster, find_device
from megatron_cpt.planning.layouts import Layout, TrainingJob, check_job, layers_of_uneven_first_stage
from megatron_cpt.planning.memory import GIB, Memory, fullest
from megatron_cpt.planning.presets import find_model
from megatron_cpt.planning.timing import Throughput, layout_throughput
from megatron_cpt.utils.errors import InputError

NEARLY = 0.98
TIGHT = 0.95  # of a device's memory: what the plan does not know may be more than what is left
LEAST_TOKENS = 8192  # of a sample on each of the devices that share it, where nobody asks for a context-parallel size
COMPARED = 3


@dataclass(frozen=True)
class Candidate:
    """A layout with what it needs and what it gives; `tight`: it hardly fits (TIGHT)."""

    layout: Layout
    memory: Memory
    throughput: Throughput
    tight: bool = False

    def days(self, tokens: float) -> float:
        return tokens / self.throughput.tokens_per_second / 86400


@dataclass(frozen=True)
class LayoutPlan:
    """Attributes:
    feasible: fastest first, tight ones after the others; for each TP x PP x CP x DP x micro-batch the best interleaving and
        recomputation, and a faster tight one
    infeasible: (layouts, reason), reasons with numbers
    compared: the fastest of FSDP, which are no layouts of ours
    """

    config: PlanConfig
    job: TrainingJob
    cluster: Cluster
    feasible: list[Candidate]
    infeasible: list[tuple[str, str]]
    compared: list[Candidate] = field(default_factory=list)


def plan_layouts(config: PlanConfig) -> LayoutPlan:
    """Try every layout.

    Raises:
        InputError: a model or device that does not exist, or nothing to try
    """
    job, cluster = make_job(config), make_cluster(config)
    check_possible(config, job)
    feasible: list[Candidate] = []
    refused: dict[str, str] = {}  # reason -> layouts
    too_big: dict[str, str] = {}  # layouts -> reason: the smallest micro-batch that does not fit
    for size in parallel_sizes(config, job, cluster, refused):
        for micro_batch in micro_batches(config, size, refused):
            variants = [
                make_candidate(config, job, cluster, layout)
                for layout in interleavings(config, job, size, micro_batch, refused)
            ]
            fitting = [v for v in variants if fits(v, cluster)]
            feasible += worth_showing(fitting)
            if variants and not fitting and not any(layout.startswith(f"{size} ") for layout in too_big):
                too_big[f"{size} MB{micro_batch}+"] = too_big_because(variants, cluster)
    infeasible = [(layouts_, reason) for reason, layouts_ in refused.items()] + list(too_big.items())
    return LayoutPlan(config, job, cluster, in_order(feasible), infeasible, fully_sharded(config, job, cluster)[:COMPARED])


def check_possible(config: PlanConfig, job: TrainingJob) -> None:
    """Raise InputError for what no layout can have: the sequence, or what the layers cannot do."""
    parallel = ParallelConfig(
        context_parallel_size=config.context_parallel_size or 1,
        recompute_granularity="selective" if config.recompute_modules else None,
        recompute_modules=config.recompute_modules,
    )
    check_job(dataclasses.replace(job, global_batch_size=1), Layout(parallel, 1, 1, 1))


def in_order(candidates: list[Candidate]) -> list[Candidate]:
    """Fastest first, tight ones after the others."""
    return sorted(candidates, key=lambda candidate: (candidate.tight, -candidate.throughput.tokens_per_second))


def fits(candidate: Candidate, cluster: Cluster) -> bool:
    return candidate.memory.total <= cluster.device.memory_gib * GIB


def worth_showing(candidates: list[Candidate]) -> list[Candidate]:
    """Of the ways to interleave and to recompute: the best with room, and the best of all if it is tight and faster."""
    with_room = [candidate for candidate in candidates if not candidate.tight]
    if not with_room:
        return [simplest_of_fastest(candidates)] if candidates else []
    roomy, best = simplest_of_fastest(with_room), simplest_of_fastest(candidates)
    is_faster = best.throughput.tokens_per_second > roomy.throughput.tokens_per_second
    return [roomy, best] if best.tight and is_faster else [roomy]


def fully_sharded(config: PlanConfig, job: TrainingJob, cluster: Cluster) -> list[Candidate]:
    """What FSDP would need and give (Layout.fully_sharded), fastest first: of each size the best recomputation."""
    found: list[Candidate] = []
    without_pipeline = dataclasses.replace(config, pipeline_model_parallel_size=1, virtual_pipeline_model_parallel_size=None)
    if config.pipeline_model_parallel_size not in (None, 1) or config.virtual_pipeline_model_parallel_size not in (None, 1):
        return found
    for size in parallel_sizes(without_pipeline, job, cluster, {}):
        if size.data * size.context == 1:
            continue
        for micro_batch in micro_batches(config, size, {}):
            shards = (
                dataclasses.replace(layout, fully_sharded=True)
                for layout in interleavings(without_pipeline, job, size, micro_batch, {})
            )
            candidates = [make_candidate(config, job, cluster, layout) for layout in shards]
            fitting = [candidate for candidate in candidates if fits(candidate, cluster)]
            found += worth_showing(fitting)[:1]
    return in_order(found)


def simplest_of_fastest(candidates: list[Candidate]) -> Candidate:
    """Of those nearly as fast as the fastest, the one with the fewest model chunks, and of these the fastest.

    Every chunk more adds messages between stages, whose price at small sizes no formula here knows.
    """
    fastest = max(candidate.throughput.tokens_per_second for candidate in candidates)
    near = [candidate for candidate in candidates if candidate.throughput.tokens_per_second >= NEARLY * fastest]
    return min(near, key=lambda candidate: (candidate.layout.virtual, -candidate.throughput.tokens_per_second))


def make_job(config: PlanConfig) -> TrainingJob:
    llama, batch = find_model(config.model), config.global_batch_size
    return TrainingJob(llama, config.seq_length, batch, config.params_dtype, config.fp8, config.transformer_impl)


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
        raise InputError(f"fp8 is true but device {device.name} has no FP8 units; expected h100, h200, b200, gb200 or gb300")
    return Cluster(device, config.devices)


@dataclass(frozen=True)
class Size:
    """How many devices share what."""

    tensor: int
    pipeline: int
    context: int
    data: int

    def __str__(self) -> str:
        context = f" CP{self.context}" if self.context > 1 else ""
        return f"TP{self.tensor} PP{self.pipeline}{context} DP{self.data}"


def parallel_sizes(config: PlanConfig, job: TrainingJob, cluster: Cluster, refused: dict[str, str]) -> Iterator[Size]:
    """Tensor-, pipeline- and context-parallel sizes that divide the devices and the model."""
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
            if can_be_split(config, job, tensor, pipeline, refused):
                yield from with_context(config, job, tensor, pipeline, refused)


def can_be_split(config: PlanConfig, job: TrainingJob, tensor: int, pipeline: int, refused: dict[str, str]) -> bool:
    """Whether the model can be split over so many devices; else the reason is noted."""
    parallel = make_parallel(config, job, Size(tensor, pipeline, 1, 1), 1, None)
    layers = job.llama.num_hidden_layers
    if layers % pipeline and parallel.num_layers_in_first_pipeline_stage is None:
        most = -(-layers // pipeline)
        reason = f"{layers} layers are too few for {pipeline} stages: {most} in each but the first leave it none"
        refuse(refused, reason, f"PP{pipeline}")
        return False
    try:
        check_job(TrainingJob(job.llama, job.seq_length, 1), Layout(parallel, 1, 1, 1))
    except InputError as error:
        at_fault = f"TP{tensor}" if "tensor_model_parallel_size" in str(error) else f"PP{pipeline}"
        refuse(refused, str(error), at_fault)
        return False
    return True


def with_context(
    config: PlanConfig, job: TrainingJob, tensor: int, pipeline: int, refused: dict[str, str]
) -> Iterator[Size]:
    """The context-parallel sizes beside these; data parallelism takes the other devices."""
    rest = config.devices // (tensor * pipeline)
    for context in context_sizes(config, job):
        size = Size(tensor, pipeline, context, rest // context)
        if rest % context:
            if config.context_parallel_size is not None:
                reason = f"{config.devices} devices are not divisible by {tensor * pipeline * context}, TP x PP x CP"
                refuse(refused, reason, f"TP{tensor} PP{pipeline} CP{context}")
            continue
        try:
            parallel = make_parallel(config, job, size, 1, None)
            check_job(dataclasses.replace(job, global_batch_size=1), Layout(parallel, 1, 1, 1))
        except InputError as error:
            refuse(refused, str(error), f"CP{context}")
            continue
        yield size


def context_sizes(config: PlanConfig, job: TrainingJob) -> list[int]:
    """As asked for; else what long samples can use: with fp32 or torch's layers nothing can."""
    if config.context_parallel_size is not None:
        return [config.context_parallel_size]
    if job.params_dtype == "fp32" or job.transformer_impl == "local":
        return [1]
    return powers_of_two(max(1, job.seq_length // LEAST_TOKENS))


def refuse(refused: dict[str, str], reason: str, layouts: str) -> None:
    """Note why layouts are not possible, beside those that are not for the same reason."""
    known = refused.get(reason, "")
    if layouts not in known.split(", "):
        refused[reason] = f"{known}, {layouts}" if known else layouts


def powers_of_two(most: int) -> list[int]:
    return [2**i for i in range(most.bit_length())]


def pipeline_sizes(config: PlanConfig, job: TrainingJob, tensor: int) -> list[int]:
    if config.pipeline_model_parallel_size:
        return [config.pipeline_model_parallel_size]
    rest = max(config.devices // tensor, 1)
    return [size for size in range(1, min(rest, job.llama.num_hidden_layers) + 1) if rest % size == 0]


def micro_batches(config: PlanConfig, size: Size, refused: dict[str, str]) -> list[int]:
    """Micro-batch sizes that share the global batch evenly."""
    batch, data = config.global_batch_size, size.data
    if batch % (data * (config.micro_batch_size or 1)):
        micro = f" x micro_batch_size {config.micro_batch_size}" if config.micro_batch_size else ""
        refuse(refused, f"global_batch_size {batch} is not divisible by data-parallel size {data}{micro}", str(size))
        return []
    if config.micro_batch_size:
        return [config.micro_batch_size]
    return [size for size in powers_of_two(batch // data) if (batch // data) % size == 0]


def interleavings(
    config: PlanConfig, job: TrainingJob, size: Size, micro_batch: int, refused: dict[str, str]
) -> Iterator[Layout]:
    """The ways to interleave and to recompute."""
    microbatches = config.global_batch_size // (size.data * micro_batch)
    asked = config.virtual_pipeline_model_parallel_size
    layers = -(-job.llama.num_hidden_layers // size.pipeline)
    chunks = [asked] if asked else [v for v in range(1, layers + 1) if layers % v == 0] if size.pipeline > 1 else [1]
    granularities = [config.recompute_granularity] if config.recompute_granularity else ["none", "selective", "full"]
    for virtual in chunks:
        if virtual > 1 and size.pipeline == 1:
            refuse(refused, "virtual_pipeline_model_parallel_size needs pipeline_model_parallel_size 2 or more", "PP1")
            continue
        for granularity in granularities:
            layout = Layout(make_parallel(config, job, size, virtual, granularity), size.data, micro_batch, microbatches)
            try:
                check_job(job, layout)
            except InputError as error:
                if asked or config.recompute_modules:
                    refuse(refused, str(error), f"{size} MB{micro_batch}")
                continue
            yield layout


def make_parallel(config: PlanConfig, job: TrainingJob, size: Size, virtual: int, granularity: str | None) -> ParallelConfig:
    tensor = size.tensor
    return ParallelConfig(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=size.pipeline,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        num_layers_in_first_pipeline_stage=layers_of_uneven_first_stage(job.llama.num_hidden_layers, size.pipeline),
        sequence_parallel=config.sequence_parallel and tensor > 1,
        context_parallel_size=size.context,
        overlap_grad_reduce=config.overlap_grad_reduce,
        overlap_param_gather=config.overlap_param_gather,
        grad_reduce_in_bf16=config.grad_reduce_in_bf16,
        tp_comm_overlap=config.tp_comm_overlap and config.sequence_parallel and tensor > 1,
        recompute_granularity=granularity if granularity in ("selective", "full") else None,  # type: ignore[arg-type]
        recompute_modules=(config.recompute_modules or ["mlp"]) if granularity == "selective" else None,
    )


def make_candidate(config: PlanConfig, job: TrainingJob, cluster: Cluster, layout: Layout) -> Candidate:
    memory = fullest(job, layout, config.overhead_gib, config.fragmentation)
    tight = memory.total > TIGHT * cluster.device.memory_gib * GIB
    return Candidate(layout, memory, layout_throughput(job, layout, cluster), tight)


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
