"""Save and load a run's state through megatron-core's dist_checkpointing: any layout can load what another one saved."""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer
from torch.distributed.checkpoint.api import CheckpointException

from megatron_cpt.checkpoint.attempt import CheckpointError, save_checkpoint
from megatron_cpt.checkpoint.background import error_text
from megatron_cpt.checkpoint.state import Progress, chunk_names, restore_rng, state_to_load
from megatron_cpt.checkpoint.torch_dist import TorchDistReader
from megatron_cpt.errors import InputError, StopRequestedError

ADVICE = "if its files are damaged, move it away to go on from the one before"

__all__ = ["CheckpointError", "Progress", "dtype_of", "load_checkpoint", "save_checkpoint"]


def load_checkpoint(folder: str, chunks: Sequence[GPTModel], optimizer: MegatronOptimizer | None = None) -> Progress:
    """Load a checkpoint into the model chunks of this rank (all ranks call this), whatever layout saved it.

    With `optimizer` it loads the whole state of the run: the optimizer's, and that of the random number generators if they
    were saved in the same layout (otherwise they are left as they are). Weights are converted to the dtype of the model.
    Returns how far the run that saved it had come.

    Raises:
        InputError: it does not fit, is damaged, or would run code when it is read
    """
    check_safe(folder)
    try:
        common = dist_checkpointing.load_common_state_dict(folder)
        loaded = dist_checkpointing.load(state_to_load(chunks, optimizer, common.get("rng_name")), folder)
    except StopRequestedError:
        raise
    except (Exception, CheckpointException) as error:  # there is no one name for what a damaged file leads to
        causes = [cause for cause, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]
        if isinstance(causes[0], StopRequestedError):
            raise causes[0] from error
        raise InputError(f"checkpoint {folder} cannot be read ({error_text(causes[0])}); {ADVICE}") from error
    for name, chunk in zip(chunk_names(chunks), chunks, strict=True):
        chunk.load_state_dict(loaded[name])
    if optimizer is not None:
        optimizer.load_state_dict(loaded["optimizer"])
    if "rng_state" in loaded:
        restore_rng(loaded["rng_state"])
    return Progress(common.get("iteration", 0), common.get("consumed_samples", 0))


def check_safe(folder: str) -> None:
    """Raise InputError on all ranks if reading a checkpoint would run code that is in it.

    megatron-core unpickles .metadata and the objects beside the tensors as they are; common.pt and tensors go through
    torch's weights_only loader. The first rank looks at them for all.
    """
    found: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            for key, content in TorchDistReader(folder).objects():
                check_pickle(key, content)
        except InputError as error:
            found = [f"checkpoint {folder} cannot be read ({error}); {ADVICE}"]
    dist.broadcast_object_list(found)
    if found[0] is not None:
        raise InputError(found[0])


def check_pickle(key: str, content: bytes) -> None:
    """Raise InputError unless torch's weights_only loader takes it."""
    try:
        torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # there is no one name for what a damaged file leads to
        named = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        raise InputError(f"{key} names {named[1]}" if named else f"{key} is damaged") from error


def dtype_of(name: str) -> torch.dtype:
    """torch dtype from our names (fp32, bf16, fp16) or HF's (float32, bfloat16, float16)."""
    names = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    names |= {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    return names[name]
