"""Whether everything is there that an evaluation names. Imports no torch: the answer comes at once."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

from megatron_cpt.chat_data.template_files import read_template
from megatron_cpt.config.require import Requirements
from megatron_cpt.errors import Refusals
from megatron_cpt.input_files import why_unreadable
from megatron_cpt.model.hf_folder import check_model


def check_settings(settings: Mapping[str, Any]) -> None:
    """Check the models, folders and files that settings (by dotted name) of an EvaluateConfig name.

    Raises:
        InputError: naming the setting; InputErrors: several are wrong
    """
    refusals = Refusals()
    for check in (check_models, check_given):
        with refusals.noted():
            check(settings)
    refusals.raise_any()


def check_models(settings: Mapping[str, Any]) -> None:
    """As `check_settings`, of what is measured: earlier stages of a pipeline may have yet to make it."""
    folders = {f"models.{name}": folder for name, folder in settings.get("models", {}).items()}
    for i, checkpoint in enumerate(settings.get("trajectory.checkpoints", ())):
        if "model" in checkpoint:
            folders[f"trajectory.checkpoints[{i}].model"] = checkpoint["model"]
    run = settings.get("trajectory.run")
    with Requirements() as need:
        for name, folder in folders.items():
            with need.noted():
                check_model(folder, name)
        need(run is None or os.path.isdir(run), "trajectory.run", run or "''", "the folder of a run (no such folder)")


def check_given(settings: Mapping[str, Any]) -> None:
    """As `check_settings`, of what models are measured by."""
    template = settings.get("chat_template")
    with Requirements() as need:
        for name in ("tasks_folder", "data_folder"):
            folder = settings.get(name)
            need(folder is None or os.path.isdir(folder), name, folder or "''", "a folder (no such folder)")
        for name, path in files_of(settings):
            why = why_unreadable(path)
            need(why is None, name, path or "''", f"a file ({why})")
        if template is not None:
            with need.noted():
                read_template(template)


def files_of(settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(setting, path) of all files of texts, questions and judges."""
    for name in ("text", "prompts", "pairwise.prompts"):
        for i, source in enumerate(settings.get(name, ())):
            if "path" in source:
                yield f"{name}[{i}].path", source["path"]
    for name in ("pairwise.judge.prompt", "pairwise.judge.votes"):
        if settings.get(name) is not None:
            yield name, settings[name]
