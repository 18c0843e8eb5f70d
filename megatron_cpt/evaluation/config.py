"""What tools/evaluate.py measures, and on what."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Literal

from megatron_cpt.config.require import require, require_at_least
from megatron_cpt.errors import InputError


@dataclass(frozen=True)
class TextConfig:
    """Held-out text."""

    path: str
    """JSON Lines with "text"."""
    language: str
    """Of the text, such as en or zh."""
    max_documents: int | None = None
    """Take the first so many."""


@dataclass(frozen=True)
class PromptsConfig:
    """Questions in a language, to see in which one they are answered."""

    path: str
    """As for finetune_sft.py (JSON, JSON Lines, Parquet); the first question of each row is asked."""
    language: str
    """Of the questions, and wanted of the answers."""
    max_prompts: int = 50
    """Take the first so many."""


@dataclass(frozen=True)
class TaskConfig:
    """A benchmark of lm-eval's, or of a folder of tasks."""

    name: str
    """In tables."""
    task: str
    """lm-eval's name of it."""
    metric: str
    """lm-eval's name with its filter, such as acc,none."""
    num_fewshot: int | None = None
    """Examples before each question. Default: the task's own."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Benchmarks, bits per byte and language of the answers of one or more Hugging Face checkpoints."""

    models: dict[str, str]
    """Name in tables -> HF folder."""
    output: str
    """Folder for NAME.json, report.json and report.md; what is there already is not measured again."""
    suite: Literal["cpt", "chat"] | None = None
    """The paper's benchmarks, those of its CPT table or of that of the chat models."""
    tasks: list[TaskConfig] = field(default_factory=list)
    """Further benchmarks."""
    tasks_folder: str | None = None
    """Folder with lm-eval task YAMLs of one's own, say of local data."""
    data_folder: str | None = None
    """Folder with data of the package's own tasks, as docs/posttraining.md lays it out. Default: the Hugging Face hub's."""
    text: list[TextConfig] = field(default_factory=list)
    """Measure bits per byte on these."""
    prompts: list[PromptsConfig] = field(default_factory=list)
    """Measure the language of the answers to these."""
    chat: bool = False
    """Ask benchmarks through the model's chat template, too; `prompts` always are where a model has one."""
    chat_template: str | None = None
    """For `prompts`, of models that have none: llama3, chatml, or a file. Default: they are given the bare question."""
    limit: int | None = None
    """Questions of each benchmark. Default: all."""
    max_new_tokens: int = 128
    """Of the answers to `prompts`."""
    window: int = 2048
    """Tokens of text that are read at once."""
    batch_size: int = 1
    """Of benchmarks."""
    allow_code: bool = False
    """Run code that the model writes (HumanEval), in processes with limits. It may do harm all the same."""
    seed: int = 1234
    """Of the choice of examples."""

    def __post_init__(self) -> None:
        require(bool(self.models), "models", self.models, "a name and a folder for each")
        require_at_least(self, limit=1, max_new_tokens=1, window=8, batch_size=1)
        for name in self.models:
            if not name or "/" in name or name == "report":
                raise InputError(f"models has the name {name!r}; use one that can be the name of a file, other than report")
        if not (self.suite or self.tasks or self.text or self.prompts):
            raise InputError("there is nothing to measure: suite, tasks, text and prompts are all empty")
        for path in [*(text.path for text in self.text), *(prompts.path for prompts in self.prompts)]:
            if not os.path.isfile(path):
                raise InputError(f"{path}: no such file")
        for folder in (self.tasks_folder, self.data_folder):
            if folder is not None and not os.path.isdir(folder):
                raise InputError(f"{folder}: no such folder")
