"""The layouts that a model can be split into; errors say which numbers would do."""

from __future__ import annotations

import math

from megatron_cpt.config.parallel import ParallelConfig
from megatron_cpt.config.run import RunConfig
from megatron_cpt.model.llama import LlamaConfig
from megatron_cpt.utils.errors import InputError, Refusals


def check_layout(llama: LlamaConfig, parallel: ParallelConfig, seq_length: int, where: str = "") -> None:
    """Whether the model and its samples can be split this way; `where`: the file that gives `seq_length`.

    Raises:
        InputError: they cannot; InputErrors: for several reasons
    """
    refusals = Refusals()
    with refusals.noted():
        tensor = parallel.tensor_model_parallel_size
        _check_tensor(llama, tensor)
        if parallel.sequence_parallel and seq_length % tensor:
            raise InputError(
                f"{where}seq_length is {seq_length}; expected a multiple of {tensor}, tensor_model_parallel_size, for "
                "sequence_parallel"
            )
    with refusals.noted():
        if parallel.pipeline_model_parallel_layout is None:
            check_recomputation(parallel, layers_of_stages(llama.num_hidden_layers, parallel))
    with refusals.noted():
        context = parallel.context_parallel_size
        if seq_length % (2 * context) and context > 1:
            raise InputError(
                f"{where}seq_length is {seq_length}; expected a multiple of 2 x context_parallel_size {context}"
            )
    with refusals.noted():
        if seq_length > llama.max_position_embeddings:
            raise InputError(
                f"{where}seq_length is {seq_length}; expected at most {llama.max_position_embeddings}, the model's "
                "max_position_embeddings"
            )
    refusals.raise_any()


def _check_tensor(llama: LlamaConfig, tensor: int) -> None:
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if getattr(llama, name) % tensor:
            raise InputError(
                f"tensor_model_parallel_size is {tensor}; expected {_or(_tensor_sizes(llama))}, for "
                f"{getattr(llama, name)} {name}"
            )


def layers_of_stages(num_layers: int, parallel: ParallelConfig) -> list[int]:
    """Layers of each pipeline stage.

    Raises:
        InputError: they cannot be dealt to the stages, or a stage's to its model chunks
    """
    stages = parallel.pipeline_model_parallel_size
    first, last = parallel.num_layers_in_first_pipeline_stage, parallel.num_layers_in_last_pipeline_stage
    given = {"num_layers_in_first_pipeline_stage": first, "num_layers_in_last_pipeline_stage": last}
    given = {name: value for name, value in given.items() if value is not None}
    middle, rest = stages - len(given), num_layers - sum(value for value in given.values() if value)
    if not given and num_layers % stages:
        sizes = [size for size in range(1, num_layers + 1) if num_layers % size == 0]
        raise InputError(
            f"pipeline_model_parallel_size is {stages}; expected {_or(sizes)}, for {num_layers} num_hidden_layers"
        )
    if rest < middle or (rest % middle if middle else rest):
        names = " and ".join(f"{name} {value}" for name, value in given.items())
        wanted = f"a multiple of {middle}" if middle else "none"
        raise InputError(f"{names} leave {rest} of {num_layers} layers for {middle} more stages; leave {wanted}")
    layers = [rest // middle] * middle if middle else []
    layers = ([first] if first is not None else []) + layers + ([last] if last is not None else [])
    virtual = parallel.virtual_pipeline_model_parallel_size or 1
    for stage, count in enumerate(layers):
        if count % virtual:
            sizes = [size for size in range(1, count + 1) if all(n % size == 0 for n in layers)]
            raise InputError(
                f"virtual_pipeline_model_parallel_size is {virtual}; expected {_or(sizes[1:]) if sizes[1:] else 'none'}, "
                f"for the {count} layers of pipeline stage {stage}"
            )
    return layers


def check_recomputation(parallel: ParallelConfig, layers: list[int]) -> None:
    """Raise InputError unless groups of layers to recompute come out even in every model chunk."""
    for count in layers:
        check_recomputed_chunk(parallel, count // (parallel.virtual_pipeline_model_parallel_size or 1))


def check_recomputed_chunk(parallel: ParallelConfig, layers: int) -> None:
    """Raise InputError unless groups of layers to recompute come out even: megatron-core would walk past a chunk's end."""
    number = parallel.recompute_num_layers or 1
    if parallel.recompute_granularity == "full" and parallel.recompute_method != "block" and layers % number:
        raise InputError(f"recompute_num_layers is {number}; expected a divisor of {layers}, the layers of a model chunk")


def check_microbatches(parallel: ParallelConfig, num_microbatches: int) -> None:
    """Raise InputError unless the interleaved schedule can deal out this number of micro-batches."""
    stages = parallel.pipeline_model_parallel_size
    if parallel.virtual_pipeline_model_parallel_size is not None and num_microbatches % stages:
        raise InputError(
            f"{num_microbatches} micro-batches of a step (global_batch_size / micro_batch_size / data-parallel size) are "
            f"not divisible by pipeline_model_parallel_size {stages}, which virtual_pipeline_model_parallel_size needs"
        )


def _tensor_sizes(llama: LlamaConfig) -> list[int]:
    sizes = (llama.num_attention_heads, llama.num_key_value_heads, llama.intermediate_size)
    return [n for n in range(1, llama.num_key_value_heads + 1) if all(size % n == 0 for size in sizes)]


def _or(values: list[int]) -> str:
    *most, last = (str(value) for value in values)
    return f"{', '.join(most)} or {last}" if most else last


def check_batch(config: RunConfig, world_size: int) -> int:
    """Whether processes and batch come out even; returns the data-parallel size."""
    parallel, training = config.parallel, config.training
    sizes = {
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "context_parallel_size": parallel.context_parallel_size,
    }
    together = math.prod(sizes.values())
    if world_size % together:
        names = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
        raise InputError(f"{world_size} processes cannot hold {names}; start a multiple of {together}")
    data_parallel = world_size // together
    if training.global_batch_size % (training.micro_batch_size * data_parallel):
        raise InputError(
            f"training.global_batch_size is {training.global_batch_size}; expected a multiple of "
            f"{training.micro_batch_size * data_parallel}, micro_batch_size {training.micro_batch_size} x data-parallel "
            f"size {data_parallel}"
        )
    check_microbatches(parallel, training.global_batch_size // (training.micro_batch_size * data_parallel))
    return data_parallel
