"""Text from a Hugging Face checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_cpt.checkpoint.hf_model import load_hf_model
from megatron_cpt.checkpoint.hf_tokenizer import load_hf_tokenizer
from megatron_cpt.model.hf_folder import check_answer_fits, check_model, most_new_tokens, positions_of_config
from megatron_cpt.posttrain.settings import REPETITION_PENALTY
from megatron_cpt.posttrain.template_files import no_tokens
from megatron_cpt.posttrain.turn_end import turn_end


def load_generator(folder: str, dtype: Any = "auto") -> tuple[Any, Any]:
    """(model, tokenizer) of a HF folder, on CPU.

    `dtype`: torch's; "auto": the one it was saved in.

    Raises:
        InputError: a file is missing or damaged
    """
    check_model(folder)
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return load_hf_model(folder, dtype=dtype).eval(), load_hf_tokenizer(folder)


def sampling(temperature: float, top_p: float) -> dict[str, Any]:
    """Options of transformers' generate: how the next token is drawn; at temperature 0 it is the likeliest."""
    if temperature:
        return {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}  # 0: of all tokens
    return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


def complete_text(
    folder: str,
    prompts: Sequence[str],
    max_new_tokens: int | None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    repetition_penalty: float = REPETITION_PENALTY,
    seed: int | None = None,
    dtype: Any = "auto",
) -> list[str]:
    """Completions (the new text only), to the end of a text or turn; by default greedy, with a mild penalty on repetition.

    `max_new_tokens`: None: see `most_new_tokens`. The others: see ChatConfig.

    Raises:
        InputError: the model cannot be read or has too few positions, or its tokenizer makes no token of a prompt
    """
    import torch

    model, tokenizer = load_generator(folder, dtype)
    end = turn_end(tokenizer, model.generation_config)
    positions = positions_of_config(model.config)
    new_tokens = max_new_tokens or most_new_tokens(positions)
    if seed is not None:
        torch.manual_seed(seed)
    completions = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt")
        if inputs["input_ids"].shape[1] == 0:
            raise no_tokens(prompt, folder)
        check_answer_fits(folder, positions, prompt, inputs["input_ids"].shape[1], new_tokens)
        with torch.inference_mode():
            output = model.generate(
                **inputs,
                max_new_tokens=new_tokens,
                **sampling(temperature, top_p),
                repetition_penalty=repetition_penalty,
                eos_token_id=list(end.token_ids) or None,
                pad_token_id=tokenizer.eos_token_id,
            )
        completions.append(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return completions
