"""The folder that a run leaves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import make_tiny_llama

from megatron_cpt.posttrain.models import load_trainable_model
from megatron_cpt.posttrain.runner import write_model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_weight_is_written_once(chat_tokenizer_dir: str, tmp_path: Path, tied: bool, dtype: torch.dtype) -> None:
    """Under one name, also where its copies under two names share no memory, as those that FSDP gathers."""
    folder = make_tiny_llama(tmp_path / "hf", chat_tokenizer_dir, vocab_size=406, tie_word_embeddings=tied)
    model = load_trainable_model(folder)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    write_model(model, weights, str(tmp_path / "out"), True, dtype)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert ("lm_head.weight" in written) != tied
    assert written.keys() == load_file(Path(folder) / "model.safetensors").keys()
    again = load_trainable_model(str(tmp_path / "out"))
    assert torch.equal(again.lm_head.weight, model.lm_head.weight.to(dtype).float())
