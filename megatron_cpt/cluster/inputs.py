"""What the check trains: a small model with random weights, and the text of this package's own sources."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml

from megatron_cpt.cluster.check import Check, Figures, succeeded
from megatron_cpt.cluster.job import ClusterJob

PACKAGE = Path(__file__).parent.parent
TOOLS = PACKAGE.parent / "tools"
SEQ_LENGTH, VOCAB_SIZE = 128, 512
# Sizes that tensor parallelism of 8, pipelines of 8 and FP8 can divide; rope scaling as Llama 3.1 has it.
MODEL = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}
WEIGHT_STD = 0.05  # larger than at a usual start, so that differences show


def make(job: ClusterJob) -> str | None:
    """Model, corpora and mixture, through the tools, on the first rank; what went wrong, or None."""
    if job.is_rank_zero:
        make_tokenizer_and_model(job.folder / "hf")
        files = sorted(PACKAGE.rglob("*.py"))
        for part, name in enumerate(("general", "additional")):
            # Paragraphs: most samples hold several documents, which packing has to tell apart
            texts = [text for file in files[part::2] for text in file.read_text(encoding="utf-8").split("\n\n") if text]
            lines = [json.dumps({"text": text}) for text in texts]
            (job.folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        half = {"general": [{"prefix": "general"}], "additional": [{"prefix": "additional"}]}
        mixture = {"seq_length": SEQ_LENGTH, "seed": 7, "almr": 0.33, **half}
        (job.folder / "mixture.yaml").write_text(yaml.safe_dump(mixture))
    for name, command in commands(job.folder):
        ended = job.run(name, [sys.executable, *command], 1, 120)
        succeeded(ended, job.rank, f"{Path(command[0]).name} is to blame: see its log")
    return None


def commands(folder: Path) -> list[tuple[str, list[str]]]:
    """Of the tools: both corpora, then the checkpoint."""
    found = []
    for name in ("general", "additional"):
        text, prefix = str(folder / f"{name}.jsonl"), str(folder / name)
        command = [str(TOOLS / "preprocess_data.py"), "--input", text, "--output_prefix", prefix, "--language", "en"]
        found.append((name, [*command, "--tokenizer", str(folder / "hf"), "--workers", "1", "--overwrite"]))
    convert = [str(TOOLS / "convert_checkpoint.py"), "hf-to-megatron", "--hf", str(folder / "hf"), "--overwrite"]
    return [*found, ("convert", [*convert, "--megatron", str(folder / "megatron")])]


def make_tokenizer_and_model(folder: Path) -> None:
    """A byte-level BPE of this package's sources, and a Llama with random weights."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils.logging import disable_progress_bar

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    texts = [file.read_text(encoding="utf-8") for file in sorted(PACKAGE.glob("*/*.py"))[:40]]
    tokenizer.train_from_iterator(texts, trainer)
    model = LlamaForCausalLM(LlamaConfig(**MODEL))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, WEIGHT_STD, generator=generator)
    disable_progress_bar()
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", bos_token="<eos>").save_pretrained(folder)


def judge_inputs(found: Any) -> tuple[str, Figures]:
    return "a small model and two corpora, made by the tools", {}


CHECKS = (Check("inputs", make, judge_inputs),)
