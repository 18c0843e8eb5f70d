"""config.json in old and new spelling, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from llama_shapes import LLAMA_3_1_8B, SCALING, SIZES

from megatron_cpt.model.llama import LlamaConfig, read_llama_config
from megatron_cpt.utils.errors import InputError, InputErrors

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
OLD = COMMON | {"rope_theta": 500000.0, "rope_scaling": SCALING | {"rope_type": "llama3"}, "torch_dtype": "bfloat16"}
NEW = COMMON | {"rope_parameters": SCALING | {"rope_type": "llama3", "rope_theta": 500000.0}, "dtype": "bfloat16"}


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
        ("attention_dropout", 0.1, "0.0"),
        ("partial_rotary_factor", 0.5, "1.0"),
        ("architectures", ["LlamaForSequenceClassification"], "['LlamaForCausalLM']"),
    ],
)
def test_another_computation_is_refused(tmp_path: Path, field: str, value: Any, supported: str) -> None:
    with pytest.raises(InputError) as caught:
        read(tmp_path, OLD | {field: value})
    assert str(caught.value) == f"{tmp_path}/config.json: {field} is {value!r}; supported is {supported}"


@pytest.mark.parametrize(
    ("field", "value"), [("residual_multiplier", 0.22), ("use_qk_norm", True), ("auto_map", {"AutoModel": "x.Y"})]
)
def test_fields_that_nobody_knows_are_refused_unless_they_are_off(tmp_path: Path, field: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"{field} is .*, a field that is not known here"):
        read(tmp_path, OLD | {field: value})
    for off in (None, False, {}, []):
        assert read(tmp_path, OLD | {field: off}) == LLAMA_3_1_8B


def test_all_that_is_wrong_is_named_at_once(tmp_path: Path) -> None:
    """But of a model of another kind nothing else, and of many unknown fields some."""
    wrong = {"hidden_act": "gelu", "hidden_size": 0, "num_key_value_heads": 5, "dtype": "float99", "mlp_bias": "yes"}
    with pytest.raises(InputErrors) as caught:
        read(tmp_path, OLD | wrong | {"rope_theta": -1, "rope_scaling": None, "use_qk_norm": True})
    lines = [str(error).removeprefix(f"{tmp_path}/config.json: ") for error in caught.value.errors]
    named = ["hidden_act", "use_qk_norm", "hidden_size", "num_attention_heads", "rope_theta", "dtype", "mlp_bias"]
    assert [line.split()[0] for line in lines] == named
    with pytest.raises(InputError) as other:
        read(tmp_path, OLD | wrong | {"model_type": "mistral"})
    assert not isinstance(other.value, InputErrors)
    with pytest.raises(InputErrors) as many:
        read(tmp_path, OLD | {f"field_{i}": 1 for i in range(1000)})
    assert len(many.value.errors) == 8


def test_quantized_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the weights are quantized"):
        read(tmp_path, OLD | {"quantization_config": {"quant_method": "gptq"}})


def test_every_field_that_transformers_writes_is_known(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    fields = transformers.LlamaConfig(rope_parameters={"rope_type": "default", "rope_theta": 5e5}).to_dict()
    assert read(tmp_path, fields | {"dtype": "bfloat16", "architectures": ["LlamaForCausalLM"]}).rope_theta == 5e5


def test_biases(tmp_path: Path) -> None:
    assert read(tmp_path, OLD | {"attention_bias": True, "mlp_bias": True}) == replace(
        LLAMA_3_1_8B, attention_bias=True, mlp_bias=True
    )
    with pytest.raises(InputError, match="mlp_bias is 'yes'; expected true or false"):
        read(tmp_path, OLD | {"mlp_bias": "yes"})


@pytest.mark.parametrize(
    "field", ["num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size"]
)
@pytest.mark.parametrize("value", [None, 0, -4, "32", 32.0])
def test_sizes_are_whole_numbers(tmp_path: Path, field: str, value: Any) -> None:
    with pytest.raises(InputError) as caught:
        read(tmp_path, without(OLD, field) if value is None else OLD | {field: value})
    assert str(caught.value) == f"{tmp_path}/config.json: {field} is {value!r}; expected a whole number above 0"


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn", "longrope"])
@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
def test_other_rope_scalings_are_refused(tmp_path: Path, spelling: str, kind: str) -> None:
    with pytest.raises(InputError, match=f"config.json: rope_type is '{kind}'; supported are 'default' and 'llama3'"):
        read(tmp_path, COMMON | {spelling: {"rope_type": kind, "factor": 2.0}})


@pytest.mark.parametrize("missing", list(SCALING))
def test_incomplete_scaling(tmp_path: Path, missing: str) -> None:
    with pytest.raises(InputError, match=f"config.json: rope scaling 'llama3' has no {missing}"):
        read(tmp_path, COMMON | {"rope_scaling": without(SCALING, missing) | {"rope_type": "llama3"}})


LLAMA3 = SCALING | {"rope_type": "llama3"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"head_dim": "16"}, "head_dim is '16'; expected a whole number above 0"),
        ({"num_key_value_heads": "2"}, "num_key_value_heads is '2'; expected a whole number"),
        ({"max_position_embeddings": None}, "max_position_embeddings is None; expected a whole number"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps is '1e-6'; expected a number above 0"),
        ({"rms_norm_eps": None}, "rms_norm_eps is None; expected a number above 0"),
        ({"rms_norm_eps": -1}, "rms_norm_eps is -1; expected a number above 0"),
        ({"tie_word_embeddings": None}, "tie_word_embeddings is None; expected true or false"),
        ({"torch_dtype": 16}, "dtype is 16; expected float32, bfloat16 or float16"),
        ({"torch_dtype": "float99"}, "dtype is 'float99'; expected float32, bfloat16 or float16"),
        ({"dtype": ["float32"]}, r"dtype is \['float32'\]; expected float32"),
        ({"rms_norm_eps": 10**400}, r"rms_norm_eps is 1000+\.\.\.0+; expected a number above 0, at most 1e\+15"),
        ({"vocab_size": 10**400}, r"vocab_size is 1000+\.\.\.0+; expected at most 2147483648"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; expected at most 10000"),
        ({"rope_theta": "abc"}, "rope_theta is 'abc'; expected a number above 0"),
        ({"rope_theta": -5}, "rope_theta is -5; expected a number above 0"),
        ({"rope_scaling": "llama3"}, "rope_scaling is 'llama3'; expected an object"),
        ({"rope_parameters": [8]}, r"rope_parameters is \[8\]; expected an object"),
        ({"rope_scaling": LLAMA3 | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5; supported is 1.0"),
        ({"rope_scaling": LLAMA3 | {"factor": None}}, "factor is None; expected a number above 0"),
        ({"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 1.5}}, "embeddings is 1.5; expected a whole number"),
        (
            {"rope_scaling": LLAMA3, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
            "rope_parameters and rope_scaling are both there and say different things",
        ),
    ],
)
def test_values_of_another_kind_are_refused(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"config.json: .*{message}"):
        read(tmp_path, OLD | fields)


def test_two_places_that_agree(tmp_path: Path) -> None:
    assert read(tmp_path, OLD | {"rope_parameters": LLAMA3 | {"rope_theta": 500000.0}}) == LLAMA_3_1_8B


def test_files_that_are_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model configuration .*/config\.json: No such file"):
        read_llama_config(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"/config\.json is not JSON"):
        read_llama_config(str(tmp_path))
    with pytest.raises(InputError, match=r"/config\.json must be a JSON object, found list"):
        read(tmp_path, [1])
