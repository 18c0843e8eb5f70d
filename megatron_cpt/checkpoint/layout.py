"""What lies where in a folder of Megatron checkpoints.

ROOT/latest_checkpointed_iteration.txt   "release" (converted weights) or an iteration number; written last
ROOT/release/  or  ROOT/iter_0000100/    one checkpoint, in megatron-core's torch_dist format
    .metadata metadata.json common.pt *.distcp
    hf/                                  config.json, generation config and tokenizer of the HF model
    manifest.json                        what went in, versions
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

from megatron_cpt.errors import InputError
from megatron_cpt.version import __version__

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
# What makes a HF folder more than its weights, and has to survive the trip through Megatron.
NOT_WEIGHTS = (".json", ".jinja", ".model", ".txt", ".py", ".md")
WEIGHT_INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


def checkpoint_name(iteration: int | None) -> str:
    """Folder name of a checkpoint; None is a converted one."""
    return RELEASE if iteration is None else f"iter_{iteration:07d}"


def latest_checkpoint(root: str) -> str | None:
    """The newest complete checkpoint below `root`, or None if there is no tracker file.

    Raises:
        InputError: the tracker names a checkpoint that is not there, or not complete
    """
    tracker = os.path.join(root, TRACKER)
    if not os.path.exists(tracker):
        return None
    with open(tracker, encoding="utf-8") as file:
        content = file.read().strip()
    if content != RELEASE and not content.isdigit():
        raise InputError(f"{tracker} says {content!r}; it should hold an iteration number or {RELEASE!r}")
    folder = os.path.join(root, checkpoint_name(None if content == RELEASE else int(content)))
    check_complete(folder)
    return folder


def find_checkpoint(path: str) -> str:
    """A checkpoint folder, given itself or the folder of a run (its newest checkpoint)."""
    if not os.path.isdir(path):
        raise InputError(f"checkpoint {path}: no such folder")
    if os.path.exists(os.path.join(path, "metadata.json")):
        check_complete(path)
        return path
    folder = latest_checkpoint(path)
    if folder is None:
        raise InputError(f"{path} holds no Megatron checkpoint: neither metadata.json nor {TRACKER} is there")
    return folder


def check_complete(folder: str) -> None:
    """Raise InputError if a file without which the checkpoint cannot be read is missing."""
    for name in ("metadata.json", ".metadata", "common.pt", "hf/config.json"):
        if not os.path.exists(os.path.join(folder, name)):
            raise InputError(f"checkpoint {folder} is not complete: {name} is missing")


def read_checkpoint_manifest(folder: str) -> dict[str, Any]:
    """The manifest.json of a checkpoint that a run of this project saved.

    Raises:
        InputError: it is missing or lacks what a resume has to know
    """
    path = os.path.join(folder, "manifest.json")
    try:
        with open(path, encoding="utf-8") as file:
            manifest = json.load(file)
    except (OSError, ValueError) as error:
        raise InputError(f"checkpoint manifest {path} cannot be read: {error}") from error
    for name in ("iteration", "consumed_samples", "optimizer", "data", "config"):
        if name not in manifest:
            raise InputError(f"checkpoint manifest {path} has no field {name!r}")
    return manifest


def write_tracker(root: str, iteration: int | None) -> None:
    """Publish a checkpoint as the newest one."""
    write_text(os.path.join(root, TRACKER), RELEASE if iteration is None else str(iteration))


def write_text(path: str, text: str) -> None:
    """Write a file so that it appears whole or not at all."""
    with open(path + ".tmp", "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + ".tmp", path)


def write_json(path: str, content: Any) -> None:
    """`write_text` of indented JSON."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def versions() -> dict[str, str]:
    """Versions that decide what a checkpoint contains."""
    packages = ("torch", "megatron-core", "transformers", "numpy")
    return {"megatron_cpt": __version__, "python": platform.python_version()} | {name: version(name) for name in packages}


def copy_hf_files(source: str, target: str) -> None:
    """Copy configuration and tokenizer, everything but the weights, from one HF folder to another."""
    os.makedirs(target, exist_ok=True)
    for name in sorted(os.listdir(source)):
        if name.endswith(NOT_WEIGHTS) and name not in WEIGHT_INDICES and os.path.isfile(os.path.join(source, name)):
            shutil.copyfile(os.path.join(source, name), os.path.join(target, name))


def remove_unfinished(root: str) -> None:
    """Remove what saves that were killed have left below `root`."""
    for name in os.listdir(root) if os.path.isdir(root) else []:
        if name.startswith((".iter_", f".{RELEASE}")) and ".tmp" in name:
            shutil.rmtree(os.path.join(root, name), ignore_errors=True)


def temporary_name(path: str) -> str:
    """Where a folder is written before it appears under its own name."""
    parent, name = os.path.split(os.path.abspath(path))
    return os.path.join(parent, f".{name}.tmp")


@contextlib.contextmanager
def appearing_folder(path: str) -> Iterator[str]:
    """A temporary folder beside `path` that takes its name when the block succeeds and vanishes when it fails."""
    temporary = temporary_name(path)
    shutil.rmtree(temporary, ignore_errors=True)
    os.makedirs(temporary)
    try:
        yield temporary
        replaced = temporary + ".replaced"
        shutil.rmtree(replaced, ignore_errors=True)
        if os.path.exists(path):
            os.rename(path, replaced)  # kept until the new one has its name
        os.rename(temporary, path)
        shutil.rmtree(replaced, ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
