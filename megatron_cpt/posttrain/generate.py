"""Text from a Hugging Face checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_cpt.checkpoint.hf_model import load_hf_model
from megatron_cpt.checkpoint.hf_tokenizer import load
from megatron_cpt.model.hf_folder import check_model
from megatron_cpt.posttrain.template_files import no_tokens
from megatron_cpt.posttrain.turn_end import turn_end


def load_model(folder: str) -> tuple[Any, Any]:
    """(model, tokenizer) of a HF folder, on CPU, in the dtype it was saved in.

    Raises:
        InputError: a file is missing or damaged
    """
    check_model(folder)
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return load_hf_model(folder, dtype="auto").eval(), load(folder)


def complete(folder: str, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
    """Greedy completions (the new text only), with a mild penalty on repetition; stops at the end of a text or turn.

    Raises:
        InputError: the model cannot be read, or its tokenizer makes no token of a prompt
    """
    import torch

    model, tokenizer = load_model(folder)
    end = turn_end(tokenizer, model.generation_config)
    completions = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt")
        if inputs["input_ids"].shape[1] == 0:
            raise no_tokens(prompt, folder)
        with torch.inference_mode():
            output = model.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                repetition_penalty=1.2,
                eos_token_id=list(end.token_ids) or None,
                pad_token_id=tokenizer.eos_token_id,
            )
        completions.append(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return completions
