"""A Hugging Face folder as transformers' model, all of whose weights were there."""

from __future__ import annotations

from typing import Any

from megatron_cpt.checkpoint.damage import reading_hf_model
from megatron_cpt.checkpoint.hf_files import WITHOUT_ADAPTERS
from megatron_cpt.checkpoint.weight_files import named
from megatron_cpt.model.llama import check_shape
from megatron_cpt.utils.errors import InputError


def load_hf_model(folder: str, **options: Any) -> Any:
    """transformers' causal language model of a folder; `options`: of its `from_pretrained`.

    transformers gives weights that it does not find random numbers, and goes on. Of those that do not fit its last line
    says only which of its options to set.

    Raises:
        InputError: a file is damaged, weights are missing or of another shape, or a number is not finite
    """
    import torch
    import transformers

    with reading_hf_model(f"model {folder}", folder):
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **WITHOUT_ADAPTERS,
            **options,
        )
    if missing := sorted(found["missing_keys"]):
        raise InputError(f"model {folder}: its weights lack {named(missing)}; expected all that config.json asks for")
    for name, its, wanted in sorted(found["mismatched_keys"])[:1]:
        check_shape(f"model {folder}", name, its, wanted)
    for name, tensor in model.named_parameters():
        if tensor.numel() and not all(torch.isfinite(bound) for bound in tensor.detach().aminmax()):
            raise InputError(f"model {folder}: tensor {name} holds numbers that are not finite (NaN or infinity)")
    return model
