"""Whose results a folder holds, so that no run mixes its own with others, or writes over them."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from megatron_cpt.checkpoint.layout import RELEASE, TRACKER
from megatron_cpt.utils.errors import InputError
from megatron_cpt.utils.input_files import load_json

PRETRAINING = "a run of pretrain_cpt.py"
FINE_TUNING = "a run of SFT or DPO"
EVALUATION = "an evaluation"
MEGATRON = "Megatron checkpoints"
MODEL = "a model"

_STEP = re.compile(r"iter_\d{7,}", re.ASCII)
_TRAINER_STEP = re.compile(r"checkpoint-\d+", re.ASCII)


def check_own_folder(folder: str, field: str, own: str, written: Sequence[str]) -> None:
    """Raise InputError if a folder holds other results than those of a run of the kind `own`.

    Args:
        field: the setting that names the folder
        written: names of files that the run writes over; another's are refused where no run of the kind has begun
    """
    names = set(os.listdir(folder)) if os.path.isdir(folder) and os.access(folder, os.R_OK) else set[str]()
    held = held_in(folder, names)
    if held is None:
        held = next((f"another {name}" for name in written if name in names), None)
    if held not in (None, own):
        raise InputError(f"{field} is {folder}, which holds {held}; expected a folder of its own")


def held_in(folder: str, names: set[str]) -> str | None:
    """What a folder with these names in it holds; None: nothing that is known here."""
    begun = _begun(os.path.join(folder, "run.json")) if "run.json" in names else None
    if begun is not None:
        return begun
    if "config.json" in names:
        return MODEL
    if any(map(_TRAINER_STEP.fullmatch, names)) or "data_report.json" in names:
        return FINE_TUNING
    if RELEASE in names:
        return MEGATRON
    return PRETRAINING if TRACKER in names or any(map(_STEP.fullmatch, names)) else None


def _begun(path: str) -> str | None:
    """The kind of run that a run.json is of; None: it cannot be told."""
    try:
        run = load_json(path)
    except InputError:  # damaged: the checkpoints beside it tell
        return None
    if not isinstance(run, dict):
        return None
    return PRETRAINING if run.get("kind") == "pretrain" else FINE_TUNING if "settings" in run else None
