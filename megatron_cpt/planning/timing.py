"""How long an optimizer step takes: matrix products, elementwise operations, communication, the pipeline's bubble.

A model of first-order effects. Matrix products and attention run at a fitted share of the device's peak
(`Device.matmul_efficiency`), plus the time to move their operands, so small ones are slower per operation. Everything else
is bytes over a bandwidth. What overlaps is said in each function. docs/planning.md compares it with published runs.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from megatron_cpt.model.flops import flops_per_token, utilisation
from megatron_cpt.planning.activations import Sizes, fully_recomputed, layer_sizes, recomputed_modules
from megatron_cpt.planning.hardware import ATTENTION_EFFICIENCY, HIDDEN_BY_TP_OVERLAP, MEMORY_EFFICIENCY, Cluster, Device
from megatron_cpt.planning.layouts import Layout, ModelChunk, TrainingJob, chunks_of_stage
from megatron_cpt.planning.weights import state_bytes

FORWARD, BACKWARD = 1.0, 2.0  # a backward pass has two matrix products for each of the forward pass
ATTENTION_BACKWARD = 2.5  # flash attention's backward pass also computes the scores again
SEND_LATENCY = 2e-5  # seconds, of a message to another node
LOSS_BYTES = 50  # of memory traffic per logit: conversion to fp32, maximum, exponentials, sum, gradient, each its own pass


@dataclass(frozen=True)
class Speed:
    """Rates of one device for a job, per second."""

    matmul_flops: float
    attention_flops: float
    memory_bytes: float

    def matmul(self, rows: int, columns: int, depth: int, element: int) -> float:
        """Seconds of [rows, depth] x [depth, columns]."""
        operands = rows * depth + depth * columns + rows * columns
        return 2.0 * rows * columns * depth / self.matmul_flops + element * operands / self.memory_bytes


def peak_flops(job: TrainingJob, device: Device) -> float:
    """Operations per second that matrix products cannot exceed: in FP8 where the job uses it; in TF32, half of bf16, for
    fp32 jobs."""
    if job.fp8:
        return (device.fp8_tflops or device.bf16_tflops) * 1e12
    return device.bf16_tflops * 1e12 * (1.0 if job.params_dtype == "bf16" else 0.5)


def layout_speed(job: TrainingJob, device: Device) -> Speed:
    bf16 = peak_flops(TrainingJob(job.llama, job.seq_length, job.global_batch_size, job.params_dtype), device)
    matmul = device.fp8_efficiency * peak_flops(job, device) if job.fp8 else device.matmul_efficiency * bf16
    return Speed(
        matmul,
        ATTENTION_EFFICIENCY * device.matmul_efficiency * bf16,  # attention stays in bf16
        MEMORY_EFFICIENCY * device.memory_gb_per_s * 1e9,
    )


@dataclass(frozen=True)
class LayerTime:
    """Seconds of one layer's forward pass for one micro-batch on one device, without communication."""

    attention: float
    mlp: float
    projections: float
    elementwise: float

    def forward(self) -> float:
        return self.attention + self.mlp + self.projections + self.elementwise

    def backward(self, recomputed: frozenset[str] = frozenset()) -> float:
        again = self.mlp * ("mlp" in recomputed) + self.attention * ("core_attn" in recomputed)
        return BACKWARD * (self.mlp + self.projections + self.elementwise) + ATTENTION_BACKWARD * self.attention + again


def layer_time(job: TrainingJob, layout: Layout, device: Device) -> LayerTime:
    n, rate = layer_sizes(job, layout), layout_speed(job, device)
    element = 1 if job.fp8 else job.element_bytes
    mlp = rate.matmul(n.tokens, 2 * n.ffn, n.hidden, element) + rate.matmul(n.tokens, n.hidden, n.ffn, element)
    projections = rate.matmul(n.tokens, n.query + 2 * n.key, n.hidden, element)
    projections += rate.matmul(n.tokens, n.hidden, n.query, element)
    causal = 0.5
    attention = causal * 4.0 * n.tokens * job.seq_length * n.query / rate.attention_flops
    # Two norms (read, write), two residual additions (read twice, write), rotary embedding, SwiGLU.
    elements = 10 * n.local_tokens * n.hidden + n.tokens * (4 * (n.query + n.key) + 5 * n.ffn)
    return LayerTime(attention, mlp, projections, elements * job.element_bytes / rate.memory_bytes)


