"""Logits and loss against transformers on this device, as JSON: ... measure_logits FOLDER TARGET DTYPE TRANSFORMER_IMPL.

FOLDER holds hf/ and megatron/ with the same weights.
"""

from __future__ import annotations

import json
import sys

import megatron_cpt.platforms.imported_megatron  # noqa: F401  isort: skip  (before megatron is imported)
import torch
from transformers import LlamaForCausalLM

from megatron_cpt.checkpoint.layout import find_checkpoint
from megatron_cpt.checkpoint.save_load import load_checkpoint
from megatron_cpt.config.parallel import ParallelConfig
from megatron_cpt.model.build import Numerics, build_model, make_transformer_config
from megatron_cpt.model.dtypes import dtype_of
from megatron_cpt.model.llama import read_llama_config
from megatron_cpt.platforms import current_platform
from megatron_cpt.platforms.process_groups import process_groups
from megatron_cpt.utils.logs import start_logs

SEQ_LENGTH, BATCH = 256, 2


def main(folder: str, target: str, dtype: str, transformer_impl: str) -> None:
    """Write the differences to `target`; transformers computes in fp32, whatever `dtype`."""
    llama, parallel = read_llama_config(f"{folder}/hf"), ParallelConfig()
    tokens = torch.randint(0, llama.vocab_size, (BATCH, SEQ_LENGTH + 1), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), process_groups(parallel, alone=True) as ranks:
        inputs, targets = tokens[:, :-1].to(ranks.device), tokens[:, 1:].to(ranks.device).contiguous()
        theirs = LlamaForCausalLM.from_pretrained(f"{folder}/hf", dtype=torch.float32).to(ranks.device)
        wanted = theirs(inputs).logits
        wanted_loss = torch.nn.functional.cross_entropy(wanted.flatten(0, 1), targets.flatten()).item()
        config = make_transformer_config(llama, parallel, dtype_of(dtype), Numerics(transformer_impl=transformer_impl))
        model = build_model(llama, config, SEQ_LENGTH, current_platform(), ranks)
        load_checkpoint(find_checkpoint(f"{folder}/megatron"), [model])
        logits = model(inputs, None, None).float()
        loss = model(inputs, None, None, labels=targets).float().mean().item()
    found = {
        "largest_difference": (logits - wanted).abs().max().item(),
        "standard_deviation": wanted.std().item(),
        "loss": loss,
        "loss_of_transformers": wanted_loss,
        "layers": type(model.decoder.layers[0].self_attention.core_attention).__name__,
    }
    with open(target, "w", encoding="utf-8") as file:
        json.dump(found, file)


if __name__ == "__main__":
    start_logs()
    main(*sys.argv[1:5])
