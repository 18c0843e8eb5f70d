"""Whether the files are there that a run names. Imports no torch: the answer comes at once."""

from __future__ import annotations

import os
import re
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
        if "checkpoint.load" in settings and not has_checkpoints(settings.get("checkpoint.save", "")):
            check_checkpoint_folder(settings["checkpoint.load"])
    refusals.raise_any()


def has_checkpoints(folder: str) -> bool:
    """Whether a run has saved there: it resumes from that, and what it began with need not be there any more."""
    return os.path.isdir(folder) and any(re.fullmatch(r"iter_\d{7,}", name, re.ASCII) for name in os.listdir(folder))


def check_checkpoint_folder(path: str) -> None:
    """Raise InputError unless `checkpoint.load` is a folder."""
    if not os.path.isdir(path):
        raise InputError(f"checkpoint.load is {path!r}; expected the folder of a checkpoint or a run (no such folder)")
