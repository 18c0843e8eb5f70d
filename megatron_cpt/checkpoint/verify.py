"""Whether two checkpoints, HF folders or Megatron checkpoints in any mix, hold the same weights and compute the same."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import track

from megatron_cpt.checkpoint.convert import open_megatron
from megatron_cpt.checkpoint.hf_weights import open_hf
from megatron_cpt.checkpoint.layout import find_checkpoint
from megatron_cpt.checkpoint.save_load import dtype_of, load_checkpoint
from megatron_cpt.config.parallel import ParallelConfig
from megatron_cpt.errors import InputError, RunError
from megatron_cpt.model.build import build_model, transformer_config
from megatron_cpt.model.llama import LlamaConfig, read_llama_config
from megatron_cpt.platforms import current_platform
from megatron_cpt.platforms.process_groups import process_groups
from megatron_cpt.tokenizer import load_tokenizer

TEXT = (
    "Continual pre-training teaches a language model a new language without taking the old one from it. "
    "继续预训练让模型学会一门新的语言，而不忘记原来的语言。 "
    "def mean(values): return sum(values) / len(values)  # 3.14159\n"
)


@dataclass(frozen=True)
class Verify:
    """Compare two checkpoints (HF folders or Megatron checkpoints, in any mix) tensor by tensor, bit by bit."""

    a: str
    """One checkpoint."""
    b: str
    """The other."""
    tensors: bool = True
    """Compare the weights; without it, only what --logits asks for."""
    logits: bool = False
    """Run both models (transformers on HF folders, megatron-core on Megatron checkpoints) and compare what they compute."""
    text: str | None = None
    """File with the text to run them on; a few sentences and a line of code otherwise."""
    max_tokens: int = 512
    """Of the text, the tokens that are used."""
    tolerance: float = 1e-3
    """Largest difference between two logits that passes."""
    logits_dtype: Literal["float32", "bfloat16"] = "float32"
    """In which the models are run; a model takes its size in this dtype as memory."""


class DifferentError(RunError):
    """Two checkpoints differ; the text says where. Exit status 1, as of diff."""


def verify(config: Verify) -> str:
    """Compare; returns what was compared and found equal.

    Raises:
        DifferentError: saying what differs, and by how much
        InputError: one of the two cannot be read
    """
    if not (config.tensors or config.logits):
        raise InputError("tensors and logits are both false: there is nothing to compare")
    said = []
    if config.tensors:
        said.append(verify_tensors(config.a, config.b))
    if config.logits:
        said.append(verify_logits(config))
    return "; ".join(said)


def verify_tensors(path_a: str, path_b: str) -> str:
    """Bit by bit."""
    a, b = open_checkpoint(path_a), open_checkpoint(path_b)
    only = sorted(set(a) ^ set(b))
    if only:
        raise DifferentError(f"tensor {only[0]} is only in {path_a if only[0] in a else path_b} (of {len(only)} such)")
    console = Console(stderr=True)
    names = track(list(a), "comparing", console=console, transient=True, disable=not console.is_terminal)
    differences = [text for name in names if (text := difference(name, a[name], b[name]))]
    if differences:
        raise DifferentError(f"{differences[0]} ({len(differences)} of {len(a)} tensors differ)")
    return f"{len(a)} tensors equal, bit by bit"


def verify_logits(config: Verify) -> str:
    """Run one model after the other, each in memory alone."""
    tokens = tokens_of(config)
    a, b = (logits_of(path, tokens, config.logits_dtype) for path in (config.a, config.b))
    if a.shape != b.shape:
        raise DifferentError(f"{config.a} has {a.shape[-1]} logits, {config.b} has {b.shape[-1]}")
    largest = (a - b).abs().max().item()
    losses = [torch.nn.functional.cross_entropy(x[:-1], tokens[1:]).item() for x in (a, b)]
    agree = (a.argmax(-1) == b.argmax(-1)).double().mean().item()
    found = (
        f"logits of {len(tokens)} tokens in {config.logits_dtype}: largest difference {largest:.3g} (tolerance "
        f"{config.tolerance:g}), mean loss {losses[0]:.6f} and {losses[1]:.6f} (difference {losses[1] - losses[0]:.3g}), "
        f"top-1 agreement {agree:.2%}"
    )
    if not largest <= config.tolerance:
        raise DifferentError(found)
    return found


def tokens_of(config: Verify) -> torch.Tensor:
    """int64 [tokens], by the tokenizer of the first checkpoint."""
    tokenizer = load_tokenizer(hf_folder(config.a))
    text = TEXT
    if config.text is not None:
        with open(config.text, encoding="utf-8") as file:
            text = file.read()
    tokens = torch.tensor(tokenizer.encode(text)[: config.max_tokens])
    if len(tokens) < 2:
        raise InputError(
            f"the text of {config.text} has {len(tokens)} tokens, of which max_tokens {config.max_tokens}; use 2 or more"
        )
    return tokens


@torch.no_grad()
def logits_of(path: str, tokens: torch.Tensor, dtype: str) -> torch.Tensor:
    """fp32 [tokens, vocabulary]"""
    llama = read_llama_config(hf_folder(path))
    if int(tokens.max()) >= llama.vocab_size:
        raise InputError(f"the text has token {int(tokens.max())}, but {path} has only {llama.vocab_size} embeddings")
    if is_hf(path):
        from transformers import LlamaForCausalLM

        model = LlamaForCausalLM.from_pretrained(path, dtype=dtype_of(dtype))
        return model(tokens[None]).logits[0].float()
    with single_process_model(llama, dtype) as chunk:
        load_checkpoint(find_checkpoint(path), [chunk])
        logits = chunk(tokens[None], torch.arange(len(tokens))[None], None)
        return logits[0, :, : llama.vocab_size].float()


@contextlib.contextmanager
def single_process_model(llama: LlamaConfig, dtype: str) -> Iterator[Any]:
    """The whole model on CPU, uninitialised, within a process group of one."""
    parallel = ParallelConfig()
    with process_groups(parallel, alone=True) as ranks:
        config = transformer_config(llama, parallel, dtype_of(dtype))
        yield build_model(llama, config, llama.max_position_embeddings, current_platform(), ranks)


def difference(name: str, x: torch.Tensor, y: torch.Tensor) -> str | None:
    """What is different between two tensors, None if they are equal bit by bit."""
    if (x.dtype, x.shape) != (y.dtype, y.shape):
        return f"tensor {name}: {x.dtype} {list(x.shape)} against {y.dtype} {list(y.shape)}"
    if torch.equal(as_bytes(x), as_bytes(y)):
        return None
    return f"tensor {name} differs by up to {(x.float() - y.float()).abs().max().item():.3g}"


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bits of a tensor, so that NaN equals NaN and 0.0 does not equal -0.0."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def is_hf(path: str) -> bool:
    """Whether a folder is a HF folder, not one of Megatron checkpoints."""
    return os.path.exists(os.path.join(path, "config.json"))


def hf_folder(path: str) -> str:
    """Where a checkpoint's HF configuration and tokenizer are."""
    return path if is_hf(path) else os.path.join(find_checkpoint(path), "hf")


def open_checkpoint(path: str) -> Mapping[str, torch.Tensor]:
    """Tensors with HF names."""
    return open_hf(path, read_llama_config(path)) if is_hf(path) else open_megatron(find_checkpoint(path))
