"""What a fine-tuning run depends on, written down when it begins and compared when it resumes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import numpy as np
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from megatron_cpt.chat_data.templates import Template
from megatron_cpt.checkpoint.vocabulary import TOKENIZER_FILES
from megatron_cpt.checkpoint.weight_files import weight_files
from megatron_cpt.errors import InputError
from megatron_cpt.posttrain.data import Prepared

WHOLE = 64 << 20  # bytes up to which all of a file is read
PIECES, PIECE = 64, 1 << 20  # of a larger one: weights that were trained on differ everywhere
# Settings that change what is saved, logged and where to, but no weight
HARMLESS = ("save", "export_to", "run.")

KINDS = {"data": "data file", "model": "file of the model", "template": "text of", "examples": "tokenization of"}


def digest(path: str) -> str:
    """SHA-256 of a file, of a large one of its size and of pieces from all over it."""
    size = os.path.getsize(path)
    found = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        if size <= WHOLE:
            found.update(file.read())
        for place in np.linspace(0, size - PIECE, PIECES, dtype=np.int64).tolist() if size > WHOLE else ():
            file.seek(place)
            found.update(file.read(PIECE))
    return found.hexdigest()


def facts_of(settings: Mapping[str, Any], files: Sequence[str], model: str, template: Template) -> dict[str, Any]:
    """{section: {name: value}}: the settings, and digests of the files that they name.

    Args:
        settings: the whole configuration as a dictionary
        files: of the data
    """
    present = [name for name in ("config.json", *TOKENIZER_FILES) if os.path.exists(os.path.join(model, name))]
    names = [*present, *weight_files(model)]
    return {
        "settings": flat(settings),
        "data": {path: digest(path) for path in files},
        "model": {name: digest(os.path.join(model, name)) for name in names},
        "template": {"chat_template": hashlib.sha256(template.tokenizer.chat_template.encode()).hexdigest()}
        | ({} if template.date is None else {"date": template.date}),
    }


def first_start(path: str | None) -> datetime:
    """When a run began: now, or what its run.json says where it resumes; the first process's answer on all.

    A chat template may write the date into each conversation: the day after, its tokens would be others.
    """
    answer = [datetime.now().replace(microsecond=0)]
    if path is not None and PartialState().is_main_process:
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError), open(path, encoding="utf-8") as file:
            answer[0] = datetime.fromisoformat(json.load(file)["template"]["date"])
    broadcast_object_list(answer)
    return answer[0]


def facts_of_examples(prepared: Prepared[Any]) -> dict[str, Any]:
    """{"examples": {set: digest of all its tokens and labels, in their order}}."""
    sets = {"train": prepared.train, **{f"validation_{name}": items for name, items in prepared.validation.items()}}
    return {"examples": {name: digest_of_examples(items) for name, items in sets.items()}}


def digest_of_examples(items: list[Any]) -> str:
    """SHA-256 over what the model reads and what the loss counts."""
    found = hashlib.sha256()
    for item in items:
        for ids in (*item.sequences(), *([item.labels] if hasattr(item, "labels") else [item.prompt_ids])):
            found.update(np.asarray([len(ids), *ids], dtype=np.int64).tobytes())
    return found.hexdigest()


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted name -> value, as JSON has it, of the settings that change the result."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        elif not f"{prefix}{name}".startswith(HARMLESS):
            found[prefix + name] = json.loads(json.dumps(value))
    return found


def check_same(path: str, now: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise InputError unless the run that run.json describes began with the same facts, of those that are given."""
    try:
        with open(path, encoding="utf-8") as file:
            before = json.load(file)
        began = {section: dict(before[section]) for section in now}
    except (OSError, ValueError, KeyError, TypeError) as error:
        said = f"{path} does not say what the run began with ({type(error).__name__}: {error})"
        raise InputError(f"{said}; use another folder as save, or remove this one") from error
    folder = os.path.dirname(path)
    for section, facts in now.items():
        for name in sorted(facts.keys() | began[section].keys()):
            was, now_is = began[section].get(name), facts.get(name)
            if was == now_is:
                continue
            if section == "settings":
                raise InputError(f"{folder} has begun with {name} {was}, now it is {now_is}; use another folder as save")
            raise InputError(f"{folder} has begun with another {KINDS[section]} {name}; use another folder as save")
