"""Where a checkpoint has what is no tensor: in common.pt or, as megatron-core 0.19 writes it, in an object of its own."""

from __future__ import annotations

import os

from megatron_cpt.checkpoint.checkpoint_pickles import ChunkPlace, load_metadata
from megatron_cpt.utils.errors import InputError

COMMON_STATE = "common_state/shard_0_1"


def find_common_state(folder: str) -> tuple[str, ChunkPlace | None]:
    """(path of the file, where it lies in it; None: all of it) for `load_settings` and `load_common`.

    Raises:
        InputError: there is none
    """
    path = os.path.join(folder, "common.pt")
    if os.path.exists(path):
        return path, None
    place = load_metadata(os.path.join(folder, ".metadata")).places.get((COMMON_STATE, ()))
    if place is None:
        raise InputError(f"checkpoint {folder} is not complete: common.pt is missing, and .metadata names no {COMMON_STATE}")
    return os.path.join(folder, place.file), place