def tensor_parallel_time(job: TrainingJob, layout: Layout, cluster: Cluster) -> float:
    """Seconds of communication in one layer's forward pass; the backward pass has as much (Korthikanti et al., 2022).

    Two all-gathers and two reduce-scatters of the hidden states under sequence parallelism, two all-reduces (each as much as
    both) without. The all-gathers that backward needs for weight gradients are hidden behind the input gradients.
    """
    tensor, n = layout.tensor, layer_sizes(job, layout)
    if tensor == 1:
        return 0.0
    sent = 4 * n.tokens * n.hidden * job.element_bytes * (tensor - 1) / tensor
    exposed = 1.0 - HIDDEN_BY_TP_OVERLAP if layout.parallel.tp_comm_overlap else 1.0
    return exposed * sent / cluster.bandwidth(tensor)


def context_parallel_time(job: TrainingJob, layout: Layout, cluster: Cluster, layer: LayerTime) -> tuple[float, float]:
    """Seconds of one layer's ring attention that computing does not hide: of the forward and of the backward pass.

    Keys and values go from device to device, in the backward pass with their gradients, while attention is computed with
    those that are there (Liu et al., "Ring Attention with Blockwise Transformers", 2023; `AttnFuncWithCPAndKVP2P`). Each
    device has two chunks of the sequence, so that all have as much to do in every turn.
    """
    context, n = layout.context, layer_sizes(job, layout)
    if context == 1:
        return 0.0, 0.0
    send = 2 * n.tokens * n.key * job.element_bytes / cluster.bandwidth(layout.tensor * context) + SEND_LATENCY
    turn = layer.attention / context
    forward = (context - 1) * max(0.0, send - turn)
    return forward, (context - 1) * max(0.0, 2 * send - ATTENTION_BACKWARD * turn)


def output_time(job: TrainingJob, layout: Layout, device: Device, n: Sizes) -> float:
    """Seconds of output layer and loss, forward and backward; in bf16 also where the layers run in FP8."""
    rate = layout_speed(TrainingJob(job.llama, job.seq_length, job.global_batch_size, job.params_dtype), device)
    products = 3 * rate.matmul(n.tokens, n.vocab, n.hidden, job.element_bytes)
    return products + LOSS_BYTES * n.tokens * n.vocab / rate.memory_bytes


def chunk_time(job: TrainingJob, layout: Layout, cluster: Cluster, chunk: ModelChunk) -> tuple[float, float]:
    """Seconds that a model chunk takes for one micro-batch: the forward pass, and both passes."""
    layer, tp = layer_time(job, layout, cluster.device), tensor_parallel_time(job, layout, cluster)
    ring, ring_backward = context_parallel_time(job, layout, cluster, layer)
    _, again = fully_recomputed(layout, chunk.layers)
    forward = chunk.layers * (layer.forward() + tp + ring)
    modules = recomputed_modules(layout)
    tp_again = tp / 2 if "mlp" in modules else 0.0
    ring_again = ring if "core_attn" in modules else 0.0
    backward = chunk.layers * (layer.backward(modules) + tp + tp_again + ring_backward + ring_again)
    backward += again * (layer.forward() + tp + ring)
    if chunk.has_output:
        output = output_time(job, layout, cluster.device, layer_sizes(job, layout))
        forward, backward = forward + output / 3, backward + output * 2 / 3
    return forward, forward + backward


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step, by what they go to; they add up to `total`.

    Attributes:
        compute: the busiest stage's share of all micro-batches, communication left out
        tensor_parallel, context_parallel, pipeline, data_parallel: communication that nothing hides
        bubble: waiting for other stages
        optimizer: gradient norm and update
    """

    compute: float
    tensor_parallel: float
    context_parallel: float
    pipeline: float
    bubble: float
    data_parallel: float
    optimizer: float

    @property
    def total(self) -> float:
        return sum(getattr(self, part.name) for part in dataclasses.fields(self))


def step_time(job: TrainingJob, layout: Layout, cluster: Cluster) -> StepTime:
    """Seconds of one optimizer step.

    All micro-batches on the busiest stage, and the bubble: the other stages' time for one micro-batch, divided by the number
    of model chunks under the interleaved schedule (Narayanan et al., 2021: (p - 1) / (v m) of the rest for equal stages).
    """
    stages = {stage: chunks_of_stage(job.llama, layout, stage) for stage in differing_stages(layout)}
    times = {chunk: chunk_time(job, layout, cluster, chunk) for chunks in stages.values() for chunk in set(chunks)}
    one = {stage: sum(times[chunk][1] for chunk in chunks) for stage, chunks in stages.items()}
    busiest = max(one, key=lambda stage: one[stage])
    # The stages between the second and the last are like the second.
    all_stages = sum(one.values()) + (layout.pipeline - len(one)) * one[min(1, layout.pipeline - 1)]
    chunks = stages[busiest]
    tp, ring = (layout.num_microbatches * seconds for seconds in communication_time(job, layout, cluster, chunks))
    gather, scatter, update = data_parallel_time(job, layout, cluster, busiest)
    if layout.fully_sharded:
        exposed = layout.num_microbatches * max(0.0, 2 * gather + scatter - one[busiest])
    else:
        # Behind the last backward and the first forward pass; of an interleaved schedule, behind those of all chunks.
        forward = sum(times[chunk][0] for chunk in chunks)
        exposed = max(0.0, scatter - (one[busiest] - forward) * layout.parallel.overlap_grad_reduce)
        exposed += max(0.0, gather - forward * layout.parallel.overlap_param_gather)
    return StepTime(
        compute=layout.num_microbatches * one[busiest] - tp - ring,
        tensor_parallel=tp,
        context_parallel=ring,
        pipeline=pipeline_time(job, layout, cluster, one[busiest] / layout.virtual),
        bubble=(all_stages - one[busiest]) / layout.virtual,
        data_parallel=exposed,
        optimizer=update,
    )


def communication_time(job: TrainingJob, layout: Layout, cluster: Cluster, chunks: list[ModelChunk]) -> tuple[float, float]:
    """Seconds of a stage's communication within layers for one micro-batch: tensor-parallel, and of ring attention."""
    layers = sum(chunk.layers for chunk in chunks)
    again = sum(fully_recomputed(layout, chunk.layers)[1] for chunk in chunks)
    modules = recomputed_modules(layout)
    # Of a layer's two pairs of collectives one is the MLP's.
    passes = 2 * layers + again + ("mlp" in modules) * layers / 2
    forward, backward = context_parallel_time(job, layout, cluster, layer_time(job, layout, cluster.device))
    ring = (layers + again + ("core_attn" in modules) * layers) * forward + layers * backward
    return passes * tensor_parallel_time(job, layout, cluster), ring


