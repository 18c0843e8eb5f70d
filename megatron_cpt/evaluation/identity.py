"""What each measurement depends on. It is kept for as long as that stays the same, whatever else is measured beside it."""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import importlib.util
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatron_cpt.evaluation.config import EvaluateConfig, PromptsConfig, TextConfig
from megatron_cpt.evaluation.harness import Benchmark

# Weights, tokenizer, chat template, how it generates.
MODEL_FILES = (".safetensors", ".bin", ".json", ".jinja", ".model", ".txt")
ANSWERS = {"answers": "end with the turn of the chat template"}  # in another way before: those are measured anew
LARGE = 64 * 2**20  # bytes; larger files are not read to see whether they have changed


def folder_identity(folder: str) -> dict[str, Any]:
    """What tells a HF folder from others, and from what it was before."""
    files = sorted(entry for entry in os.listdir(folder) if entry.endswith(MODEL_FILES))
    stats = [[entry, os.stat(os.path.join(folder, entry)).st_mtime_ns] for entry in files]
    return {"folder": os.path.abspath(folder), "files": stats}


def text_identity(config: EvaluateConfig, language: str) -> dict[str, Any]:
    """Of bits per byte."""
    return {"files": files_of(config.text, language), "window": config.max_length}


def answers_identity(config: EvaluateConfig, language: str) -> dict[str, Any]:
    """Of the share of a language."""
    return {"files": files_of(config.prompts, language)} | generation(config)


def pairwise_identity(config: EvaluateConfig) -> dict[str, Any]:
    """Of answers for a judge."""
    asked = config.pairwise.prompts if config.pairwise is not None else []
    return {"files": files_of(asked)} | generation(config)


def benchmark_identity(config: EvaluateConfig, benchmark: Benchmark, index: Mapping[str, Any]) -> dict[str, Any]:
    """Of a score. `confirm_run_unsafe_code` only decides whether there is one.

    Args:
        index: lm-eval's, of tasks, groups and tags by name
    """
    asked = dataclasses.asdict(benchmark)
    del asked["name"]
    settings = {name: getattr(config, name) for name in ("limit", "batch_size", "seed")}
    settings |= {"chat": config.apply_chat_template} | (ANSWERS if config.apply_chat_template else {})
    return asked | settings | task_identity(benchmark.task, index, config.data_folder)


def generation(config: EvaluateConfig) -> dict[str, Any]:
    """How models answer prompts."""
    settings = {name: getattr(config, name) for name in ("chat_template", "max_new_tokens", "batch_size")}
    return (
        ANSWERS | settings | {"template_file": digest_of(config.chat_template) if config.chat_template is not None else None}
    )


def files_of(items: Sequence[TextConfig] | Sequence[PromptsConfig], language: str | None = None) -> list[dict[str, Any]]:
    """The files of one language, or all, by their content."""
    asked = [item for item in items if language in (None, item.language)]
    return [dataclasses.asdict(item) | {"path": digest_of(item.path)} for item in asked]


def task_identity(task: str, index: Mapping[str, Any], data_folder: str | None) -> dict[str, Any]:
    """How a task, or each task of a group or tag, is defined, and its local data. What is on the hub is not looked at."""
    configs = [entry.cfg for entry in entries_of(task, index) if entry.cfg]
    values = [*values_in(configs)]
    files = {text: module_file(text) for text in values if isinstance(text, str) and os.path.isabs(text)}
    names = {text: os.path.basename(text) for text, file in files.items() if file is not None}  # wherever the folder lies
    definition = [with_texts(config, names) for config in configs]
    code = sorted(([name, digest_of(str(files[text]))] for text, name in names.items()), key=str)
    data = [path for fields in values if isinstance(fields, Mapping) for path in data_of(fields, data_folder)]
    content = json.dumps([definition, code], sort_keys=True, default=str)
    return {
        "definition": hashlib.sha256(content.encode()).hexdigest(),
        "data": [digest_of(path) for path in sorted({*data})],
    }


def entries_of(item: Any, index: Mapping[str, Any]) -> Iterator[Any]:
    """The entry of a task, group or tag, and of all that is in it.

    Args:
        item: its name, or what a group has in a name's place
    """
    fields = item if isinstance(item, dict) else {}
    entry = index.get(str(fields.get("group") or fields.get("task")) if fields else item)
    own = (entry.cfg if entry is not None else None) or {}
    if entry is not None:
        yield entry
        if not own:  # a tag
            fields = {"task": sorted(entry.tags)}
    for listed in (fields.get("task"), own.get("task")):
        for member in listed if isinstance(listed, list) else []:
            yield from entries_of(member, index)


def values_in(value: Any) -> Iterator[Any]:
    """A value of JSON's types, and all that are in it: a task's fields, those that a group has for its members, texts."""
    yield value
    if isinstance(value, Mapping | list):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from values_in(part)


def with_texts(value: Any, names: Mapping[str, str]) -> Any:
    """JSON's types with other texts."""
    if isinstance(value, Mapping):
        return {key: with_texts(part, names) for key, part in value.items()}
    if isinstance(value, list):
        return [with_texts(part, names) for part in value]
    return names.get(value, value) if isinstance(value, str) else value


def module_file(function: str) -> str | None:
    """The file of YAML's `!function module.name`, which lm-eval gives as FOLDER/module.name; None: there is none."""
    folder, _, name = function.rpartition("/")
    module = name.rpartition(".")[0]
    beside = os.path.join(folder, *module.split(".")) + ".py"
    if os.path.isfile(beside):
        return beside
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError):  # it is no function, or its package is not installed
        return None
    return found.origin if found is not None else None


def data_of(config: Mapping[str, Any], data_folder: str | None) -> list[str]:
    """Paths of the local data that the fields of a task name."""
    named = values_in([config.get("dataset_path"), config.get("dataset_kwargs")])
    paths = [path for text in named if isinstance(text, str) for path in (glob.glob(text, recursive=True) or [text])]
    if data_folder is not None and "custom_dataset" in config:
        paths.append(os.path.join(data_folder, folder_of(str(config["custom_dataset"]))))
    return [path for path in paths if os.path.exists(path)]


def folder_of(function: str) -> str:
    """Where in `data_folder` a function of custom_dataset has its files; "" where it is not ours: in all of it."""
    from megatron_cpt.evaluation.tasks.data import FOLDERS

    package, _, name = os.path.basename(function).rpartition(".")
    return FOLDERS[name] if package == "megatron_cpt.evaluation.tasks.data" else ""


def digest_of(path: str) -> Any:
    """sha256 of a file, or place, size and time of a large one; of a folder, those of its files; None: there is none."""
    if os.path.isdir(path):
        files = [os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names]
        return {os.path.relpath(file, path): digest_of(file) for file in sorted(files)}
    if not os.path.isfile(path):
        return None
    found = os.stat(path)
    if found.st_size > LARGE:
        return [os.path.abspath(path), found.st_size, found.st_mtime_ns]
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
