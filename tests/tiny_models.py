"""Tiny random Llama models in Hugging Face format, and runs of the real tools on them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from fork_server import ENVIRONMENT, forked_python

ROOT = Path(__file__).parent.parent
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
# name -> what differs from the default tiny model
VARIANTS: dict[str, dict[str, Any]] = {
    "untied": {"tie_word_embeddings": False},
    "tied": {"tie_word_embeddings": True},
    "llama3_rope": {"tie_word_embeddings": False, "rope_parameters": LLAMA3_ROPE},
    "wide_heads": {"tie_word_embeddings": False, "head_dim": 32},  # heads * head_dim != hidden_size
    "biases": {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
    "attention_bias": {"tie_word_embeddings": True, "attention_bias": True},
    "mlp_bias": {"tie_word_embeddings": False, "mlp_bias": True},
    "odd_vocabulary": {"tie_word_embeddings": False, "vocab_size": 401},
}


def make_tiny_llama(folder: Path, tokenizer_dir: str, dtype: torch.dtype = torch.float32, **changes: Any) -> str:
    """Save a random grouped-query Llama (4 layers, hidden 64) with the tiny tokenizer; returns the folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "vocab_size": 400,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**settings | changes))
    for parameter in model.parameters():  # larger weights than the default, so that differences show
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.ndim == 1 else 0.0, std=0.08)
    model.to(dtype).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(tokenizer_dir) / name, folder)
    return str(folder)


def write_empty_weights(folder: Path) -> None:
    """model.safetensors with the names and shapes of a Llama's tensors, but no number; of another model, with none."""
    from megatron_cpt.model.llama import hf_shapes, read_llama_config
    from megatron_cpt.utils.errors import InputError

    try:
        shapes = hf_shapes(read_llama_config(str(folder)))
    except InputError:
        shapes = {}
    tensors = {name: {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]} for name, shape in shapes.items()}
    header = json.dumps(tensors).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)


def command_of(tool: str) -> list[str]:
    """What starts a tool, whose imports were done before (see forked_python.py); for `ENVIRONMENT` of fork_server.py."""
    return [forked_python(tool), str(ROOT / "tools" / tool)]


def tools() -> list[Path]:
    """The tools, without those that only have another name by now."""
    return [path for path in sorted((ROOT / "tools").glob("*.py")) if "is now called" not in path.read_text()]


def run_tool(
    tool: str, *arguments: str, processes: int = 1, check: bool = True, gpu: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run a tool as a user would, under torchrun when it takes several processes; without `gpu` it sees none.

    Its imports were done before: see forked_python.py.
    """
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)] if processes > 1 else []
    if launcher:  # any free port: several runs may be under way
        launcher += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    result = subprocess.run(
        [sys.executable if gpu else forked_python(tool), *launcher, str(ROOT / "tools" / tool), *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | ({"OMP_NUM_THREADS": "1"} if gpu else ENVIRONMENT),
    )
    if check and result.returncode:
        raise AssertionError(f"{tool} {' '.join(arguments)} exited with {result.returncode}:\n{result.stderr[-6000:]}")
    return result


def write_yaml(path: Path, content: dict[str, Any]) -> str:
    path.write_text(yaml.safe_dump(content))
    return str(path)


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl of a run."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
