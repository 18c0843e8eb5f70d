"""Whether everything is there that an evaluation names. Imports no torch: the answer comes at once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from megatron_cpt.checkpoint.hf_tokenizer import read_folder
from megatron_cpt.checkpoint.run_folder import EVALUATION, check_own_folder
from megatron_cpt.checkpoint.weight_files import check_weights
from megatron_cpt.config.require import Requirements, require
from megatron_cpt.evaluation.config import EvaluateConfig
from megatron_cpt.model.hf_folder import can_look_into, check_model, check_positions, positions_of
from megatron_cpt.posttrain.rows import check_rows
from megatron_cpt.posttrain.template_files import check_asking, read_template
from megatron_cpt.utils.errors import Refusals
from megatron_cpt.utils.input_files import why_unreadable, why_unwritable


def check_evaluation(config: EvaluateConfig) -> None:
    """Check the models, folders and files that a configuration names, whatever is wrong with it (see config/partial.py).

    Raises:
        InputError: naming the setting; InputErrors: several are wrong
    """
    refusals = Refusals()
    for check in (check_models, check_given):
        with refusals.noted():
            check(config)
    refusals.raise_any()


def check_models(config: EvaluateConfig) -> None:
    """As `check_evaluation`, of what is measured: earlier stages of a pipeline may have yet to make it."""
    with Requirements() as need:
        with need.noted():
            for name, folder in config.models.items():
                with need.noted():
                    check_model(folder, f"models.{name}")
                with need.noted():
                    check_measurable(config, folder, judged=True)
        with need.noted():
            for i, checkpoint in enumerate(config.trajectory.checkpoints if config.trajectory is not None else ()):
                with need.noted():
                    check_model(checkpoint.model, f"trajectory.checkpoints[{i}].model")
                with need.noted():
                    check_measurable(config, checkpoint.model, judged=False)
        with need.noted():
            run = config.trajectory.run if config.trajectory is not None else None
            need(run is None or os.path.isdir(run), "trajectory.run", run or "''", "the folder of a run (no such folder)")


def check_measurable(config: EvaluateConfig, folder: str, judged: bool) -> None:
    """As `check_evaluation`, of what is in the folder of a model. `judged`: whether it answers `pairwise.prompts`."""
    benchmarks = bool(config.tasks or config.suite)
    asked = bool(config.prompts or (judged and config.pairwise is not None and config.pairwise.judge.url is not None))
    if not can_look_into(folder) or not (benchmarks or asked or config.text):
        return
    with Requirements() as need:
        with need.noted():
            check_weights(folder)
        with need.noted():
            if asked:
                check_positions(folder, config.max_new_tokens)
            elif config.text:
                positions_of(folder)
        with need.noted():
            if asked:
                check_asking(folder, config.chat_template)
            elif benchmarks and config.apply_chat_template:
                check_asking(folder, None)
            else:
                read_folder(folder)


def check_given(config: EvaluateConfig) -> None:
    """As `check_evaluation`, of what models are measured by, and where the results go."""
    with Requirements() as need:
        for name in ("tasks_folder", "data_folder"):
            need.field(config, name, os.path.isdir, "a folder (no such folder)")
        with need.noted():
            why = why_unwritable(config.output) if config.output else "it is empty"
            need(why is None, "output", config.output or "''", f"a folder to write to, or a name for a new one ({why})")
            begun = os.path.exists(os.path.join(config.output, "report.json"))
            check_own_folder(config.output, "output", EVALUATION, () if begun else ("report.md",))
        for name, source in named_sources(config, need):
            with need.noted():
                check_named_file(name, source.path)
                check_rows(source.path)
        for name in ("prompt", "votes"):
            with need.noted():
                judge = None if config.pairwise is None else config.pairwise.judge
                if judge is not None and getattr(judge, name) is not None:
                    check_named_file(f"pairwise.judge.{name}", getattr(judge, name))
        with need.noted():
            if config.chat_template is not None:
                read_template(config.chat_template)


def check_named_file(name: str, path: str) -> None:
    """Raise InputError unless a setting names a file that can be read."""
    why = why_unreadable(path)
    require(why is None, name, path or "''", f"a file ({why})")


def named_sources(config: EvaluateConfig, refusals: Refusals) -> Iterator[tuple[str, Any]]:
    """(setting, section with a path) of all texts and questions, as far as they were not refused."""
    with refusals.noted():
        yield from ((f"text[{i}].path", source) for i, source in enumerate(config.text))
    with refusals.noted():
        yield from ((f"prompts[{i}].path", source) for i, source in enumerate(config.prompts))
    with refusals.noted():
        if config.pairwise is not None:
            yield from ((f"pairwise.prompts[{i}].path", source) for i, source in enumerate(config.pairwise.prompts))
