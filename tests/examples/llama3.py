"""A folder in which the recipes of examples/llama3_8b and llama3_70b find all they name, but for real text and weights."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from tiny_models import ROOT

from megatron_cpt.config.cli import read_arguments
from megatron_cpt.config.run import RunConfig
from megatron_cpt.corpus.preprocess import PreprocessConfig, preprocess

# What both models' published config.json have in common, and what they have not.
LLAMA_3: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 8192,
    "model_type": "llama",
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}
SHAPES = {
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_hidden_layers": 32},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_hidden_layers": 80},
}


@dataclass(frozen=True)
class Recipe:
    """A CPT recipe on the cluster it is for."""

    size: str
    name: str
    device: str

    @property
    def path(self) -> str:
        return f"examples/llama3_{self.size}/{self.name}.yaml"

    @property
    def gpus(self) -> int:
        return {"8b": 32, "70b": 128}[self.size]

    @property
    def model(self) -> str:
        """HF folder."""
        return f"models/Meta-Llama-3-{self.size.upper()}"

    def read(self, *options: str) -> RunConfig:
        """As pretrain_cpt.py reads it; the project's folder is the working directory."""
        return read_arguments(RunConfig, ["--config", self.path, *options])

    def __str__(self) -> str:
        return f"{self.size}-{self.name}"


RECIPES = [
    Recipe(size, name, device)
    for size in ("8b", "70b")
    for name, device in (("cpt", "a100-80g"), ("cpt_8k", "h100"), ("cpt_8k_fp8", "h100"))
]


def make_project(folder: Path, tokenizer_dir: str) -> Path:
    """A project's folder as the recipes expect it: models without weights, and small corpora of every name."""
    for size, shape in SHAPES.items():
        shutil.copytree(ROOT / f"examples/llama3_{size}", folder / f"examples/llama3_{size}")
        model = folder / f"models/Meta-Llama-3-{size.upper()}"
        shutil.copytree(tokenizer_dir, model)
        (model / "config.json").write_text(json.dumps(LLAMA_3 | shape))
        release = folder / f"runs/llama3-{size}/megatron/release"
        shutil.copytree(model, release / "hf")
        contents = {
            "metadata.json": '{"sharded_backend": "torch_dist"}',
            ".metadata": "",
            "common.pt": "",
            "manifest.json": "{}",
        }
        for name, content in contents.items():
            (release / name).write_text(content)
    mixture = yaml.safe_load((folder / "examples/llama3_8b/mixture.yaml").read_text())
    for number, corpus in enumerate(corpora_of(mixture)):
        make_corpus(folder / "examples/llama3_8b" / corpus["prefix"], number, tokenizer_dir)
    (folder / "raw/valid").mkdir(parents=True)
    for name in ("en", "zh", "sft_zh"):
        (folder / f"raw/valid/{name}.jsonl").touch()
    return folder


def corpora_of(mixture: dict[str, Any]) -> list[dict[str, Any]]:
    """Every corpus of a mixture file, also of its groups and its validation sets."""
    entries = [*mixture["general"], *mixture["additional"], *mixture["validation"]]
    return [corpus for entry in entries for corpus in entry.get("corpora", [entry])]


def make_corpus(prefix: Path, number: int, tokenizer_dir: str) -> None:
    """A corpus of more than a sample of 8,192 tokens, unlike the others."""
    source = Path(f"{prefix.resolve()}.jsonl")
    source.parent.mkdir(parents=True, exist_ok=True)
    words = {"en": "The quick brown fox jumps over the lazy dog. ", "zh": "今天天气很好，我们去公园散步。"}
    language = prefix.name[:2]
    source.write_text("".join(json.dumps({"text": f"{number} {i} {words[language] * 20}"}) + "\n" for i in range(60)))
    preprocess(PreprocessConfig([str(source)], tokenizer_dir, str(source.with_suffix("")), language=language, workers=1))
