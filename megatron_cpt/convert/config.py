"""The settings of tools/convert_checkpoint.py; they import no torch, so that a wrong one is refused at once."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from megatron_cpt.config.renamed import formerly
from megatron_cpt.config.require import Requirements, require
from megatron_cpt.utils.errors import InputError

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
    embedding_init: NewRows = field(default="subtokens", metadata=formerly("new_rows"))
    """What the embeddings of new tokens, and their rows of the output layer, begin as: the mean of those of what their text
    was before, the mean of all and a little noise, or zero."""
    repair_untrained_embeddings: bool = field(default=False, metadata=formerly("repair_rows"))
    """Make embeddings near zero, which nobody has trained, the mean of all and a little noise."""
    seed: int = 1234
    """Of the noise."""
    num_workers: int = 2
    """Processes that write files at the same time."""
    overwrite: bool = False
    check_only: bool = False
    """Say what would be written, after everything that can be known to be wrong before, and write nothing."""

    def __post_init__(self) -> None:
        with Requirements() as need:
            need.field(self, "hf", bool, "a folder")
            need.at_least(self, num_workers=1)
            need.field(self, "seed", lambda seed: 0 <= seed < 1 << 63, "a whole number from 0 to 2^63 - 1")
            with need.noted():
                if self.extend_tokenizer is not None and self.added_tokens is not None:
                    raise InputError("extend_tokenizer and added_tokens are both given; expected one")


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

    def __post_init__(self) -> None:
        with Requirements() as need:
            need.at_least(self, num_workers=1)
            need.field(self, "vocab_size", lambda size: size >= 1, "a whole number above 0")
            need.field(self, "max_shard_size", is_size, "a size above 0 in KB, MB, GB or TB, such as 5GB")


def is_size(written: str) -> bool:
    """Whether a text is a number of bytes as huggingface_hub reads it, above 0."""
    size = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*[KMGT]B\s*", written, re.IGNORECASE)
    return size is not None and float(size[1]) > 0


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

    def __post_init__(self) -> None:
        with Requirements() as need:
            need.at_least(self, max_tokens=2)
            need.field(self, "tolerance", lambda most: most >= 0, "a number that is not negative")
            with need.noted():
                wanted = "true, or logits true: else there is nothing to compare"
                require(self.tensors or self.logits, "tensors", "false with logits false", wanted)
