"""The settings of tools/convert_checkpoint.py; they import no torch, so that a wrong one is refused at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Dtype = Literal["keep", "float32", "bfloat16", "float16"]
NewRows = Literal["subtokens", "mean", "zero"]


@dataclass(frozen=True)
class HfToMegatron:
    """Convert a Hugging Face Llama checkpoint into a Megatron checkpoint (torch_dist, loads in any layout)."""

    hf: str
    """HF folder: config.json, *.safetensors (or pytorch_model*.bin), tokenizer."""
    megatron: str
    """Folder to write; the checkpoint goes into its subfolder "release"."""
    dtype: Dtype = "keep"
    """Of the written weights; keep wants all tensors to have one dtype."""
    extend_tokenizer: str | None = None
    """HF folder of a tokenizer with all tokens of the model's own under the same ids, and more: rows are added for those."""
    added_tokens: str | None = None
    """File with a token on each line, to be added to the model's tokenizer: rows are added for them."""
    new_rows: NewRows = "subtokens"
    """What rows of new tokens begin as: the mean of the rows of what their text was before, the mean of all rows and a
    little noise, or zero."""
    repair_rows: bool = False
    """Make rows near zero, which nobody has trained, the mean of all rows and a little noise."""
    seed: int = 1234
    """Of the noise."""
    num_workers: int = 2
    """Processes that write files at the same time."""
    overwrite: bool = False
    check_only: bool = False
    """Say what would be written, after everything that can be known to be wrong before, and write nothing."""


@dataclass(frozen=True)
class MegatronToHf:
    """Convert a Megatron checkpoint into a Hugging Face folder."""

    megatron: str
    """Checkpoint folder, or the folder of a run (its newest checkpoint)."""
    hf: str
    """Folder to write."""
    dtype: Dtype = "keep"
    """Of the written weights; keep leaves them as they were trained."""
    tokenizer: str | None = None
    """HF folder whose tokenizer and generation config go along; only for checkpoints of Megatron-LM and Megatron-Bridge."""
    vocab_size: int | None = None
    """Of the model, without rows of padding; only for those checkpoints, by default what they say."""
    max_shard_size: str = "5GB"
    """Of a .safetensors file."""
    upload_ready: bool = False
    """Write a model card (README.md) with what the run was: data, ALMR, learning rate, tokens."""
    num_workers: int = 2
    """Processes that write files at the same time."""
    overwrite: bool = False
    check_only: bool = False
    """Say what would be written, after everything that can be known to be wrong before, and write nothing."""


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
