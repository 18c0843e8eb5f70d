"""Whether the files are there that SFT or DPO names, none is both trained on and evaluated on, and a run can be saved where
it is to be. Imports no torch."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
from collections.abc import Mapping
from typing import Any

from megatron_cpt.chat_data.template_files import read_template
from megatron_cpt.config.require import Requirements
from megatron_cpt.errors import InputError, Refusals
from megatron_cpt.input_files import why_unreadable
from megatron_cpt.model.hf_folder import check_model

# What checkpoint/layout.py, which imports torch, has in a folder of Megatron checkpoints
MEGATRON = re.compile(r"latest_checkpointed_iteration\.txt|iter_\d{7,}|release", re.ASCII)


def check_settings(settings: Mapping[str, Any]) -> None:
    """Check the folders, data and chat template that settings (by dotted name) of an SftConfig or a DpoConfig name.

    Raises:
        InputError: naming the file; InputErrors: several are wrong
    """
    refusals = Refusals()
    with refusals.noted():
        if "save" in settings:
            check_save(settings["save"])
    with refusals.noted():
        if "model" in settings:
            check_model(settings["model"])
    sources, validation = (
        {f"{name}[{i}].path": source["path"] for i, source in enumerate(settings.get(name, ())) if "path" in source}
        for name in ("data.sources", "data.validation")
    )
    with refusals.noted():
        check_data(sources, validation, settings.get("data.validation_share", 1) > 0)
    with refusals.noted():
        if settings.get("data.chat_template") is not None:
            read_template(settings["data.chat_template"])
    refusals.raise_any()


def check_chat(settings: Mapping[str, Any]) -> None:
    """Check the model and chat template that settings of a ChatConfig name. InputError: what is wrong with them."""
    refusals = Refusals()
    with refusals.noted():
        if "model" in settings:
            check_model(settings["model"])
    with refusals.noted():
        if settings.get("chat_template") is not None:
            read_template(settings["chat_template"])
    refusals.raise_any()


def check_save(folder: str) -> None:
    """Raise InputError unless a run may begin, or resume, in a folder: it can be written to, and has nothing else in it."""
    if not folder:
        raise InputError("save is empty; use the name of a folder")
    if os.path.exists(os.path.join(folder, "hf")):
        raise InputError(f"{folder} holds a finished run; use another folder as save, or remove it")
    place = os.path.abspath(folder)
    while not os.path.lexists(place):
        place = os.path.dirname(place)
    if not os.path.isdir(place):
        raise InputError(f"save is {folder}, and {place} is no folder; use another name as save")
    if not os.access(place, os.W_OK | os.X_OK):
        raise InputError(f"save is {folder}, and {place} cannot be written to (Permission denied); use another name as save")
    if os.path.exists(os.path.join(folder, "config.json")):
        raise InputError(f"save is {folder}, which holds a model; expected a folder of its own for the run")
    if any(MEGATRON.fullmatch(name) for name in (os.listdir(folder) if os.access(folder, os.R_OK) else ())):
        raise InputError(f"save is {folder}, which holds Megatron checkpoints; expected a folder of its own for the run")


def check_data(sources: Mapping[str, str], validation: Mapping[str, str], holds_out: bool) -> None:
    """Check that all files ({setting: path}) are there, and that rows to evaluate on are not those to train on.

    `holds_out`: without `validation`, a part of each source is evaluated on.

    Raises:
        InputError: one is missing, not to be read, or there twice; InputErrors: several are
    """
    with Requirements() as need:
        for name, path in (*sources.items(), *validation.items()):
            why = why_unreadable(path)
            need(why is None, name, path or "''", f"a file ({why})")
    refusals = Refusals()
    pairs = itertools.product(sources.values(), validation.values())
    advice = "use different files, or leave data.validation out: data.validation_share holds out of each source"
    what = "data.sources and data.validation"
    if holds_out and not validation:
        pairs = itertools.combinations(sources.values(), 2)  # type: ignore[assignment]
        advice = "name it once, or use validation files: what is held out of one is trained on in the other"
        what = "two of data.sources"
    for first, second in pairs:
        if same_content(first, second):
            both = f"{second} and {first} are " + ("one file" if os.path.samefile(first, second) else "equal")
            refusals.add(InputError(f"{what} have rows in common: {both}; {advice}"))
    refusals.raise_any()


def same_content(first: str, second: str) -> bool:
    """Whether two files have the same bytes, and any."""
    if os.path.samefile(first, second):
        return True
    if os.path.getsize(first) != os.path.getsize(second) or os.path.getsize(first) == 0:
        return False
    digests = []
    for path in (first, second):
        with open(path, "rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").digest())
    return digests[0] == digests[1]
