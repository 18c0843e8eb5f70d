"""Which folders a conversion may write to: what is there already has to be the result of an earlier one."""

from __future__ import annotations

import hashlib
import json
import os
from typing import Any

from megatron_cpt.checkpoint.layout import checkpoint_name, iterations, read_manifest
from megatron_cpt.utils.errors import InputError
from megatron_cpt.utils.input_files import why_unwritable


def check_hf_target(folder: str) -> None:
    """Raise InputError unless a HF folder may be written here: nothing is there, or an earlier conversion's result.

    Anything else is not ours to delete, the checkpoint to convert least of all.
    """
    _check_name("hf", folder)
    if os.path.realpath(folder) == os.path.realpath(os.curdir):
        raise InputError(f"hf is {folder!r}, the folder this runs in, which cannot be replaced; use another name")
    _check_ours(folder, "megatron-to-hf")
    _check_place("hf", folder, folder)


def check_megatron_target(root: str) -> None:
    """Raise InputError unless a converted checkpoint may be written below `root`, as `check_hf_target`.

    Not beside checkpoints of training steps: a run that goes on there would have another beginning than its own.
    """
    _check_name("megatron", root)
    if iterations(root):
        newest = max(iterations(root).items())[1]
        raise InputError(f"{root} is the folder of a run (it holds {newest}); use another folder for converted weights")
    target = os.path.join(root, checkpoint_name(None))
    _check_ours(target, "hf-to-megatron")
    _check_place("megatron", root, target)


def is_converted(folder: str, job: str, overwrite: bool) -> bool:
    """Whether the very same conversion (`job_name`) has been finished here before, so that there is nothing to do.

    Raises:
        InputError: another one has, and it is not to be overwritten
    """
    if overwrite or not os.path.isdir(folder) or not os.listdir(folder):
        return False
    if read_manifest(os.path.join(folder, "manifest.json")).get("job") == job:
        return True
    other = "an earlier conversion, of another source or with other options"
    raise InputError(f"{folder} already holds {other}; use --overwrite true to replace it")


def job_name(identity: dict[str, Any]) -> str:
    """What tells one conversion from another, in some characters."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def _check_name(option: str, folder: str) -> None:
    if not folder:
        raise InputError(f"{option} is empty; use the name of the folder to write")
    above = folder
    while not os.path.lexists(above) and os.path.dirname(above) != above:
        above = os.path.dirname(above)
    if above and not os.path.isdir(above):
        raise InputError(f"{above} is not a folder; use another name")


def _check_place(option: str, given: str, folder: str) -> None:
    """Raise InputError where a folder is to be made, and cannot be: it is written beside its place, and moved there."""
    why = None if os.path.isdir(folder) else why_unwritable(folder)
    if why is not None:
        raise InputError(f"{option} is {given}; expected a folder to write to, or a name for a new one ({why})")


def _check_ours(folder: str, kind: str) -> None:
    if os.path.islink(folder) or (os.path.exists(folder) and not os.path.isdir(folder)):
        raise InputError(f"{folder} is not a folder; use another name")
    if not os.path.isdir(folder) or not os.listdir(folder):
        return
    try:
        ours = read_manifest(os.path.join(folder, "manifest.json")).get("kind") == kind
    except InputError:
        ours = False
    if not ours:
        raise InputError(f"{folder} is not empty and was not written by this tool; use another folder, or empty it")
