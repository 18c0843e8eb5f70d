"""Checkpoints of Megatron-LM and Megatron-Bridge, as far as their formats are known: no file of theirs was at hand."""

from __future__ import annotations

import io
import json
import pickle
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from test_torch_dist import Bomb
from tiny_models import VARIANTS, make_tiny_llama
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from megatron_cpt.checkpoint.hf_files import HfTensors
from megatron_cpt.convert.config import HfToMegatron, MegatronToHf, Verify
from megatron_cpt.convert.convert import hf_to_megatron, megatron_to_hf
from megatron_cpt.convert.verify import verify
from megatron_cpt.model.llama import read_llama_config
from megatron_cpt.utils.errors import InputError

LLAMA31 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def megatron_lm_args(**changes: Any) -> dict[str, Any]:
    """What Megatron-LM's args say of the tiny model, some other settings among them."""
    return {
        "num_layers": 4,
        "hidden_size": 64,
        "ffn_hidden_size": 160,
        "num_attention_heads": 4,
        "group_query_attention": True,
        "num_query_groups": 2,
        "kv_channels": 16,
        "max_position_embeddings": 256,
        "seq_length": 64,
        "norm_epsilon": 1e-6,
        "normalization": "RMSNorm",
        "position_embedding_type": "rope",
        "rotary_base": 10000,
        "rotary_percent": 1.0,
        "use_rope_scaling": False,
        "rope_scaling_factor": 8.0,
        "swiglu": True,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "untie_embeddings_and_output_weights": True,
        "num_experts": None,
        "padded_vocab_size": 512,
        "params_dtype": torch.float32,
        "tokenizer_type": "HuggingFaceTokenizer",
        "lr": 1e-5,
    } | changes


def bridge_config(**changes: Any) -> dict[str, Any]:
    """run_config.yaml of the same, as Megatron-Bridge instantiates it."""
    model = {
        "_target_": "megatron.bridge.models.llama.llama_provider.Llama3ModelProvider8B",
        "activation_func": {"_target_": "torch.nn.functional.silu", "_call_": False},
        "num_layers": 4,
        "hidden_size": 64,
        "ffn_hidden_size": 160,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": None,
        "seq_length": 256,
        "layernorm_epsilon": 1e-6,
        "normalization": "RMSNorm",
        "position_embedding_type": "rope",
        "rotary_base": 10000,
        "rotary_percent": 1.0,
        "rope_scaling": False,
        "rope_scaling_factor": 8.0,
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "share_embeddings_and_output_weights": False,
        "num_moe_experts": None,
        "vocab_size": 400,
        "should_pad_vocab": True,
    }
    return {"model": model | changes, "train": {"train_iters": 10}, "checkpoint": {"save": "/results"}}


def foreign(converted: Path, args: dict[str, Any] | None = None, config: dict[str, Any] | None = None) -> Path:
    """Make a checkpoint of ours look like one of theirs."""
    folder = converted.parent / "iter_0000010"
    shutil.copytree(converted, folder)
    shutil.rmtree(folder / "hf")
    (folder / "manifest.json").unlink()
    if args is not None:
        content = {
            "args": Namespace(**args),
            "checkpoint_version": 3.0,
            "iteration": 10,
            "opt_param_scheduler": {"max_lr": 1e-5},
        }
        torch.save(content, folder / "common.pt")
    if config is not None:
        (folder / "run_config.yaml").write_text(yaml.safe_dump(config))
    return folder


def without_common_pt(folder: Path) -> Path:
    """Put common.pt where megatron-core 0.19 has it: a list with the dictionary, among the objects that .metadata names."""
    state = torch.load(folder / "common.pt", weights_only=False)
    (folder / "common.pt").unlink()
    archive = io.BytesIO()
    torch.save([state], archive)
    (folder / "__9_0.distcp").write_bytes(b"another tensor" + archive.getvalue())
    described = pickle.loads((folder / ".metadata").read_bytes())
    described.state_dict_metadata["common_state/shard_0_1"] = BytesStorageMetadata()
    place = _StorageInfo("__9_0.distcp", len(b"another tensor"), len(archive.getvalue()))
    described.storage_data[MetadataIndex("common_state/shard_0_1")] = place
    (folder / ".metadata").write_bytes(pickle.dumps(described))
    return folder


@pytest.fixture
def hf(tmp_path: Path, tiny_tokenizer_dir: str) -> Path:
    return Path(make_tiny_llama(tmp_path / "hf", tiny_tokenizer_dir, **VARIANTS["untied"]))


