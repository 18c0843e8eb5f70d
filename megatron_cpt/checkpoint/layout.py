"""What lies where in a folder of Megatron checkpoints.

ROOT/latest_checkpointed_iteration.txt   "release" (converted weights) or an iteration number; written last
ROOT/release/  or  ROOT/iter_0000100/    one checkpoint, in megatron-core's torch_dist format
    .metadata metadata.json common.pt *.distcp
    hf/                                  config.json, generation config and tokenizer of the HF model
    manifest.json                        what went in, versions, sizes and checksums of all other files; written last
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from megatron_cpt.checkpoint.checksums import FIELD as CHECKSUMS
from megatron_cpt.checkpoint.checksums import check_seal, check_small_files
from megatron_cpt.model.hf_folder import ADAPTER_CONFIG
from megatron_cpt.utils.errors import InputError, brief
from megatron_cpt.utils.files import write_text
from megatron_cpt.utils.input_files import CHAT_TEMPLATES, check_folder, load_json, shown
from megatron_cpt.version import __version__

MOST_SAMPLES = 1 << 60  # of a run
TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
WEIGHT_INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
# Endings of files with weights, in the formats of several libraries. All else makes a HF folder more than its weights, and
# has to survive the trip through Megatron.
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")
# Files that tell a reader to do something to the weights beside them: to apply an adapter, which makes weights of other
# names, or to take them for quantized. Whole weights that have gone through Megatron need neither.
ABOUT_OTHER_WEIGHTS = (ADAPTER_CONFIG, "quantize_config.json", "quant_config.json", "hf_quant_config.json")
# What megatron-core's save_config writes, whose import takes a second
FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
A_CHECKPOINT = "expected the folder of a checkpoint or of a run"
MOST_TRACKER = 100  # characters that are read of it


def checkpoint_name(iteration: int | None) -> str:
    """Folder name of a checkpoint; None is a converted one."""
    return RELEASE if iteration is None else f"iter_{iteration:07d}"


def tracked_name(root: str) -> str | None:
    """Folder name of the checkpoint that the tracker file names, or None if there is no such file.

    Raises:
        InputError: it says something else
    """
    tracker = os.path.join(root, TRACKER)
    if not os.path.exists(tracker):
        return None
    if not os.path.isfile(tracker):  # a pipe or a device may have no end
        raise InputError(f"{tracker} is no plain file; it should hold an iteration number or {RELEASE!r}")
    with open(tracker, encoding="utf-8", errors="replace") as file:
        content = file.read(MOST_TRACKER).strip()
    if content != RELEASE and not re.fullmatch(r"\d{1,18}", content, re.ASCII):
        raise InputError(f"{tracker} says {content!r}; it should hold an iteration number or {RELEASE!r}")
    return checkpoint_name(None if content == RELEASE else int(content))


def newest_complete(root: str, own: bool = False, damaged: Mapping[str, str] | None = None) -> tuple[str | None, list[str]]:
    """The newest complete checkpoint below `root` (or None), and a sentence for each that was passed over.

    `own`: only those with a manifest.json, as all have that this project writes, under the name they were saved under.
    `damaged`: folders known to be damaged, and a sentence for each.

    A checkpoint gets its name when it is complete, so the tracker is not needed to find it: a run that was killed between
    the two has saved it all the same. "release" comes after all checkpoints of training steps.
    """
    if own:
        check_names(root)
    names = [name for _, name in sorted(iterations(root).items(), reverse=True)]
    if os.path.isdir(os.path.join(root, RELEASE)):
        names.append(RELEASE)
    passed_over = []
    try:
        named = tracked_name(root)
    except InputError as error:
        passed_over.append(str(error))
    else:
        if named is not None and named not in names:
            passed_over.append(f"{os.path.join(root, TRACKER)} names {named}, which is not there")
    for name in names:
        folder = os.path.join(root, name)
        try:
            if damaged and folder in damaged:
                raise InputError(damaged[folder])
            check_intact(folder)
            if own:
                check_checkpoint_name(folder)
        except InputError as error:
            passed_over.append(str(error))
            continue
        return folder, passed_over
    return None, passed_over


def check_names(root: str) -> None:
    """Raise InputError for what has the name of a checkpoint and is no folder: a save could not put one there."""
    for name in sorted(os.listdir(root)) if os.path.isdir(root) else []:
        path = os.path.join(root, name)
        if re.fullmatch(r"iter_\d{7,}", name) and not os.path.isdir(path):
            kind = "a link to what is not there" if os.path.islink(path) and not os.path.exists(path) else "a file"
            raise InputError(f"{path} is {kind}; expected the folder of a checkpoint, or nothing of that name")


def check_checkpoint_name(folder: str) -> None:
    """Raise InputError unless a checkpoint has a manifest.json, and lies in the folder that it was saved in.

    The names say which one is the newest, and which ones a save replaces and retention deletes.
    """
    path = os.path.join(folder, "manifest.json")
    if not os.path.exists(path):
        raise InputError(f"checkpoint {folder} is not complete: manifest.json is missing")
    if (name := os.path.basename(folder)) == RELEASE:
        return
    iteration = read_manifest(path).get("iteration")
    if type(iteration) is not int or not 0 <= iteration <= MOST_SAMPLES or checkpoint_name(iteration) != name:
        raise InputError(f"checkpoint {folder}: manifest.json: iteration is {brief(iteration)}; expected that of its name")


def iterations(root: str) -> dict[int, str]:
    """Iteration -> folder name of the checkpoints of training steps below `root`, complete or not."""
    names = os.listdir(root) if os.path.isdir(root) else []
    found = {int(match[1]): match[0] for name in names if (match := re.fullmatch(r"iter_(\d{7,})", name))}
    return {iteration: name for iteration, name in found.items() if os.path.isdir(os.path.join(root, name))}


def find_checkpoint(path: str) -> str:
    """A checkpoint folder, given itself or the folder of a run (its newest complete checkpoint)."""
    if not path:
        raise InputError(f"the checkpoint's name is empty; {A_CHECKPOINT}")
    if not os.path.isdir(path):
        raise InputError(f"checkpoint {path}: no such folder")
    if os.path.exists(os.path.join(path, "metadata.json")):
        check_intact(path)
        return path
    folder, passed_over = newest_complete(path)
    if folder is None:
        raise InputError(passed_over[0] if passed_over else f"{path} holds no Megatron checkpoint; {A_CHECKPOINT}")
    return folder


def check_complete(folder: str) -> None:
    """Raise InputError if a file is missing without which the checkpoint cannot be read, or is not as long as it was."""
    manifest = os.path.join(folder, "manifest.json")
    ours = os.path.exists(manifest)
    check_folder(folder)
    if os.path.isdir(os.path.join(folder, "hf")):
        check_folder(os.path.join(folder, "hf"), links=False)
    # Since megatron-core 0.19 that of other software may have no common.pt (see common_state.py)
    for name in ("metadata.json", ".metadata", *(["common.pt", "hf/config.json"] if ours else [])):
        if not os.path.exists(os.path.join(folder, name)):
            raise InputError(f"checkpoint {folder} is not complete: {name} is missing")
    if not ours:
        return  # of other software
    check_file_sizes(folder, read_manifest(manifest))


def check_file_sizes(folder: str, manifest: Mapping[str, Any]) -> None:
    """Raise InputError if a file that a checkpoint's manifest names is missing, or is not as long as it was."""
    files = manifest.get("files", {})
    if not isinstance(files, dict) or any(type(size) is not int or size < 0 for size in files.values()):
        raise InputError(f"checkpoint {folder} is not complete: manifest.json names no files with sizes")
    for name, size in files.items():
        try:
            found = os.path.getsize(os.path.join(folder, name))
        except OSError:
            raise InputError(f"checkpoint {folder} is not complete: {name} is missing") from None
        if found != size:
            raise InputError(f"checkpoint {folder} is not complete: {name} has {found} bytes, manifest.json says {size}")


