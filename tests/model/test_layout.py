"""The layouts a model can be split into, and what is said of the others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llama_shapes import LLAMA_3_1_8B, SMOLLM

from megatron_cpt.config.parallel import ParallelConfig
from megatron_cpt.model.layout import check_layout, check_microbatches, layers_of_stages
from megatron_cpt.model.llama import LlamaConfig
from megatron_cpt.utils.errors import InputError


def refusal(llama: LlamaConfig, seq_length: int = 2048, **parallel: Any) -> str:
    with pytest.raises(InputError) as caught:
        check_layout(llama, ParallelConfig(**parallel), seq_length)
    return str(caught.value)


def test_layouts_that_do() -> None:
    for tensor in (1, 2, 4, 8):
        for pipeline in (1, 2, 4, 8, 16, 32):
            check_layout(LLAMA_3_1_8B, ParallelConfig(tensor, pipeline, sequence_parallel=tensor > 1), 8192)
    check_layout(SMOLLM, ParallelConfig(3, 5), 2048)


def test_heads() -> None:
    message = refusal(SMOLLM, tensor_model_parallel_size=2)
    assert message == "tensor_model_parallel_size is 2; expected 1 or 3, for 9 num_attention_heads"
    message = refusal(SMOLLM, tensor_model_parallel_size=9)
    assert message == "tensor_model_parallel_size is 9; expected 1 or 3, for 3 num_key_value_heads"
    message = refusal(LLAMA_3_1_8B, tensor_model_parallel_size=16)
    assert message == "tensor_model_parallel_size is 16; expected 1, 2, 4 or 8, for 8 num_key_value_heads"


def test_vocabulary_and_feed_forward() -> None:
    """The vocabulary is padded; sizes offered divide everything else, not only what was found first."""
    odd = replace(LLAMA_3_1_8B, vocab_size=128258)
    check_layout(odd, ParallelConfig(4), 2048)
    assert [odd.padded_vocab_size(tensor) for tensor in (1, 2, 4, 8)] == [128258, 128258, 128260, 128264]
    message = refusal(replace(odd, intermediate_size=14337), tensor_model_parallel_size=2)
    assert message == "tensor_model_parallel_size is 2; expected 1, for 14337 intermediate_size"


def test_layers() -> None:
    message = refusal(SMOLLM, pipeline_model_parallel_size=4)
    assert message == ("pipeline_model_parallel_size is 4; expected 1, 2, 3, 5, 6, 10, 15 or 30, for 30 num_hidden_layers")
    assert "expected 1, 2, 4, 8, 16 or 32, for" in refusal(LLAMA_3_1_8B, pipeline_model_parallel_size=64)


@given(layers=st.integers(1, 40), first=st.integers(1, 41), pipeline=st.integers(2, 12))
def test_layers_of_a_first_stage_of_its_own(layers: int, first: int, pipeline: int) -> None:
    """The later stages get equal shares of the rest, at least one layer each."""
    llama = replace(SMOLLM, num_hidden_layers=layers)
    parallel = ParallelConfig(pipeline_model_parallel_size=pipeline, num_layers_in_first_pipeline_stage=first)
    works = any(first + (pipeline - 1) * each == layers for each in range(1, layers + 1))
    if works:
        check_layout(llama, parallel, 2048)
        return
    with pytest.raises(InputError) as caught:
        check_layout(llama, parallel, 2048)
    words = (f"num_layers_in_first_pipeline_stage {first} leave {layers - first} of {layers}", f"{pipeline - 1} more")
    assert all(word in str(caught.value) for word in words)


def test_sequence() -> None:
    message = refusal(LLAMA_3_1_8B, 2047, tensor_model_parallel_size=2, sequence_parallel=True)
    assert message == "seq_length is 2047; expected a multiple of 2, tensor_model_parallel_size, for sequence_parallel"
    check_layout(LLAMA_3_1_8B, ParallelConfig(2), 2047)
    message = refusal(SMOLLM, 2049)
    assert message == "seq_length is 2049; expected at most 2048, the model's max_position_embeddings"


@given(
    heads_per_group=st.integers(1, 6),
    groups=st.integers(1, 12),
    vocab_size=st.integers(1, 1000),
    intermediate_size=st.integers(1, 400),
    layers=st.integers(1, 40),
    tensor=st.integers(1, 16),
    pipeline=st.integers(1, 41),
)
def test_every_size_offered_would_do_and_no_other(
    heads_per_group: int, groups: int, vocab_size: int, intermediate_size: int, layers: int, tensor: int, pipeline: int
) -> None:
    llama = replace(
        SMOLLM,
        num_attention_heads=heads_per_group * groups,
        num_key_value_heads=groups,
        vocab_size=vocab_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
    )
    for field, size in (("tensor_model_parallel_size", tensor), ("pipeline_model_parallel_size", pipeline)):
        try:
            check_layout(llama, ParallelConfig(**{field: size}), 2048)
        except InputError as error:
            sizes = str(error).split("; expected ")[1].split(", for ")[0]
            offered = {int(word) for word in sizes.replace(" or", ",").split(", ")}
            assert size not in offered
            for other in range(1, 50):
                if other in offered:
                    check_layout(llama, ParallelConfig(**{field: other}), 2048)
                else:
                    with pytest.raises(InputError):
                        check_layout(llama, ParallelConfig(**{field: other}), 2048)


@given(
    st.integers(1, 48),
    st.integers(2, 6),
    st.none() | st.integers(1, 9),
    st.none() | st.integers(1, 9),
    st.sampled_from([None, 2, 3]),
)
def test_what_is_dealt_out_is_what_megatron_core_builds(
    layers: int, stages: int, first: int | None, last: int | None, virtual: int | None
) -> None:
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_config import TransformerConfig

    parallel = ParallelConfig(1, stages, virtual, first, last)
    settings: dict[str, Any] = {
        "pipeline_model_parallel_size": stages,
        "virtual_pipeline_model_parallel_size": virtual,
        "num_layers_in_first_pipeline_stage": first,
        "num_layers_in_last_pipeline_stage": last,
    }
    try:
        dealt = layers_of_stages(layers, parallel)
    except InputError:
        return  # what is refused is tested above
    assert sum(dealt) == layers
    import torch

    config = TransformerConfig(
        num_layers=layers, hidden_size=64, num_attention_heads=4, pipeline_dtype=torch.float32, **settings
    )
    for rank, wanted in enumerate(dealt):
        chunks = range(virtual) if virtual else [None]
        assert sum(get_num_layers_to_build(config, vp_stage=chunk, pp_rank=rank) for chunk in chunks) == wanted


def test_chunks_and_microbatches_of_the_interleaved_schedule() -> None:
    llama = replace(LLAMA_3_1_8B, num_hidden_layers=30)
    message = refusal(llama, pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)
    assert message == (
        "virtual_pipeline_model_parallel_size is 2; expected 3, 5 or 15, for the 15 layers of pipeline stage 0"
    )
    parallel = ParallelConfig(1, 4, 2)
    check_microbatches(parallel, 8)
    with pytest.raises(InputError, match=r"6 micro-batches of a step .* not divisible by pipeline_model_parallel_size 4"):
        check_microbatches(parallel, 6)
    check_microbatches(ParallelConfig(1, 4), 6)


def test_context_parallel() -> None:
    message = refusal(LLAMA_3_1_8B, 2050, context_parallel_size=2)
    assert message == "seq_length is 2050; expected a multiple of 2 x context_parallel_size 2"