@pytest.fixture
def converted(hf: Path, tmp_path: Path) -> Path:
    """The same weights with 112 rows of padding in embedding and output layer."""
    padded = tmp_path / "padded"
    shutil.copytree(hf, padded)
    from safetensors.torch import load_file, save_file

    tensors = load_file(hf / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], torch.randn(112, 64)])
    save_file(tensors, padded / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((padded / "config.json").read_text())
    (padded / "config.json").write_text(json.dumps(config | {"vocab_size": 512}))
    return Path(hf_to_megatron(HfToMegatron(str(padded), str(tmp_path / "megatron"))))


@pytest.mark.parametrize("common", ["common.pt", "common_state"])
@pytest.mark.parametrize("kind", ["Megatron-LM", "Megatron-Bridge"])
def test_weights_and_configuration_come_out(kind: str, common: str, hf: Path, converted: Path, tmp_path: Path) -> None:
    lm = kind == "Megatron-LM"
    folder = foreign(converted, megatron_lm_args() if lm else None, None if lm else bridge_config())
    if common == "common_state":
        without_common_pt(folder)
    options = {"tokenizer": str(hf), **({"vocab_size": 400} if lm else {})}
    back = megatron_to_hf(MegatronToHf(str(folder), str(tmp_path / "back"), **options))
    assert "tensors equal" in verify(Verify(str(hf), back))
    assert read_llama_config(back) == read_llama_config(str(hf))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (Path(back) / name).read_bytes() == (hf / name).read_bytes()
    config = json.loads((Path(back) / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (0, 0)
    for a, b in ((str(hf), str(folder)), (str(folder), back)):  # padding is left out where the other one says the size
        assert "tensors equal" in verify(Verify(a, b))
    assert "top-1 agreement 100" in verify(Verify(str(folder), str(hf), logits=True))
    assert "top-1 agreement 100" in verify(Verify(str(hf), back, tensors=False, logits=True))


def test_without_a_size_the_padding_stays(converted: Path, tmp_path: Path) -> None:
    folder = foreign(converted, megatron_lm_args())
    back = megatron_to_hf(MegatronToHf(str(folder), str(tmp_path / "back")))
    assert HfTensors(back).shapes()["lm_head.weight"] == (512, 64)
    assert read_llama_config(back).vocab_size == 512


def test_rope_scaling_and_biases(converted: Path) -> None:
    from megatron_cpt.convert.megatron_lm import foreign_config

    folder = foreign(converted, megatron_lm_args(use_rope_scaling=True, rotary_base=500000, add_bias_linear=True))
    fields = foreign_config(str(folder), None)
    assert fields["rope_parameters"] == LLAMA31
    assert (fields["attention_bias"], fields["mlp_bias"]) == (True, True)
    (folder / "run_config.yaml").write_text(yaml.safe_dump(bridge_config(rope_scaling=True, rope_scaling_factor=32.0)))
    assert foreign_config(str(folder), None)["rope_parameters"]["factor"] == 32.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts": 8}, "num_experts is 8; in a Llama model it is None"),
        ({"normalization": "LayerNorm"}, "normalization is 'LayerNorm'; in a Llama model it is 'RMSNorm'"),
        ({"swiglu": False}, "swiglu is False"),
        ({"rotary_percent": 0.5}, "rotary_percent is 0.5"),
        ({"num_layers": None}, "has no number as num_layers"),
        ({"hidden_size": 128}, r"has shape \[512, 64\]; the configuration asks for"),
        ({"num_layers": 3}, r"has shape \[4, .*\]; the configuration asks for \[3, "),
        ({"qk_l2_norm": True}, "qk_l2_norm is True; in a Llama model it is False"),
        ({"softmax_scale": 0.3}, "softmax_scale is 0.3; in a Llama model it is None"),
        ({"no_rope_freq": [1, 0]}, r"no_rope_freq is \[1, 0\]"),
        ({"rotary_seq_len_interpolation_factor": 4}, "rotary_seq_len_interpolation_factor is 4"),
        ({"rotary_base": 10**38}, r"rotary_base is 10{38}; expected a number above 0, at most 1e\+15"),
        ({"rotary_base": float("nan")}, "rotary_base is nan; expected a number above 0"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0; expected a number above 0"),
        ({"hidden_size": 64.5}, "hidden_size is 64.5; expected a whole number"),
        ({"use_rope_scaling": True, "rope_scaling_factor": "8"}, "has no number as rope_scaling_factor"),
        ({"normalization": [["RMSNorm"]]}, r"normalization is \[\['RMSNorm'\]\]; in a Llama model"),
        ({"num_attention_heads": 1e-300}, "num_attention_heads is 1e-300; expected a whole number"),
        ({"kv_channels": "16"}, "has no number as kv_channels"),
        ({"num_query_groups": [2]}, "has no number as num_query_groups"),
        ({"add_bias_linear": torch.ones(1)}, "add_bias_linear is .*; expected true or false"),
        (
            {"untie_embeddings_and_output_weights": "no"},
            "untie_embeddings_and_output_weights is 'no'; expected true or false",
        ),
        ({"use_rope_scaling": 2}, "use_rope_scaling is 2; expected true or false"),
        ({"padded_vocab_size": 600}, r"has shape \[512, 64\]; the configuration asks for \[600, 64\]"),
    ],
)
def test_other_models_are_refused(change: dict[str, Any], message: str, converted: Path, tmp_path: Path) -> None:
    folder = foreign(converted, megatron_lm_args(**change))
    with pytest.raises(InputError, match=message):
        megatron_to_hf(MegatronToHf(str(folder), str(tmp_path / "back")))
    assert not (tmp_path / "back").exists()


def test_no_description_and_wrong_options(hf: Path, converted: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"vocab_size is given but .* has its configuration and tokenizer in hf/"):
        megatron_to_hf(MegatronToHf(str(converted), str(tmp_path / "back"), vocab_size=400))
    folder = foreign(converted, megatron_lm_args())
    (tmp_path / "empty").mkdir()
    for options, message in (
        ({"vocab_size": 0}, "vocab_size is 0; expected a whole number above 0"),
        (
            {"tokenizer": str(tmp_path / "empty")},
            "empty has no tokenizer; expected tokenizer.json, tokenizer.model or another",
        ),
        ({"tokenizer": str(hf), "vocab_size": 399}, "tokenizer .* has 400 tokens, more than the model's 399"),
    ):
        with pytest.raises(InputError, match=message):
            megatron_to_hf(MegatronToHf(str(folder), str(tmp_path / "back"), **options))  # type: ignore[arg-type]
    torch.save({"args": {"num_layers": 4}}, folder / "common.pt")
    with pytest.raises(InputError, match="args is a dict; expected the namespace that Megatron-LM saves"):
        megatron_to_hf(MegatronToHf(str(folder), str(tmp_path / "back")))
    for content in ("model: [1]", "model: abc", "train: {}", "model: {", "\x00"):
        (folder / "run_config.yaml").write_text(content)
        with pytest.raises(InputError, match=r"run_config\.yaml"):
            megatron_to_hf(MegatronToHf(str(folder), str(tmp_path / "back")))
    shutil.rmtree(folder)
    folder = foreign(converted, megatron_lm_args())
    (folder / "common.pt").unlink()
    with pytest.raises(InputError, match=r"is not complete: common\.pt is missing, and \.metadata names no common_state"):
        megatron_to_hf(MegatronToHf(str(folder), str(tmp_path / "back")))
    shutil.rmtree(folder)
    folder = foreign(converted)
    with pytest.raises(InputError, match=r"does not describe its model: hf/config\.json, run_config\.yaml and args"):
        megatron_to_hf(MegatronToHf(str(folder), str(tmp_path / "back")))


def test_what_is_pickled_beside_the_settings_is_not_run(converted: Path, tmp_path: Path) -> None:
    trace = tmp_path / "ran"
    folder = foreign(converted, megatron_lm_args(extra=Bomb(trace), activation=torch.nn.functional.silu))
    megatron_to_hf(MegatronToHf(str(folder), str(tmp_path / "back")))
    assert not trace.exists()


def test_layers_of_their_own_and_other_names_of_norms(hf: Path, tmp_path: Path) -> None:
    """As models of layers that differ are saved, without Transformer Engine, below a prefix."""
    from megatron_cpt.checkpoint.torch_dist import (
        TensorChunk,
        TorchDistReader,
        metadata_of,
        plan_of,
        write_distcp,
        write_metadata,
    )
    from megatron_cpt.convert.hf_weights import LAYERS, OTHER_NAMES, pieces_of
    from megatron_cpt.convert.megatron_weights import MegatronTensors

    llama, tensors = read_llama_config(str(hf)), HfTensors(str(hf))
    made = {}
    for piece in pieces_of(llama, torch.float32):
        chunk, tensor = piece.chunk, piece.make(tensors, llama)
        if chunk.key.startswith(LAYERS):
            below = OTHER_NAMES.get(chunk.key.removeprefix(LAYERS), chunk.key.removeprefix(LAYERS))
            key, size, offset = f"model.{LAYERS}{chunk.offset[0]}.{below}", chunk.size[1:], chunk.offset[1:]
            made[TensorChunk(key, size, offset, tensor.shape[1:], torch.float32)] = tensor[0]
        else:
            made[TensorChunk(f"model.{chunk.key}", chunk.size, chunk.offset, chunk.shape, torch.float32)] = tensor
    by_place = {(chunk.key, chunk.offset): tensor for chunk, tensor in made.items()}
    plans = [plan_of(list(made))]
    results = write_distcp(str(tmp_path), plans, 0, lambda key, offset: by_place[key, offset], lambda count: None)
    write_metadata(str(tmp_path), metadata_of(list(made)), [results])
    found = MegatronTensors(TorchDistReader(str(tmp_path)), llama)
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor), name
