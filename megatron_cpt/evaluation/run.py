"""The measurements of tools/evaluate.py: one model after the other, each part once."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import sys
from collections.abc import Callable
from typing import Any

import torch

from megatron_cpt.checkpoint.layout import versions, write_json, write_text
from megatron_cpt.checkpoint.vocabulary import load
from megatron_cpt.errors import InputError
from megatron_cpt.evaluation.bits_per_byte import text_loss
from megatron_cpt.evaluation.config import EvaluateConfig, PromptsConfig, TextConfig
from megatron_cpt.evaluation.harness import SUITES, Benchmark, Harness
from megatron_cpt.evaluation.language_share import language_share
from megatron_cpt.evaluation.table import markdown
from megatron_cpt.posttrain.conversations import RowError, parse_conversation, parse_preference
from megatron_cpt.posttrain.models import check_model
from megatron_cpt.posttrain.rows import read_rows
from megatron_cpt.posttrain.templates import Template

REPORT = "report.json"


def evaluate(config: EvaluateConfig) -> str:
    """Measure; returns the path of report.md."""
    for folder in config.models.values():
        check_model(folder)
    os.makedirs(config.output, exist_ok=True)
    measured = {name: measure(config, name, folder) for name, folder in config.models.items()}
    report = {"models": measured, "settings": settings_of(config), "versions": versions()}
    write_json(os.path.join(config.output, REPORT), report)
    path = os.path.join(config.output, "report.md")
    write_text(path, markdown(measured))
    print(markdown(measured), file=sys.stderr)
    return path


def settings_of(config: EvaluateConfig) -> dict[str, Any]:
    """Everything that a figure depends on but the model."""
    fields = dataclasses.asdict(config)
    return {name: value for name, value in fields.items() if name not in ("models", "output")}


def measure(config: EvaluateConfig, name: str, folder: str) -> dict[str, Any]:
    """All parts of one model; those in OUTPUT/NAME.json are taken from there if nothing that they depend on has changed."""
    path = os.path.join(config.output, f"{name}.json")
    weights = sorted(entry for entry in os.listdir(folder) if entry.endswith((".safetensors", ".bin")))
    stats = [[entry, os.stat(os.path.join(folder, entry)).st_mtime_ns] for entry in weights]
    identity = json.loads(json.dumps({"model": os.path.abspath(folder), "weights": stats, "settings": settings_of(config)}))
    parts: dict[str, Any] = {}
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            before = json.load(file)
        parts = before["parts"] if before["identity"] == identity else {}
    session = Session(config, folder)
    todo: dict[str, Callable[[], Any]] = {}
    if config.text:
        todo["text"] = session.text
    if config.prompts:
        todo["answers"] = session.answers
    if config.suite or config.tasks:
        todo["benchmarks"] = session.benchmarks
    for part, work in todo.items():
        if part not in parts:
            print(f"{name}: {part}", file=sys.stderr, flush=True)
            parts[part] = work()
            write_json(path, {"identity": identity, "parts": parts})
    session.close()
    return parts


class Session:
    """A model in memory while it is measured."""

    def __init__(self, config: EvaluateConfig, folder: str) -> None:
        self._config, self._folder = config, folder
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._loaded: tuple[Any, Any] | None = None

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
        model, tokenizer = self._model()
        found = {}
        for prompts in self._config.prompts:
            questions = questions_of(prompts)
            answers = [
                answer_to(model, tokenizer, self._asked(tokenizer, q), self._config.max_new_tokens) for q in questions
            ]
            try:
                share = dataclasses.asdict(language_share(answers, prompts.language, tokenizer))
            except InputError as error:
                share = {"script": None, "identified": None, "tokens": 0, "missing": str(error)}
            pairs = [{"question": q, "answer": a} for q, a in zip(questions, answers, strict=True)]
            found[prompts.language] = share | {"answers": pairs}
        return found

    def benchmarks(self) -> dict[str, Any]:
        """name -> score."""
        self.close()  # lm-eval loads the model anew
        config = self._config
        wanted = [*SUITES.get(config.suite or "", ()), *(Benchmark(**dataclasses.asdict(task)) for task in config.tasks)]
        harness = Harness(
            self._folder, config.tasks_folder, config.data_folder, config.batch_size, config.chat, self._device
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
            model = transformers.AutoModelForCausalLM.from_pretrained(self._folder, dtype="auto", trust_remote_code=False)
            self._loaded = (model.to(self._device).eval(), load(self._folder))
        return self._loaded

    def _asked(self, tokenizer: Any, question: str) -> str:
        """What the model is given: by its chat template, or the bare question."""
        from megatron_cpt.posttrain.conversations import Message

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