def write_format(folder: str) -> None:
    """Write metadata.json, by which megatron-core knows how a checkpoint is stored."""
    with open(os.path.join(folder, "metadata.json"), "w", encoding="utf-8") as file:
        json.dump(FORMAT, file)


def check_format(path: str) -> None:
    """Raise InputError unless a metadata.json, which megatron-core reads without a look, names our format."""
    fields = load_json(path)
    if not isinstance(fields, dict) or not FORMAT.keys() >= fields.keys() or "sharded_backend" not in fields:
        raise InputError(f"{path} is {shown(fields)}; expected {', '.join(sorted(FORMAT))}")
    for name, value in fields.items():
        expected = (1,) if name.endswith("_version") else ("torch_dist", "torch")
        if type(value) not in (str, int) or value not in expected:
            raise InputError(f"{path}: {name} is {brief(value)}; expected {expected[0]}")


def check_intact(folder: str) -> None:
    """`check_complete`, and that what is read of it at once (all but the tensors) is what was written."""
    check_complete(folder)
    path = os.path.join(folder, "manifest.json")
    if os.path.exists(path):
        check_small_files(folder, read_manifest(path))
    check_format(os.path.join(folder, "metadata.json"))


def is_complete(folder: str) -> bool:
    """`check_complete` as a question."""
    try:
        check_complete(folder)
    except InputError:
        return False
    return True


