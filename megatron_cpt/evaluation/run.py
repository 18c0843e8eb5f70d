"""The measurements of tools/evaluate.py: one model after the other, each part once."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from megatron_cpt.chat_data.conversations import RowError, parse_conversation, parse_preference
from megatron_cpt.chat_data.rows import read_rows
from megatron_cpt.chat_data.templates import Template
from megatron_cpt.checkpoint.layout import write_json
from megatron_cpt.checkpoint.vocabulary import load
from megatron_cpt.errors import InputError
from megatron_cpt.evaluation.bits_per_byte import text_loss
from megatron_cpt.evaluation.config import EvaluateConfig, PromptsConfig, TextConfig
from megatron_cpt.evaluation.harness import SUITES, Benchmark, Harness
from megatron_cpt.evaluation.language_share import language_share
from megatron_cpt.platforms.devices import device_type


def settings_of(config: EvaluateConfig) -> dict[str, Any]:
    """Everything that a figure depends on but the models, and how they are compared and laid out."""
    others = ("models", "output", "pairwise", "ablation", "trajectory")
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in others}


def folder_identity(folder: str) -> dict[str, Any]:
    """What tells a HF folder from others, and from what it was before."""
    weights = sorted(entry for entry in os.listdir(folder) if entry.endswith((".safetensors", ".bin")))
    stats = [[entry, os.stat(os.path.join(folder, entry)).st_mtime_ns] for entry in weights]
    return {"folder": os.path.abspath(folder), "weights": stats}


def identity_of(config: EvaluateConfig, model: dict[str, Any]) -> Any:
    """Everything that measurements depend on, as JSON gives it back."""
    return json.loads(json.dumps({"model": model, "settings": settings_of(config)}))


def recall(path: str, identity: Any) -> dict[str, Any]:
    """The parts that were measured before, none if something that they depend on has changed."""
    if not os.path.exists(path):
        return {}
    with open(path, encoding="utf-8") as file:
        before = json.load(file)
    return dict(before["parts"]) if before["identity"] == identity else {}


def wanted_parts(config: EvaluateConfig) -> list[str]:
    """What is measured of every model and checkpoint."""
    wanted = {"text": config.text, "answers": config.prompts, "benchmarks": config.suite or config.tasks}
    return [part for part, given in wanted.items() if given]


def measure(
    config: EvaluateConfig,
    parts: Sequence[str],
    name: str,
    path: str,
    model: dict[str, Any],
    opened: AbstractContextManager[str],
) -> dict[str, Any]:
    """The parts of one model; those in the file `path` are taken from there if nothing that they depend on has changed.

    Args:
        name: for the screen
        model: what tells it from others
        opened: gives its HF folder; entered only if there is something to measure
    """
    identity = identity_of(config, model)
    found = recall(path, identity)
    if config.pairwise is not None and found.get("pairwise", {}).get("prompts") != asked_for_pairs(config):
        found.pop("pairwise", None)
    todo = [part for part in parts if part not in found]
    if not todo:
        return found
    with opened as folder:
        session = Session(config, folder)
        for part in todo:
            print(f"{name}: {part}", file=sys.stderr, flush=True)
            found[part] = session.part(part)
            write_json(path, {"identity": identity, "parts": found})
        session.close()
    return found


def asked_for_pairs(config: EvaluateConfig) -> list[dict[str, Any]]:
    """The prompts of pairwise comparisons, as JSON has them."""
    return [dataclasses.asdict(prompts) for prompts in config.pairwise.prompts] if config.pairwise is not None else []


class Session:
    """A model in memory while it is measured."""

    def __init__(self, config: EvaluateConfig, folder: str) -> None:
        self._config, self._folder = config, folder
        self._device = device_type()
        self._loaded: tuple[Any, Any] | None = None
        self._answers: dict[PromptsConfig, list[dict[str, str]]] = {}

    def part(self, name: str) -> dict[str, Any]:
        """One of text, answers, pairwise and benchmarks."""
        parts: dict[str, Callable[[], dict[str, Any]]] = {
            "text": self.text,
            "answers": self.answers,
            "pairwise": self.pairwise,
            "benchmarks": self.benchmarks,
        }
        return parts[name]()

    def text(self) -> dict[str, Any]:
        """language -> loss, bits per byte."""
        model, tokenizer = self._model()
        window = min(self._config.window, model.config.max_position_embeddings)
        found: dict[str, list[str]] = {}
        for text in self._config.text:
            found.setdefault(text.language, []).extend(documents_of(text))
        return {
            language: dataclasses.asdict(text_loss(model, tokenizer, documents, window))
            for language, documents in found.items()
        }

    def answers(self) -> dict[str, Any]:
        """language -> shares of the answers' tokens that are in it, and the answers."""
        _, tokenizer = self._model()
        found = {}
        for prompts in self._config.prompts:
            pairs = self._answered(prompts)
            try:
                share = dataclasses.asdict(language_share([p["answer"] for p in pairs], prompts.language, tokenizer))
            except InputError as error:
                share = {"script": None, "identified": None, "tokens": 0, "missing": str(error)}
            found[prompts.language] = share | {"answers": pairs}
        return found

    def pairwise(self) -> dict[str, Any]:
        """Answers for a judge, and what they are answers to."""
        asked = self._config.pairwise.prompts if self._config.pairwise is not None else []
        answers = [pair for prompts in asked for pair in self._answered(prompts)]
        return {"prompts": asked_for_pairs(self._config), "answers": answers}

    def benchmarks(self) -> dict[str, Any]:
        """name -> score."""
        self.close()  # lm-eval loads the model anew
        config = self._config
        wanted = [*SUITES.get(config.suite or "", ()), *(Benchmark(**dataclasses.asdict(task)) for task in config.tasks)]
        spread = config.device_map is not None
        harness = Harness(
            self._folder, config.tasks_folder, config.data_folder, config.batch_size, config.chat, self._device, spread
        )
        scores = harness.scores(wanted, config.limit, config.allow_code, config.seed)
        return {name: dataclasses.asdict(score) for name, score in scores.items()}

    def close(self) -> None:
        """Give its memory back."""
        self._loaded = None
        gc.collect()

    def _model(self) -> tuple[Any, Any]:
        import transformers

        if self._loaded is None:
            transformers.utils.logging.disable_progress_bar()
            model = transformers.AutoModelForCausalLM.from_pretrained(
                self._folder, dtype="auto", device_map=self._config.device_map or self._device, trust_remote_code=False
            )
            self._loaded = (model.eval(), load(self._folder))
        return self._loaded

    def _answered(self, prompts: PromptsConfig) -> list[dict[str, str]]:
        """Questions with answers; the same prompts are answered once."""
        if prompts not in self._answers:
            model, tokenizer = self._model()
            self._answers[prompts] = [
                {
                    "question": question,
                    "answer": answer_to(model, tokenizer, self._asked(tokenizer, question), self._config.max_new_tokens),
                }
                for question in questions_of(prompts)
            ]
        return self._answers[prompts]

    def _asked(self, tokenizer: Any, question: str) -> str:
        """What the model is given: by its chat template, or the bare question."""
        from megatron_cpt.chat_data.conversations import Message

        if tokenizer.chat_template is None and self._config.chat_template is None:
            return question + "\n"
        name = None if tokenizer.chat_template is not None else self._config.chat_template
        return Template(tokenizer, name).prompt([Message("user", question)])


