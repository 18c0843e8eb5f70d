"""Models that say what a test wants: each token is followed by the one that was agreed upon, whatever comes before it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tiny_models import make_tiny_llama

from megatron_cpt.convert.vocabulary import load_hf_tokenizer
from megatron_cpt.posttrain.conversations import Message
from megatron_cpt.posttrain.templates import PromptTemplate


def make_reciter(folder: Path, tokenizer_dir: str, chain: Sequence[int], **changes: Any) -> str:
    """Save a model under which each token of `chain` is followed by the next; returns the folder.

    Its layers add nothing to the embedding of the token, and the row of the output layer of a token is the embedding of
    the one before it in the chain.

    Args:
        chain: different tokens
    """
    from transformers import LlamaForCausalLM

    assert len(set(chain)) == len(chain), chain
    make_tiny_llama(folder, tokenizer_dir, num_hidden_layers=1, tie_word_embeddings=False, vocab_size=406, **changes)
    model = LlamaForCausalLM.from_pretrained(folder)
    layer, norm = model.model.layers[0], model.model.norm
    with torch.no_grad():
        for weight in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight, model.lm_head.weight):
            weight.zero_()
        norm.weight.fill_(1.0)
        for before, after in itertools.pairwise(chain):
            model.lm_head.weight[after] = model.model.embed_tokens.weight[before]
    model.save_pretrained(folder)
    return str(folder)


def set_json(path: Path, **fields: Any) -> None:
    """Change fields of a JSON file, which need not be there; None: take the field out."""
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({name: value for name, value in (content | fields).items() if value is not None}))


def last_of_prompt(folder: str, template: str, question: str) -> int:
    """The last token of what a model is asked."""
    tokenizer = load_hf_tokenizer(folder)
    return int(tokenizer.encode(PromptTemplate(tokenizer, template).prompt([Message("user", question)]))[-1])


def tokens_of(folder: str, *texts: str) -> list[int]:
    """Of texts, one after the other."""
    tokenizer = load_hf_tokenizer(folder)
    return [number for text in texts for number in tokenizer.encode(text, add_special_tokens=False)]
