"""Parameters, gradients and optimizer states of a rank, to the byte, as megatron-core lays them out."""

from __future__ import annotations

import functools
import math
from collections import Counter
from dataclasses import dataclass

from megatron_cpt.model.llama import LlamaConfig
from megatron_cpt.planning.layouts import Layout, ModelChunk, TrainingJob, chunks_of_stage


@dataclass(frozen=True)
class Parameter:
    """`alone`: megatron-core gives it a bucket of its own (tied embeddings on two pipeline stages)."""

    name: str
    elements: int
    alone: bool = False


@dataclass(frozen=True)
class StateBytes:
    """Bytes that a rank holds for the whole run, all its model chunks together.

    Attributes:
        parameters: elements, without padding
        weights, gradients: contiguous buffers, padding included
        optimizer: largest share of a data-parallel rank: two moments, and main weights where parameters are bf16
    """

    parameters: int
    weights: int
    gradients: int
    optimizer: int


def parameters_of_chunk(llama: LlamaConfig, tensor: int, pipeline: int, chunk: ModelChunk) -> tuple[Parameter, ...]:
    """The parameters of one tensor-parallel rank, in the order of the module."""
    hidden, ffn = llama.hidden_size, llama.intermediate_size
    query, key = llama.num_attention_heads * llama.head_dim, llama.num_key_value_heads * llama.head_dim
    vocabulary = llama.padded_vocab_size(tensor) // tensor * hidden
    twice = llama.tie_word_embeddings and pipeline > 1  # the first and the last stage have a copy each
    parameters = [Parameter("embedding", vocabulary, twice)] if chunk.has_embedding else []
    for _ in range(chunk.layers):
        parameters += [
            Parameter("input_layernorm", hidden),
            Parameter("linear_proj", hidden * query // tensor),
            Parameter("linear_qkv", (query + 2 * key) // tensor * hidden),
            Parameter("pre_mlp_layernorm", hidden),
            Parameter("linear_fc1", 2 * ffn // tensor * hidden),
            Parameter("linear_fc2", hidden * ffn // tensor),
        ]
    if chunk.has_output:
        parameters.append(Parameter("final_layernorm", hidden))
        if not (llama.tie_word_embeddings and chunk.has_embedding):
            parameters.append(Parameter("output_layer", vocabulary, twice))
    return tuple(parameters)


def number_of_parameters(llama: LlamaConfig) -> int:
    """Of the whole model."""
    whole = ModelChunk(llama.num_hidden_layers, True, True)
    return sum(parameter.elements for parameter in parameters_of_chunk(llama, 1, 1, whole))


@dataclass(frozen=True, eq=False)  # compared by identity: they are made once (lay_out)
class Buffer:
    """A contiguous gradient buffer: its elements, and where parameters and buckets lie in it (element numbers)."""

    elements: int
    parameter_elements: int
    parameters: tuple[tuple[int, int], ...]
    buckets: tuple[tuple[int, int], ...]

    def shard(self, data_rank: int, data_size: int) -> int:
        """Elements that are parameters, not padding, in a data-parallel rank's share of each bucket."""
        elements = 0
        for begin, end in self.buckets:
            length = (end - begin) // data_size
            low = begin + data_rank * length
            elements += sum(max(0, min(low + length, b) - max(low, a)) for a, b in self.parameters)
        return elements


@functools.cache
def buffer_of_chunk(
    llama: LlamaConfig, tensor: int, pipeline: int, chunk: ModelChunk, data_size: int, bucket_size: int | None
) -> Buffer:
    """The buffer of one model chunk on one tensor-parallel rank."""
    return lay_out(parameters_of_chunk(llama, tensor, pipeline, chunk), data_size, bucket_size)


def lay_out(parameters: tuple[Parameter, ...], data_size: int, bucket_size: int | None) -> Buffer:
    """What megatron-core 0.16's `_ParamAndGradBuffer` does under the distributed optimizer.

    Parameters in reverse order, each at a multiple of 64 elements; buckets end at a multiple of lcm(data_size, 128), after
    the parameter with which they reach `bucket_size` elements (None: one bucket).
    """
    divisor = math.lcm(data_size, 128)
    places: list[tuple[int, int]] = []
    buckets: list[tuple[int, int]] = []
    start = position = 0
    open_bucket = False

    def close(end: int) -> int:
        nonlocal start, open_bucket
        buckets.append((start, -(-end // divisor) * divisor))
        start, open_bucket = buckets[-1][1], False
        return start

    for parameter in reversed(parameters):
        position = -(-position // 64) * 64
        if parameter.alone and open_bucket:
            position = close(position)
        places.append((position, position + parameter.elements))
        position += parameter.elements
        open_bucket = True
        if parameter.alone or (bucket_size is not None and position - start >= bucket_size):
            position = close(position)
    if open_bucket:
        close(position)
    return Buffer(start, sum(p.elements for p in parameters), tuple(places), tuple(buckets))


def bucket_size(layout: Layout, stage: int, chunk: int) -> int | None:
    """megatron-core's default: buckets only with overlap_grad_reduce, on the first stage, for the first model chunk."""
    if not layout.parallel.overlap_grad_reduce or stage > 0 or chunk > 0:
        return None
    return max(40_000_000, 1_000_000 * layout.shards)


def buffers_of_stage(llama: LlamaConfig, layout: Layout, stage: int) -> Counter[Buffer]:
    """The buffers of the model chunks of a stage; alike chunks have equal ones."""
    chunks = Counter(
        (chunk, bucket_size(layout, stage, number)) for number, chunk in enumerate(chunks_of_stage(llama, layout, stage))
    )
    data, buffers = layout.shards, Counter[Buffer]()
    for (chunk, size), number in chunks.items():
        buffers[buffer_of_chunk(llama, layout.tensor, layout.pipeline, chunk, data, size)] += number
    return buffers


def optimizer_element_bytes(job: TrainingJob) -> int:
    """fp32 moments, and fp32 main weights unless the parameters are fp32 (then they are updated in place)."""
    return 12 if job.params_dtype == "bf16" else 8


def state_bytes(job: TrainingJob, layout: Layout, stage: int, data_rank: int | None = None) -> StateBytes:
    """What a rank of this pipeline stage holds; of the optimizer the data-parallel rank's share, or the largest.

    Context-parallel ranks are data-parallel ones here, as in megatron-core (`with_context_parallel=True`).
    """
    buffers, data = buffers_of_stage(job.llama, layout, stage), layout.shards
    parameters = sum(number * buffer.parameter_elements for buffer, number in buffers.items())
    elements = sum(number * buffer.elements for buffer, number in buffers.items())
    if data_rank is None:
        share = elements // data
    else:
        share = sum(number * buffer.shard(data_rank, data) for buffer, number in buffers.items())
    if layout.fully_sharded:
        elements //= layout.shards
    return StateBytes(
        parameters,
        elements * job.element_bytes,
        elements * job.gradient_bytes(layout),
        share * optimizer_element_bytes(job),
    )


def layer_products(llama: LlamaConfig, tensor: int) -> int:
    """Elements of the weights of one layer's matrix products, on one tensor-parallel rank."""
    layer = parameters_of_chunk(llama, tensor, 1, ModelChunk(1, False, False))
    return sum(parameter.elements for parameter in layer if parameter.name.startswith("linear_"))


def fp8_bytes(job: TrainingJob, layout: Layout, stage: int) -> int:
    """FP8 copies of a stage's weights, one byte for each element, and of their transposes.

    Transformer Engine makes both in the first micro-batch of a step and keeps them for the others (`quantize_weight` with
    `cache`, `weight_quantizer.set_usage(rowwise=True, columnwise=True)` in its module/layernorm_linear.py and linear.py).
    Embedding and output layer are megatron-core's own and stay bf16. Blackwell's units need no transposes; they are counted
    all the same. Fully sharded, copies are made of gathered layers alone.
    """
    if not job.fp8 or layout.fully_sharded:
        return 0
    layers = sum(chunk.layers for chunk in chunks_of_stage(job.llama, layout, stage))
    return 2 * layers * layer_products(job.llama, layout.tensor)


def gathered_bytes(job: TrainingJob, layout: Layout) -> int:
    """Fully sharded: what is whole on a device for a moment.

    The weights of a layer and of the next, the gradients of one, and embedding and output layer with one gradient of theirs.
    """
    layer = layer_products(job.llama, layout.tensor)
    ends = 1 if job.llama.tie_word_embeddings else 2
    vocabulary = job.llama.padded_vocab_size(layout.tensor) // layout.tensor * job.llama.hidden_size
    return (3 * layer + (ends + 1) * vocabulary) * job.element_bytes