def read_manifest(path: str) -> dict[str, Any]:
    """A manifest.json.

    Raises:
        InputError: it cannot be read, or is not as it was written
    """
    try:
        content = load_json(path)
    except InputError as error:
        raise InputError(f"checkpoint manifest {path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"checkpoint manifest {path} cannot be read: it holds no JSON object")
    for field in ("files", CHECKSUMS):
        names = content.get(field, {})
        for name in names if isinstance(names, dict) else ():
            if not is_within(name):
                raise InputError(f"checkpoint manifest {path}: {field} has {brief(name)}; expected names of files beside it")
    check_seal(content, path)
    return content


def is_within(name: str) -> bool:
    """Whether a file name of a manifest stays in the manifest's folder, as a name that there can be."""
    parts = name.split("/")
    return name.isprintable() and not name.startswith("/") and not {"", ".", ".."}.intersection(parts)


def is_ours(folder: str) -> bool:
    """Whether a checkpoint has its HF configuration in it, as this project writes it."""
    return os.path.exists(os.path.join(folder, "hf", "config.json"))


def is_of_a_run(folder: str) -> bool:
    """Whether a checkpoint was saved by a run: it says how far that had come. Converted weights do not."""
    return os.path.basename(os.path.abspath(folder)) != RELEASE


def read_checkpoint_manifest(folder: str) -> dict[str, Any]:
    """The manifest.json of a checkpoint that a run of this project saved.

    Raises:
        InputError: it is missing or lacks what a resume has to know
    """
    path = os.path.join(folder, "manifest.json")
    manifest = read_manifest(path)
    for name in ("iteration", "consumed_samples", "optimizer", "data", "config", "training"):
        if name not in manifest:
            raise InputError(f"checkpoint manifest {path} has no field {name!r}")
    for name in ("iteration", "consumed_samples"):
        if type(manifest[name]) is not int or not 0 <= manifest[name] <= MOST_SAMPLES:
            expected = f"a whole number from 0 to {MOST_SAMPLES}"
            raise InputError(f"checkpoint manifest {path}: {name} is {brief(manifest[name])}; expected {expected}")
    if not isinstance(manifest["training"], dict):
        raise InputError(
            f"checkpoint manifest {path}: training is a {type(manifest['training']).__name__}; expected an object"
        )
    for name in ("lr_schedule", "history", "baseline", "evaluated"):
        if name not in manifest["training"]:
            raise InputError(f"checkpoint manifest {path} has no field 'training.{name}'")
    return manifest


def write_tracker(root: str, iteration: int | None) -> None:
    """Publish a checkpoint as the newest one."""
    write_text(os.path.join(root, TRACKER), RELEASE if iteration is None else str(iteration))


def versions() -> dict[str, str]:
    """Versions that decide what a checkpoint contains."""
    packages = ("torch", "megatron-core", "transformers", "numpy")
    return {"megatron_cpt": __version__, "python": platform.python_version()} | {name: version(name) for name in packages}


def hf_files(folder: str) -> list[str]:
    """Configuration, tokenizer, licence: the names of all files in a HF folder but the weights and what is about others."""
    names = sorted(os.listdir(folder))
    if CHAT_TEMPLATES in names and os.path.isdir(os.path.join(folder, CHAT_TEMPLATES)):
        names += [os.path.join(CHAT_TEMPLATES, name) for name in sorted(os.listdir(os.path.join(folder, CHAT_TEMPLATES)))]
    return [
        name
        for name in names
        if not name.startswith(".")
        and not name.endswith(WEIGHTS)
        and name not in ABOUT_OTHER_WEIGHTS
        and os.path.isfile(os.path.join(folder, name))
    ]


def copy_hf_files(source: str, target: str) -> None:
    """Copy `hf_files` from one HF folder to another."""
    os.makedirs(target, exist_ok=True)
    for name in hf_files(source):
        os.makedirs(os.path.dirname(os.path.join(target, name)), exist_ok=True)
        shutil.copyfile(os.path.join(source, name), os.path.join(target, name))


def read_hf_files(folder: str) -> dict[str, bytes]:
    """Contents of `hf_files` (some MB), which a run keeps: the folder may be gone by the time of its next save."""
    contents = {}
    for name in hf_files(folder):
        with open(os.path.join(folder, name), "rb") as file:
            contents[name] = file.read()
    return contents


def write_hf_files(contents: Mapping[str, bytes], target: str) -> None:
    """Write what `read_hf_files` has read into another HF folder."""
    os.makedirs(target, exist_ok=True)
    for name, content in contents.items():
        os.makedirs(os.path.dirname(os.path.join(target, name)), exist_ok=True)
        with open(os.path.join(target, name), "wb") as file:
            file.write(content)
