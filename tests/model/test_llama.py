"""config.json in old and new spelling, what is refused, and the layouts a model can be split into."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_cpt.config.run import ParallelConfig
from megatron_cpt.errors import InputError
from megatron_cpt.model.llama import LlamaConfig, RopeScaling, check_layout, read_llama_config

SIZES = {
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}
COMMON: dict[str, Any] = SIZES | {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
OLD = COMMON | {"rope_theta": 500000.0, "rope_scaling": SCALING | {"rope_type": "llama3"}, "torch_dtype": "bfloat16"}
NEW = COMMON | {"rope_parameters": SCALING | {"rope_type": "llama3", "rope_theta": 500000.0}, "dtype": "bfloat16"}
LLAMA_3_1_8B = LlamaConfig(
    **SIZES,
    head_dim=128,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
    rope_scaling=RopeScaling(**SCALING),
    tie_word_embeddings=False,
    dtype="bfloat16",
)
SMOLLM = replace(  # 9 heads in 3 groups: no even split
    LLAMA_3_1_8B,
    num_hidden_layers=30,
    hidden_size=576,
    intermediate_size=1536,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    vocab_size=49152,
    max_position_embeddings=2048,
)


def read(folder: Path, fields: Any) -> LlamaConfig:
    (folder / "config.json").write_text(json.dumps(fields))
    return read_llama_config(str(folder))


def without(fields: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in names}


@pytest.mark.parametrize("fields", [OLD, NEW], ids=["old", "new"])
def test_both_spellings_are_one_model(tmp_path: Path, fields: dict[str, Any]) -> None:
    assert read(tmp_path, fields) == LLAMA_3_1_8B


@pytest.mark.parametrize(
    ("fields", "theta"),
    [
        (without(OLD, "rope_scaling"), 500000.0),
        (OLD | {"rope_scaling": None}, 500000.0),
        (without(OLD, "rope_scaling", "rope_theta"), 10000.0),
        (OLD | {"rope_scaling": {"type": "default"}}, 500000.0),
        (NEW | {"rope_parameters": {"rope_type": "default", "rope_theta": 20000.0}}, 20000.0),
        (NEW | {"rope_parameters": {"rope_theta": 20000}}, 20000.0),
        (without(NEW, "rope_parameters"), 10000.0),
    ],
)
def test_plain_rope(tmp_path: Path, fields: dict[str, Any], theta: float) -> None:
    assert read(tmp_path, fields) == replace(LLAMA_3_1_8B, rope_scaling=None, rope_theta=theta)


def test_scaling_under_its_older_name(tmp_path: Path) -> None:
    assert read(tmp_path, OLD | {"rope_scaling": SCALING | {"type": "llama3"}}) == LLAMA_3_1_8B


def test_what_hugging_face_leaves_out_has_its_defaults(tmp_path: Path) -> None:
    names = ("num_key_value_heads", "rms_norm_eps", "tie_word_embeddings", "torch_dtype", "max_position_embeddings")
    config = read(tmp_path, without(OLD, *names, "hidden_act", "attention_bias", "mlp_bias", "attention_dropout"))
    assert config == replace(
        LLAMA_3_1_8B, num_key_value_heads=32, rms_norm_eps=1e-6, dtype="float32", max_position_embeddings=2048
    )


def test_defaults_are_those_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.LlamaConfig()
    ours = read(tmp_path, without(COMMON, "rms_norm_eps", "tie_word_embeddings", "max_position_embeddings"))
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]


def test_head_dim_of_its_own_and_tied_embeddings(tmp_path: Path) -> None:
    config = read(tmp_path, OLD | {"head_dim": 64, "tie_word_embeddings": True})
    assert config == replace(LLAMA_3_1_8B, head_dim=64, tie_word_embeddings=True)


@pytest.mark.parametrize(
    ("field", "value", "supported"),
    [
        ("model_type", "mistral", "'llama'"),
        ("hidden_act", "gelu", "'silu'"),
        ("attention_bias", True, "False"),
        ("mlp_bias", True, "False"),
        ("attention_dropout", 0.1, "0.0"),
    ],
)
def test_another_computation_is_refused(tmp_path: Path, field: str, value: Any, supported: str) -> None:
    with pytest.raises(InputError) as caught:
        read(tmp_path, OLD | {field: value})
    assert str(caught.value) == f"{tmp_path}/config.json: {field} is {value!r}; supported is {supported}"


@pytest.mark.parametrize(
    "field", ["num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size"]
)
@pytest.mark.parametrize("value", [None, 0, -4, "32", 32.0])
def test_sizes_are_whole_numbers(tmp_path: Path, field: str, value: Any) -> None:
    with pytest.raises(InputError) as caught:
        read(tmp_path, without(OLD, field) if value is None else OLD | {field: value})
    assert str(caught.value) == f"{tmp_path}/config.json: {field} is {value!r}; use a whole number above 0"


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn", "longrope"])
@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
def test_other_rope_scalings_are_refused(tmp_path: Path, spelling: str, kind: str) -> None:
    with pytest.raises(InputError, match=f"config.json: rope_type is '{kind}'; supported are 'default' and 'llama3'"):
        read(tmp_path, COMMON | {spelling: {"rope_type": kind, "factor": 2.0}})


@pytest.mark.parametrize("missing", list(SCALING))
def test_incomplete_scaling(tmp_path: Path, missing: str) -> None:
    with pytest.raises(InputError, match=f"config.json: rope scaling 'llama3' has no {missing}"):
        read(tmp_path, COMMON | {"rope_scaling": without(SCALING, missing) | {"rope_type": "llama3"}})


def test_files_that_are_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model configuration .*/config\.json: No such file"):
        read_llama_config(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"/config\.json is not JSON"):
        read_llama_config(str(tmp_path))
    with pytest.raises(InputError, match=r"/config\.json must be a JSON object, found list"):
        read(tmp_path, [1])


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
    assert message == "9 num_attention_heads are not divisible by tensor_model_parallel_size 2; use 1 or 3"
    message = refusal(SMOLLM, tensor_model_parallel_size=9)
    assert message == "3 num_key_value_heads are not divisible by tensor_model_parallel_size 9; use 1 or 3"
    message = refusal(LLAMA_3_1_8B, tensor_model_parallel_size=16)
    assert message == "8 num_key_value_heads are not divisible by tensor_model_parallel_size 16; use 1, 2, 4 or 8"


def test_vocabulary_and_feed_forward() -> None:
    """Sizes offered divide everything, not only what was found first."""
    odd = replace(LLAMA_3_1_8B, vocab_size=128258)
    message = refusal(odd, tensor_model_parallel_size=4)
    assert message == "128258 vocab_size are not divisible by tensor_model_parallel_size 4; use 1 or 2"
    message = refusal(replace(odd, intermediate_size=14337), tensor_model_parallel_size=2)
    assert message == "14337 intermediate_size are not divisible by tensor_model_parallel_size 2; use 1"


def test_layers() -> None:
    message = refusal(SMOLLM, pipeline_model_parallel_size=4)
    assert message == (
        "30 num_hidden_layers are not divisible by pipeline_model_parallel_size 4; use 1, 2, 3, 5, 6, 10, 15 or 30"
    )
    assert "use 1, 2, 4, 8, 16 or 32" in refusal(LLAMA_3_1_8B, pipeline_model_parallel_size=64)


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
    words = (f"num_layers_in_first_pipeline_stage {first} leaves {layers - first} of {layers}", f"{pipeline - 1} more")
    assert all(word in str(caught.value) for word in words)


def test_sequence() -> None:
    message = refusal(LLAMA_3_1_8B, 2047, tensor_model_parallel_size=2, sequence_parallel=True)
    assert message == "seq_length 2047 is not divisible by tensor_model_parallel_size 2, which sequence_parallel needs"
    check_layout(LLAMA_3_1_8B, ParallelConfig(2), 2047)
    message = refusal(SMOLLM, 2049)
    assert message == "seq_length 2049 is above the model's max_position_embeddings 2048"


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
            offered = {int(word) for word in str(error).split("; use ")[1].replace(" or", ",").split(", ")}
            assert size not in offered
            for other in range(1, 50):
                if other in offered:
                    check_layout(llama, ParallelConfig(**{field: other}), 2048)
                else:
                    with pytest.raises(InputError):
                        check_layout(llama, ParallelConfig(**{field: other}), 2048)
