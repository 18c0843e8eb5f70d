"""The model that SFT and DPO begin with: whole weights, whatever lies beside them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import make_tiny_llama

from megatron_cpt.checkpoint.weight_files import weight_files
from megatron_cpt.model.hf_folder import adapter_note, check_model
from megatron_cpt.posttrain.models import load_trainable_model, model_to_train
from megatron_cpt.posttrain.templates import load_template
from megatron_cpt.utils.errors import InputError


@pytest.fixture(scope="module")
def adapter(chat_model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the tiny model that changes it, as PEFT writes it."""
    import peft

    folder = tmp_path_factory.mktemp("adapter")
    model = peft.get_peft_model(load_trainable_model(chat_model), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.constant_(parameter, 0.5)
    model.save_pretrained(folder)
    return folder


def test_an_adapter_beside_merged_weights_is_not_applied_again(adapter: Path, chat_model: str, tmp_path: Path) -> None:
    model = tmp_path / "merged"
    shutil.copytree(chat_model, model)
    assert adapter_note(str(model)) is None
    expected = load_trainable_model(str(model)).state_dict()
    for path in adapter.glob("adapter_*"):
        shutil.copy(path, model)
    check_model(str(model))
    assert "adapter_config.json beside them" in str(adapter_note(str(model)))
    assert weight_files(str(model)) == ["model.safetensors"]
    found = load_trainable_model(str(model)).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_weights_that_lack_their_adapter_are_refused(adapter: Path, chat_tokenizer_dir: str, tmp_path: Path) -> None:
    """An adapter alone, one beside the weights that it is meant for, and one whose configuration is damaged."""
    alone = tmp_path / "alone"
    shutil.copytree(adapter, alone)
    with pytest.raises(InputError, match=r"alone holds an adapter of .* and no weights of its own"):
        check_model(str(alone))
    base = Path(make_tiny_llama(tmp_path / "base", chat_tokenizer_dir))
    config = json.loads((adapter / "adapter_config.json").read_text())
    (base / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
    with pytest.raises(InputError, match=r"adapter_config\.json: base_model_name_or_path is .*, so that the weights"):
        check_model(str(base))
    (base / "adapter_config.json").write_text("[]")
    with pytest.raises(InputError, match=r"adapter_config\.json names no base_model_name_or_path"):
        check_model(str(base))


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapter_is_no_weights(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(InputError, match=r"holds no \.safetensors file"):
        weight_files(str(tmp_path))


@pytest.fixture
def model(chat_model: str, tmp_path: Path) -> Path:
    """A copy to change files of."""
    shutil.copytree(chat_model, tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"temperature": 0.9, "top_p": 0.6}, {"temperature": 0.9, "top_p": 0.6, "do_sample": True}),  # Llama-2-chat's
        ({"temperature": 0.9, "do_sample": False}, {"do_sample": False}),
        ({"temperature": 0.6, "do_sample": True}, {"temperature": 0.6, "do_sample": True}),
        ({"max_length": 4096}, {"max_length": 4096}),
    ],
)
def test_generation_settings_are_written_again(
    model: Path, tmp_path: Path, settings: dict[str, Any], expected: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    (model / "generation_config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": [0, 3]} | settings))
    found = model_to_train(str(model), load_template(str(model), "chatml"), True)
    assert ("reads but does not write" in capfd.readouterr().err) == (settings != expected)
    found.generation_config.save_pretrained(tmp_path / "again")
    written = json.loads((tmp_path / "again" / "generation_config.json").read_text())
    settings = {name: value for name, value in written.items() if name not in ("transformers_version", "_from_model_config")}
    assert settings == expected | {"bos_token_id": 0, "eos_token_id": [0, 3, 401]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"generation_config\.json is not JSON"),
        (
            '{"length_penalty": 2.0}',
            r"generation_config\.json: .*length_penalty.*; expected settings that transformers writes",
        ),
        ('{"max_new_tokens": -3}', "max_new_tokens"),
    ],
)
def test_generation_settings_that_cannot_be_written(model: Path, content: str, message: str) -> None:
    (model / "generation_config.json").write_text(content)
    with pytest.raises(InputError, match=message):
        model_to_train(str(model), load_template(str(model), "chatml"), False)
