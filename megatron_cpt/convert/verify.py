"""Whether two checkpoints, HF folders or Megatron checkpoints in any mix, hold the same weights and compute the same."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import megatron_cpt.platforms.imported_megatron  # noqa: F401  isort: skip  (before megatron is imported)
import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

from megatron_cpt.checkpoint.damage import reading_hf_model
from megatron_cpt.checkpoint.hf_files import HfTensors
from megatron_cpt.checkpoint.layout import find_checkpoint, is_ours
from megatron_cpt.checkpoint.torch_dist import TorchDistReader
from megatron_cpt.config.parallel import ParallelConfig
from megatron_cpt.convert.config import Verify
from megatron_cpt.convert.hf_weights import check_shapes, open_hf, pieces_of
from megatron_cpt.convert.megatron_lm import foreign_config
from megatron_cpt.convert.megatron_weights import MegatronTensors
from megatron_cpt.convert.run_files import is_hf
from megatron_cpt.model.build import build_model, make_transformer_config
from megatron_cpt.model.dtypes import dtype_of
from megatron_cpt.model.llama import LlamaConfig, llama_from, read_llama_config
from megatron_cpt.platforms import current_platform
from megatron_cpt.platforms.process_groups import process_groups
from megatron_cpt.tokenizer import load_tokenizer
from megatron_cpt.utils.errors import InputError, RunError
from megatron_cpt.utils.progress import tracked

TEXT = (
    "Continual pre-training teaches a language model a new language without taking the old one from it. "
    "继续预训练让模型学会一门新的语言，而不忘记原来的语言。 "
    "def mean(values): return sum(values) / len(values)  # 3.14159\n"
)


class DifferentError(RunError):
    """Two checkpoints differ; the text says where. Exit status 1, as of diff."""


@dataclass(frozen=True)
class Checkpoint:
    """One of the two: `folder` of the HF files or of the Megatron checkpoint, and what it computes."""

    path: str
    folder: str
    hf: bool
    llama: LlamaConfig

    def tensors(self) -> HfTensors | MegatronTensors:
        """With HF names.

        Raises:
            InputError: they cannot be read
        """
        if self.hf:
            return open_hf(self.folder, self.llama)
        return MegatronTensors(TorchDistReader(self.folder), self.llama)

    def tokenizer(self) -> str | None:
        """The HF folder with its tokenizer, if it has one."""
        folder = self.folder if self.hf else os.path.join(self.folder, "hf")
        return folder if os.path.exists(os.path.join(folder, "tokenizer_config.json")) else None


def verify(config: Verify) -> str:
    """Compare; returns what was compared and found equal.

    Raises:
        DifferentError: saying what differs, and by how much
        InputError: one of the two cannot be read
    """
    a, b = open_both(config.a, config.b)
    said = []
    if config.tensors:
        said.append(verify_tensors(a, b))
    if config.logits:
        said.append(verify_logits(a, b, config))
    return "; ".join(said)


def open_both(path_a: str, path_b: str) -> tuple[Checkpoint, Checkpoint]:
    """The two checkpoints; one of other software, which counts rows of padding, takes its vocabulary from the other."""
    if is_foreign_checkpoint(path_a) and not is_foreign_checkpoint(path_b):
        b = open_checkpoint(path_b)
        return open_checkpoint(path_a, b.llama.vocab_size), b
    a = open_checkpoint(path_a)
    return a, open_checkpoint(path_b, a.llama.vocab_size if is_foreign_checkpoint(path_b) else None)


def is_foreign_checkpoint(path: str) -> bool:
    """Whether it is a Megatron checkpoint of other software."""
    return not is_hf(path) and not is_ours(find_checkpoint(path))


def open_checkpoint(path: str, vocab_size: int | None = None) -> Checkpoint:
    """A HF folder, a Megatron checkpoint, or the newest one of a run; `vocab_size` of one of other software."""
    if is_hf(path):
        return Checkpoint(path, path, True, read_llama_config(path))
    folder = find_checkpoint(path)
    if is_ours(folder):
        return Checkpoint(path, folder, False, read_llama_config(os.path.join(folder, "hf")))
    return Checkpoint(path, folder, False, llama_from(foreign_config(folder, vocab_size), folder))


def verify_tensors(a: Checkpoint, b: Checkpoint) -> str:
    """Bit by bit, and what the configurations say of how to compute with them."""
    tensors_a, tensors_b = a.tensors(), b.tensors()
    only = sorted(set(tensors_a) ^ set(tensors_b))
    if only:
        raise DifferentError(f"tensor {only[0]} is only in {(a if only[0] in tensors_a else b).path} (of {len(only)} such)")
    names = tracked(list(tensors_a), "comparing")
    differences = [text for name in names if (text := difference(name, tensors_a[name], tensors_b[name]))]
    if differences:
        raise DifferentError(f"{differences[0]} ({len(differences)} of {len(tensors_a)} tensors differ)")
    for field in dataclasses.fields(LlamaConfig):
        x, y = getattr(a.llama, field.name), getattr(b.llama, field.name)
        # dtype is that of the tensors above; the number of positions changes no number
        if x != y and field.name not in ("dtype", "max_position_embeddings"):
            raise DifferentError(f"the tensors are equal, but {field.name} is {x} in {a.path} and {y} in {b.path}")
    return f"{len(tensors_a)} tensors equal, bit by bit"


def verify_logits(a: Checkpoint, b: Checkpoint, config: Verify) -> str:
    """Run one model after the other, each in memory alone."""
    tokens = read_verify_tokens(a, b, config)
    x, y = (logits_of(checkpoint, tokens, config.logits_dtype) for checkpoint in (a, b))
    if x.shape != y.shape:
        raise DifferentError(f"{a.path} has {x.shape[-1]} logits, {b.path} has {y.shape[-1]}")
    largest = (x - y).abs().max().item()
    losses = [torch.nn.functional.cross_entropy(logits[:-1], tokens[1:]).item() for logits in (x, y)]
    agree = (x.argmax(-1) == y.argmax(-1)).double().mean().item()
    found = (
        f"logits of {len(tokens)} tokens in {config.logits_dtype}: largest difference {largest:.3g} (tolerance "
        f"{config.tolerance:g}), mean loss {losses[0]:.6f} and {losses[1]:.6f} (difference {losses[1] - losses[0]:.3g}), "
        f"top-1 agreement {agree:.2%}"
    )
    if not largest <= config.tolerance:
        raise DifferentError(found)
    return found


def read_verify_tokens(a: Checkpoint, b: Checkpoint, config: Verify) -> torch.Tensor:
    """int64 [tokens], by the tokenizer of the first checkpoint, or of the second where the first has none."""
    folder = a.tokenizer() or b.tokenizer()
    if folder is None:
        raise InputError(f"neither {a.path} nor {b.path} has a tokenizer, which --logits needs")
    text, where = TEXT, "the built-in text"
    if config.text is not None:
        where = config.text
        try:
            with open(where, encoding="utf-8") as file:
                text = file.read()
        except UnicodeDecodeError as error:
            raise InputError(f"{where} is not UTF-8: {error}") from error
    tokens = torch.tensor(load_tokenizer(folder).encode(text)[: config.max_tokens])
    if len(tokens) < 2:
        raise InputError(f"{where} has {len(tokens)} tokens; expected 2 or more")
    return tokens


@torch.no_grad()
def logits_of(checkpoint: Checkpoint, tokens: torch.Tensor, dtype: str) -> torch.Tensor:
    """fp32 [tokens, vocabulary]"""
    llama = checkpoint.llama
    if int(tokens.max()) >= llama.vocab_size:
        rows = f"{checkpoint.path} has only {llama.vocab_size} embeddings"
        raise InputError(f"the text has token {int(tokens.max())}, but {rows}")
    tensors = checkpoint.tensors()
    check_shapes(tensors.shapes(), llama, checkpoint.path)
    if checkpoint.hf:
        return hf_logits(checkpoint.folder, tokens, dtype)
    with single_process_model(llama, dtype) as chunk:
        load_weights(chunk, tensors, llama)
        logits = chunk(tokens[None], torch.arange(len(tokens))[None], None)
        return logits[0, :, : llama.vocab_size].float()


def hf_logits(folder: str, tokens: torch.Tensor, dtype: str) -> torch.Tensor:
    """Those of transformers."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    with reading_hf_model(f"transformers' model {folder}", folder):
        model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=dtype_of(dtype))
    logits: torch.Tensor = model(tokens[None]).logits[0].float()
    return logits


def load_weights(chunk: Any, tensors: Mapping[str, torch.Tensor], llama: LlamaConfig) -> None:
    """Fill a whole model of megatron-core's from tensors with HF names.

    Not through megatron-core's own loading, which unpickles what it finds and compares no checksums.
    """
    state: dict[str, Any] = {"model": chunk.sharded_state_dict()}
    apply_factories(state)
    places = {
        (tensor.key, tensor.global_offset): tensor.data
        for tensor in nested_values(state)
        if isinstance(tensor, ShardedTensor)
    }
    pieces = pieces_of(llama, torch.float32)
    for piece in pieces:
        data = places.pop((piece.chunk.key, piece.chunk.offset))
        data.copy_(piece.make(tensors, llama).reshape(data.shape))
    assert not places, f"nothing fills {list(places)}"


@contextlib.contextmanager
def single_process_model(llama: LlamaConfig, dtype: str) -> Iterator[Any]:
    """The whole model on CPU, uninitialised, within a process group of one."""
    parallel = ParallelConfig()
    with process_groups(parallel, alone=True) as ranks:
        config = make_transformer_config(llama, parallel, dtype_of(dtype))
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
