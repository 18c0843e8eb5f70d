"""Save and load a run's state through megatron-core's dist_checkpointing: any layout can load what another one saved."""

from __future__ import annotations

import dataclasses
import os
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer

from megatron_cpt.checkpoint.layout import (
    appearing_folder,
    checkpoint_name,
    copy_hf_files,
    remove_unfinished,
    temporary_name,
    versions,
    write_json,
    write_tracker,
)

# Every optimizer shard can be loaded by any other layout.
OPTIMIZER_METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}


@dataclass(frozen=True)
class Progress:
    """How far a run has come; with the weights and the optimizer's state, all that a resume needs."""

    iteration: int = 0
    consumed_samples: int = 0


def _state_dict(
    model: GPTModel, optimizer: MegatronOptimizer | None, progress: Progress | None, is_loading: bool
) -> dict[str, Any]:
    weights = model.sharded_state_dict()
    state: dict[str, Any] = {"model": weights, "checkpoint_version": 3.0}
    if progress is not None:
        state |= {"iteration": progress.iteration, "consumed_samples": progress.consumed_samples}
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(weights, is_loading=is_loading, metadata=OPTIMIZER_METADATA)
    return state


def save_checkpoint(
    root: str,
    model: GPTModel,
    hf_folder: str,
    manifest: dict[str, Any],
    optimizer: MegatronOptimizer | None = None,
    progress: Progress | None = None,
) -> str:
    """Write one checkpoint below `root` (all ranks call this) and publish it as the newest; returns its folder.

    It is written under a temporary name and renamed when complete; the tracker file comes last. Without `progress` it
    is a converted checkpoint ("release").

    Args:
        model: this rank's part, not wrapped in DDP
        hf_folder: HF folder whose configuration and tokenizer travel along
        manifest: what went in; versions are added
    """
    iteration = progress.iteration if progress is not None else None
    folder = os.path.join(root, checkpoint_name(iteration))
    first = dist.get_rank() == 0
    if first:
        remove_unfinished(root)
    with appearing_folder(folder) if first else nullcontext(temporary_name(folder)) as path:
        dist.barrier()  # the first rank has made the folder
        dist_checkpointing.save(
            _state_dict(model, optimizer, progress, is_loading=False),
            path,
            content_metadata=OPTIMIZER_METADATA if optimizer is not None else None,
        )
        if first:
            copy_hf_files(hf_folder, os.path.join(path, "hf"))
            state = {"optimizer": optimizer is not None, "versions": versions()}
            if progress is not None:
                state |= dataclasses.asdict(progress)
            write_json(os.path.join(path, "manifest.json"), manifest | state)
    if first:
        write_tracker(root, iteration)
    dist.barrier()
    return folder


def load_checkpoint(folder: str, model: GPTModel, optimizer: MegatronOptimizer | None = None) -> Progress:
    """Load a checkpoint into `model` and, when given, `optimizer` (all ranks call this), whatever layout saved it.

    Weights are converted to the dtype of the model. Returns how far the run that saved it had come.
    """
    loaded = dist_checkpointing.load(_state_dict(model, optimizer, None, is_loading=True), folder)
    model.load_state_dict(loaded["model"])
    if optimizer is not None:
        optimizer.load_state_dict(loaded["optimizer"])
    return Progress(loaded.get("iteration", 0), loaded.get("consumed_samples", 0))


def unwrap(model: DistributedDataParallel) -> GPTModel:
    """The GPTModel inside megatron-core's DDP."""
    return model.module


def dtype_of(name: str) -> torch.dtype:
    """torch dtype from our names (fp32, bf16, fp16) or HF's (float32, bfloat16, float16)."""
    names = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    names |= {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    return names[name]