@torch.inference_mode()
def answer_to(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int) -> str:
    """The likeliest continuation, token by token."""
    inputs = tokenizer(prompt, add_special_tokens=tokenizer.chat_template is None, return_tensors="pt").to(model.device)
    output = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        pad_token_id=tokenizer.eos_token_id,
    )
    text: str = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text


def documents_of(text: TextConfig) -> list[str]:
    """The texts of a file.

    Raises:
        InputError: a row has none
    """
    documents = []
    for number, row in read_rows(text.path):
        if isinstance(row, RowError) or not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise InputError(f'{text.path}, row {number} has no text; wanted an object with "text"')
        documents.append(row["text"])
        if len(documents) == text.max_documents:
            break
    return documents


def questions_of(prompts: PromptsConfig) -> list[str]:
    """The first question of each row.

    Raises:
        InputError: a row has none
    """
    questions = []
    for number, row in read_rows(prompts.path):
        try:
            if isinstance(row, RowError):
                raise row
            preference = isinstance(row, dict) and "chosen" in row
            turns = parse_preference(row).prompt if preference else parse_conversation(row).messages
        except RowError as error:
            raise InputError(f"{prompts.path}, row {number}: {error}") from error
        questions.append(next(turn.content for turn in turns if turn.role == "user"))
        if len(questions) == prompts.max_prompts:
            break
    return questions
