"""FSDP on two CPU processes does what one process does: training, stopping, resuming, the model that is left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from chats import dpo_config, read_metrics, sft_config, write_config
from safetensors.torch import load_file
from tiny_models import ROOT, make_tiny_llama
from torch.distributed.fsdp import MixedPrecisionPolicy

from megatron_cpt.posttrain.dpo import finetune_dpo
from megatron_cpt.posttrain.models import load_trainable_model
from megatron_cpt.posttrain.settings import LoraSettings, RunSettings, TrainingSettings
from megatron_cpt.posttrain.sft import finetune_sft
from megatron_cpt.posttrain.sharding import check_sharding, is_sharded, receives_weights, sum_in_fp32, unread_model
from megatron_cpt.utils.errors import InputError

FSDP = ROOT / "examples" / "posttrain" / "accelerate" / "fsdp_8gpu.yaml"
FSDP_TO_ONE = 1e-5  # how far losses and weights may be apart: sums in another order
BF16_TO_ONE = 0.05


def launch(tool: str, config: str, precision: str = "no", **environment: str) -> str:
    """Run a tool with the configuration of FSDP that users get, on two processes; returns what it said."""
    accelerate = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", str(FSDP)]
    options = ["--num_processes", "2", "--mixed_precision", precision, "--main_process_port", "0"]
    script = [str(ROOT / "tests" / "posttrain" / "fsdp_on_cpu.py"), str(ROOT / "tools" / tool), "--config", config]
    result = subprocess.run(
        [*accelerate, *options, *script],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment},
    )
    assert result.returncode == 0, result.stderr[-6000:]
    return result.stderr


def losses_of(folder: Path) -> list[float]:
    """Of each step and evaluation, in order."""
    rows = read_metrics(folder)
    names = ("loss", "eval_en_loss", "eval_zh_loss")
    return [row[name] for row in rows for name in names if name in row]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "hf" / "model.safetensors")


def assert_same_weights(first: Path, second: Path, tolerance: float) -> None:
    mine, theirs = weights_of(first), weights_of(second)
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.allclose(mine[name], tensor, rtol=0, atol=tolerance), name


@pytest.mark.slow
def test_sft_stops_and_goes_on(chat_model: str, tmp_path: Path) -> None:
    """A signal to one of two processes stops both; the weights in the end are those of an undisturbed process."""
    one = sft_config(chat_model, tmp_path, "one")
    finetune_sft(one)
    two = replace(one, save=str(tmp_path / "two"))
    config = write_config(two, tmp_path / "sft.yaml")
    assert "after step 4; the same command goes on" in launch("finetune_sft.py", config, STOP_AT="4")
    status = json.loads((tmp_path / "two" / "status.json").read_text())
    assert (status["state"], status["iteration"]) == ("stopped", 4)
    checkpoint = tmp_path / "two" / "checkpoint-4"
    assert len(list((checkpoint / "pytorch_model_fsdp_0").glob("*.distcp"))) == 2, "each process has written its part"
    assert f"resuming from {checkpoint}" in launch("finetune_sft.py", config)
    assert [row["iteration"] for row in read_metrics(tmp_path / "two") if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(tmp_path / "one"), abs=FSDP_TO_ONE)
    assert_same_weights(tmp_path / "two", tmp_path / "one", FSDP_TO_ONE)
    fields = json.loads((tmp_path / "two" / "hf" / "config.json").read_text())
    assert fields["architectures"] == ["LlamaForCausalLM"]
    assert load_trainable_model(str(tmp_path / "two" / "hf")).generation_config.eos_token_id == [0, 401]


@pytest.mark.slow
def test_sft_in_bf16_trains_fp32_weights(chat_tokenizer_dir: str, tmp_path: Path) -> None:
    """With input and output embeddings that are the same weights."""
    model = make_tiny_llama(tmp_path / "hf", chat_tokenizer_dir, vocab_size=406, tie_word_embeddings=True)
    training = TrainingSettings(max_steps=3, global_batch_size=2, params_dtype="bf16", gradient_checkpointing=True)
    one = sft_config(model, tmp_path, "one", training=training, run=RunSettings())
    finetune_sft(one)
    two = replace(one, save=str(tmp_path / "two"))
    launch("finetune_sft.py", write_config(two, tmp_path / "sft.yaml"), "bf16")
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(tmp_path / "one"), abs=BF16_TO_ONE)
    weights = weights_of(tmp_path / "two")
    before = load_file(Path(model) / "model.safetensors")
    assert weights.keys() == before.keys()
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(weights[name], before[name])
    assert not torch.equal(weights[name].bfloat16().float(), weights[name]), "more digits than bf16 has"


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, LoraSettings(r=4, alpha=8)], ids=["all weights", "adapters"])
def test_dpo_has_the_same_losses(chat_model: str, tmp_path: Path, lora: LoraSettings | None) -> None:
    """With a sharded reference, and with adapters that are merged in the end."""
    training = TrainingSettings(max_steps=4, micro_batch_size=1, global_batch_size=4)
    one = dpo_config(chat_model, tmp_path, "one", training=training, run=RunSettings(), lora=lora)
    finetune_dpo(one)
    two = replace(one, save=str(tmp_path / "two"))
    launch("finetune_dpo.py", write_config(two, tmp_path / "dpo.yaml"))
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(tmp_path / "one"), abs=FSDP_TO_ONE)
    assert_same_weights(tmp_path / "two", tmp_path / "one", FSDP_TO_ONE)


def test_an_unread_model_is_like_a_read_one(chat_model: str) -> None:
    """In names, shapes, precision and what it is configured to do; its rotary embedding is computed."""
    unread, read = unread_model(chat_model), load_trainable_model(chat_model)
    shapes = [{name: (tensor.shape, tensor.dtype) for name, tensor in m.named_parameters()} for m in (unread, read)]
    assert shapes[0] == shapes[1]
    assert torch.equal(unread.model.rotary_emb.inv_freq, read.model.rotary_emb.inv_freq)
    assert unread.generation_config.eos_token_id == read.generation_config.eos_token_id
    assert unread.config._attn_implementation == read.config._attn_implementation


def test_what_cannot_be_sharded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Old FSDP, and dropout that FSDP would draw anew in the backward pass."""
    from megatron_cpt.posttrain import sharding

    monkeypatch.setattr(sharding, "is_sharded", lambda: True)
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(InputError, match="fsdp_version is 1; expected 2"):
        check_sharding(None)
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv("FSDP_ACTIVATION_CHECKPOINTING", "true")
    check_sharding(LoraSettings())
    with pytest.raises(InputError, match=r"lora\.dropout is 0\.1 with accelerate's fsdp_act.*; expected 0, or"):
        check_sharding(LoraSettings(dropout=0.1))


def test_one_process_is_not_sharded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever accelerate has left in the environment."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    assert not is_sharded()
    assert not receives_weights()


def test_gradients_are_summed_in_fp32() -> None:
    """With the forward pass in bf16 as accelerate has it; where nothing is sharded there is nothing to change."""
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16, torch.bfloat16)
    sharded: Any = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=SimpleNamespace(mixed_precision_policy=policy)))
    sum_in_fp32(sharded)
    expected = MixedPrecisionPolicy(torch.bfloat16, torch.float32, torch.bfloat16)
    assert sharded.state.fsdp_plugin.mixed_precision_policy == expected
    whole: Any = SimpleNamespace(state=SimpleNamespace())
    sum_in_fp32(whole)
    assert vars(whole.state) == {}
