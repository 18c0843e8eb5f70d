"""megatron-core computes what transformers computes, on the same weights and tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import VARIANTS, make_tiny_llama

from megatron_cpt.checkpoint.save_load import load_checkpoint
from megatron_cpt.convert.config import HfToMegatron
from megatron_cpt.convert.convert import hf_to_megatron
from megatron_cpt.convert.verify import single_process_model
from megatron_cpt.model.llama import read_llama_config

SEQ_LENGTH = 128  # beyond original_max_position_embeddings, so that rope scaling matters


@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_and_logits_equal_transformers(variant: str, tmp_path: Path, tiny_tokenizer_dir: str) -> None:
    from transformers import LlamaForCausalLM

    hf = make_tiny_llama(tmp_path / "hf", tiny_tokenizer_dir, **VARIANTS[variant])
    checkpoint = hf_to_megatron(HfToMegatron(hf, str(tmp_path / "megatron")))
    tokens = torch.randint(0, 400, (3, SEQ_LENGTH + 1), generator=torch.Generator().manual_seed(1))
    inputs, targets = tokens[:, :-1], tokens[:, 1:].contiguous()

    with torch.no_grad():
        expected_logits = LlamaForCausalLM.from_pretrained(hf, dtype=torch.float32)(inputs).logits
        expected_loss = torch.nn.functional.cross_entropy(expected_logits.flatten(0, 1), targets.flatten())
        with single_process_model(read_llama_config(hf), "float32") as model:
            load_checkpoint(checkpoint, [model])
            device = next(model.parameters()).device
            inputs, targets = inputs.to(device), targets.to(device)
            position_ids = torch.arange(SEQ_LENGTH, device=device).expand(3, -1)
            logits = model(inputs, position_ids, None).cpu()
            loss = model(inputs, position_ids, None, labels=targets).mean().cpu()

    assert expected_logits.std() > 0.1, "a model with constant logits would compare equal to anything"
    assert (logits - expected_logits).abs().max() <= 1e-3
    assert abs(loss - expected_loss) <= 1e-5 * expected_loss
