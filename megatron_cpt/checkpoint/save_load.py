"""Save and load a run's state through megatron-core's dist_checkpointing: any layout can load what another one saved."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar, cast

import megatron_cpt.platforms.imported_megatron  # noqa: F401  isort: skip  (before megatron is imported)
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace, merge
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factory_merges
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.utils import extract_sharded_base, force_all_tensors_to_non_fp8
from megatron.core.dist_checkpointing.validation import (
    StrictHandling,
    determine_global_metadata,
    validate_integrity_and_strict_load,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer

from megatron_cpt.checkpoint.checkpoint_pickles import Opaque, load_common
from megatron_cpt.checkpoint.common_state import find_common_state
from megatron_cpt.checkpoint.layout import check_format
from megatron_cpt.checkpoint.safe_pickle import plain_copy
from megatron_cpt.checkpoint.save_operation import CheckpointError, save_checkpoint
from megatron_cpt.checkpoint.state import Progress, chunk_names, restore_rng, state_to_load
from megatron_cpt.checkpoint.torch_dist import Region, TorchDistReader
from megatron_cpt.utils.errors import InputError, SharedInputError

ADVICE = "if its files are damaged, move it away to go on from the one before"
COMMON_KEYS = ("checkpoint_version", "content_metadata", "iteration", "consumed_samples", "rng_name", "optimizer")

T = TypeVar("T")

__all__ = ["CheckpointError", "Progress", "load_checkpoint", "save_checkpoint"]


def load_checkpoint(folder: str, chunks: Sequence[GPTModel], optimizer: MegatronOptimizer | None = None) -> Progress:
    """Load a checkpoint into the model chunks of this rank (all ranks call this), whatever layout saved it.

    With `optimizer` it loads the whole state of the run: the optimizer's, and that of the random number generators if they
    were saved in the same layout (otherwise they are left as they are). Weights are converted to the dtype of the model.
    Returns how far the run that saved it had come.

    Nothing in the checkpoint is run, whoever wrote it: all of it is read by `TorchDistReader` and `load_common`.

    Raises:
        InputError: on all ranks; it does not fit or is damaged
    """
    common = on_all_ranks(folder, lambda: run_settings(folder))
    state = state_to_load(chunks, optimizer, common.get("rng_name"))
    loaded = load_state(state, common, on_all_ranks(folder, lambda: TorchDistReader(folder)))
    for name, chunk in zip(chunk_names(chunks), chunks, strict=True):
        chunk.load_state_dict(loaded[name])
    if optimizer is not None:
        take_rates(loaded["optimizer"], optimizer)
        optimizer.load_state_dict(loaded["optimizer"])
    if "rng_state" in loaded:
        restore_rng(loaded["rng_state"])
    return Progress(common.get("iteration", 0), common.get("consumed_samples", 0))


def take_rates(saved: dict[str, Any], optimizer: MegatronOptimizer) -> None:
    """Give the parameter groups of a checkpoint the learning rate of this run, whose groups have one and the same.

    megatron-core 0.19 pairs groups by it, too, and would find none where a run goes on with another (lr.on_continue). What a
    step learns by is set before each, from the run's schedule.
    """
    now = optimizer.param_groups[0]
    for group in saved["optimizer"]["param_groups"]:
        group |= {name: now[name] for name in ("max_lr", "min_lr") if name in group and name in now}


def load_state(wanted: dict[str, Any], common: dict[str, Any], reader: TorchDistReader) -> dict[str, Any]:
    """A state dict with what is in a checkpoint, as `dist_checkpointing.load` makes it; on all ranks together.

    By our own reader: megatron-core's unpickles what it finds and compares no checksums.

    Args:
        wanted: the state dict of the model and the optimizer, with a ShardedTensor or ShardedObject for each part
        common: what the checkpoint says beside these (`run_settings`)
        reader: of the checkpoint
    """
    force_all_tensors_to_non_fp8(wanted)  # those of Transformer Engine, into which no numbers can be copied
    sharded, local, factories = load_preprocess(wanted)
    sharded, _ = extract_sharded_base(sharded)
    validate_integrity_and_strict_load(
        sharded, StrictHandling.ASSUME_OK_UNEXPECTED, True, *determine_global_metadata(sharded)
    )
    loaded = on_all_ranks(reader.folder, lambda: dict_list_map_outplace(partial(load_part, reader), sharded))
    state = dict_list_map_outplace(lambda value: value, common)
    merge(state, local)
    merge(state, loaded)
    return cast(dict[str, Any], apply_factory_merges(state, factories))


def load_part(reader: TorchDistReader, wanted: ShardedTensor | ShardedObject) -> Any:
    """The numbers or the object that a checkpoint has for a part of the state.

    Raises:
        InputError: it is missing or damaged
    """
    if isinstance(wanted, ShardedTensor):
        return load_tensor(reader, wanted)
    if "_extra_state" in wanted.key:
        # Transformer Engine unpickles these bytes; they hold the history of FP8's scaling factors, which begins anew
        return None
    values = reader.object(wanted.unique_key)
    if not isinstance(values, list) or len(values) != 1:
        raise InputError(f"{reader.folder}: {wanted.unique_key} is a {type(values).__name__}; expected a list")
    return values[0]


def on_all_ranks(folder: str, read: Callable[[], T]) -> T:
    """What `read` returns; if any rank cannot read the checkpoint in `folder`, all of them raise it as SharedInputError."""
    result, error = None, None
    try:
        result = read()
    except InputError as raised:
        error = str(raised)
    errors: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    for found in errors:
        if found is not None:
            raise SharedInputError(f"checkpoint {folder} cannot be read ({found}); {ADVICE}")
    return cast(T, result)


def run_settings(folder: str) -> dict[str, Any]:
    """What common.pt says of the run; the rest of it, which other software may have put there, is left out.

    Raises:
        InputError: it is damaged, or has a value of another kind
    """
    check_format(os.path.join(folder, "metadata.json"))
    path, place = find_common_state(folder)
    common = {name: value for name, value in load_common(path, place).items() if name in COMMON_KEYS}
    for name in ("iteration", "consumed_samples"):
        value = common.get(name, 0)
        if type(value) is not int or not 0 <= value < 1 << 62:
            raise InputError(f"{path}: {name} is {value!r:.100}; expected a number of 0 or more")
    if not isinstance(common.get("rng_name"), str | None):
        raise InputError(f"{path}: rng_name is {common['rng_name']!r:.100}; expected a text")
    return cast(dict[str, Any], plain_copy(common, partial(refuse_objects, path)))


def refuse_objects(path: str, value: Any, _: Callable[[Any], Any]) -> Any:
    """The value; InputError for an object that is no number, text or tensor."""
    if isinstance(value, Opaque):
        raise InputError(f"{path} holds a {value.kind}; expected numbers, texts and tensors")
    return value


def load_tensor(reader: TorchDistReader, wanted: ShardedTensor) -> torch.Tensor:
    """This rank's part of a tensor, in the memory that it is to have, or in new memory.

    Raises:
        InputError: the checkpoint has none of this name and shape, or it is damaged
    """
    stored = reader.shape(wanted.key)
    fits = len(stored) == len(wanted.global_shape) if wanted.allow_shape_mismatch else stored == tuple(wanted.global_shape)
    if not fits:
        raise InputError(
            f"{reader.folder}: tensor {wanted.key} has shape {list(stored)}; the model asks for {list(wanted.global_shape)}"
        )
    data = torch.empty(wanted.local_shape, dtype=wanted.dtype) if wanted.data is None else wanted.data.detach()
    target = data[(None,) * wanted.prepend_axis_num]
    offset = tuple(wanted.global_offset)
    if wanted.allow_shape_mismatch:  # a vocabulary with other rows of padding
        data.zero_()
        lengths = [min(length, whole - at) for length, whole, at in zip(target.shape, stored, offset, strict=True)]
        if min(lengths, default=1) <= 0:
            return data
        target = target[tuple(slice(0, length) for length in lengths)]
    reader.read_into(Region(wanted.key, offset, tuple(target.shape)), target)
    return data
