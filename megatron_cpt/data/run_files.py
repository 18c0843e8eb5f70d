"""Whether the files are there that a run names. Imports no torch: the answer comes at once."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from megatron_cpt.data.mixture_file import load_mixture
from megatron_cpt.errors import InputError, Refusals


def check_files(settings: Mapping[str, Any]) -> None:
    """Check the mixture and the checkpoint that settings (by dotted name) of a RunConfig name.

    Raises:
        InputError: naming the file; InputErrors: several are wrong
    """
    refusals = Refusals()
    with refusals.noted():
        if "mixture" in settings:
            load_mixture(settings["mixture"])
    with refusals.noted():
        if "checkpoint.load" in settings:
            check_checkpoint_folder(settings["checkpoint.load"])
    refusals.raise_any()


def check_checkpoint_folder(path: str) -> None:
    """Raise InputError unless `checkpoint.load` is a folder."""
    if not os.path.isdir(path):
        raise InputError(f"checkpoint.load is {path!r}; expected the folder of a checkpoint or a run (no such folder)")