def differing_stages(layout: Layout) -> list[int]:
    """The first stage, one in the middle, and the last."""
    return sorted({0, min(1, layout.pipeline - 1), layout.pipeline - 1})


def pipeline_time(job: TrainingJob, layout: Layout, cluster: Cluster, chunk_seconds: float) -> float:
    """Seconds of sending activations on and gradients back that nothing hides.

    In 1F1B all of it; interleaved, what a chunk's computation (`chunk_seconds`, both passes) is too short for, and the sends
    that fill the pipeline.
    """
    if layout.pipeline == 1:
        return 0.0
    n = layer_sizes(job, layout)
    # The last stage lies behind all others in the order of ranks: in a job of several nodes some send goes to another node.
    bandwidth = cluster.bandwidth(layout.devices)
    transfer = 2 * (n.local_tokens * n.hidden * job.element_bytes / bandwidth + SEND_LATENCY)
    if layout.virtual == 1:
        return layout.num_microbatches * transfer
    exposed = max(0.0, transfer - chunk_seconds)
    return layout.num_microbatches * layout.virtual * exposed + (layout.pipeline - 1) * transfer


def data_parallel_time(job: TrainingJob, layout: Layout, cluster: Cluster, stage: int) -> tuple[float, float, float]:
    """Seconds of gathering parameters, of reduce-scattering gradients, and of the distributed optimizer's update."""
    state, size = state_bytes(job, layout, stage), layout.shards
    gradient = job.gradient_bytes(layout)
    elements = state.parameters
    share = (size - 1) / size
    bandwidth = cluster.bandwidth_of_every(layout.tensor, size)
    gather = elements * job.element_bytes * share / bandwidth
    scatter = elements * (job.element_bytes if layout.fully_sharded else gradient) * share / bandwidth
    memory = MEMORY_EFFICIENCY * cluster.device.memory_gb_per_s * 1e9
    # Read gradient, main weight and moments and write the latter three; and clear and scale the gradient buffer.
    update = elements / size * (6 * 4 + gradient + job.element_bytes) / memory + 3 * state.gradients / memory
    return gather, scatter, update


@dataclass(frozen=True)
class Throughput:
    """What a step's time means.

    Attributes:
        mfu: of the dense bf16 peak (`utilisation`, as training counts it), all of attention counted (torchtitan's formula)
        mfu_causal: with half of it (Megatron-LM's)
        bubble: share of the step spent waiting for other stages
    """

    step: StepTime
    tokens_per_second: float
    tokens_per_second_per_device: float
    mfu: float
    mfu_causal: float
    bubble: float


def layout_throughput(job: TrainingJob, layout: Layout, cluster: Cluster) -> Throughput:
    step = step_time(job, layout, cluster)
    tokens = job.global_batch_size * job.seq_length / step.total
    per_device = tokens / layout.devices
    full, causal = (
        utilisation(per_device, flops_per_token(job.llama, job.seq_length, causal), cluster.device.bf16_tflops)
        for causal in (False, True)
    )
    return Throughput(step, tokens, per_device, full, causal, step.bubble / step.total)
