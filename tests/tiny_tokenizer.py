"""A tokenizer small enough to train anew for every session of tests."""

from __future__ import annotations

import json
from pathlib import Path

TRAINING_TEXT = [
    "The quick brown fox jumps over the lazy dog. The dog sleeps, the fox runs away into the woods.",
    "Continual pre-training teaches a language model a new language while it keeps what it knows.",
    "持续预训练让语言模型学习一门新的语言，同时保留已经掌握的知识。今天天气很好，我们去公园散步。",
    "In 2024 there were 365 days and 1 more; numbers like 3.14 and 1,000,000 are split by the tokenizer.",
]
TEMPLATE_TOKENS = [
    "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
]  # fmt: skip


def make_tiny_tokenizer(folder: Path) -> str:
    """Save a byte-level BPE of 400 tokens in Hugging Face's format; returns the folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TRAINING_TEXT * 4, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|endoftext|>",
        "bos_token": "<|endoftext|>",
        "model_max_length": 4096,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder)


def add_template_tokens(folder: Path) -> None:
    """The tokens of both templates, as special ones from id 400 on."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content["added_tokens"] += [{"id": 400 + i, "content": token, **flags} for i, token in enumerate(TEMPLATE_TOKENS)]
    path.write_text(json.dumps(content))
