"""The measurements of tools/evaluate.py: one model after the other, each part once."""

from __future__ import annotations

import dataclasses
import gc
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from megatron_cpt.checkpoint.hf_model import load_hf_model
from megatron_cpt.convert.vocabulary import load_hf_tokenizer
from megatron_cpt.evaluation.bits_per_byte import text_loss
from megatron_cpt.evaluation.config import EvaluateConfig, PromptsConfig, TextConfig
from megatron_cpt.evaluation.harness import SUITES, Benchmark, Harness, TaskRegistry
from megatron_cpt.evaluation.identity import answers_identity, benchmark_identity, pairwise_identity, text_identity
from megatron_cpt.evaluation.language_share import language_share
from megatron_cpt.model.hf_folder import check_answer_fits, positions_of_config
from megatron_cpt.platforms.devices import device_type
from megatron_cpt.posttrain.conversations import RowError, check_turns, for_asking, messages_of, parse_preference
from megatron_cpt.posttrain.rows import read_source_rows
from megatron_cpt.posttrain.templates import PromptTemplate
from megatron_cpt.posttrain.turn_end import TurnEnd, turn_end
from megatron_cpt.utils.errors import InputError
from megatron_cpt.utils.files import write_json

logger = logging.getLogger(__name__)

FORMAT = 2  # of the files of measurements


def recall(path: str, model: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What was measured of a model before, none if it has changed: part -> name -> identity and what was found.

    Raises:
        InputError: the file is damaged
    """
    if not os.path.exists(path):
        return {}
    with open(path, encoding="utf-8") as file:
        try:
            before = json.load(file)
            if before["identity"] != {"format": FORMAT, "model": model}:
                return {}
            return {
                part: {name: {"identity": entry["identity"], "found": entry["found"]} for name, entry in names.items()}
                for part, names in before["parts"].items()
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path} is damaged: {error}; remove it to measure again") from error


def wanted_parts(config: EvaluateConfig) -> list[str]:
    """What is measured of every model and checkpoint."""
    wanted = {"text": config.text, "answers": config.prompts, "benchmarks": config.suite or config.tasks}
    return [part for part, given in wanted.items() if given]


def benchmarks_of(config: EvaluateConfig) -> list[Benchmark]:
    """Of the suite, and the further ones.

    Raises:
        InputError: two have the same name
    """
    found = [*SUITES.get(config.suite or "", ()), *(Benchmark(**dataclasses.asdict(task)) for task in config.tasks)]
    names = Counter(benchmark.name for benchmark in found)
    for name, number in names.items():
        if number > 1:
            raise InputError(f"tasks and suite {config.suite} have the name {name} {number} times; use other names")
    return found


def benchmark_named(config: EvaluateConfig, name: str) -> Benchmark:
    """One of `benchmarks_of`."""
    return next(benchmark for benchmark in benchmarks_of(config) if benchmark.name == name)


def names_in(config: EvaluateConfig, part: str) -> list[str]:
    """What a part of the measurements consists of: languages, benchmarks."""
    if part == "benchmarks":
        return [benchmark.name for benchmark in benchmarks_of(config)]
    if part == "pairwise":
        return ["answers"]
    return list(dict.fromkeys(item.language for item in (config.text if part == "text" else config.prompts)))


def identities_of(config: EvaluateConfig, registry: TaskRegistry | None, parts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """part -> name -> what it depends on beside the model, as JSON gives it back."""
    index = registry.manager.task_index if registry is not None else {}
    kinds: dict[str, Callable[[str], Any]] = {
        "text": lambda name: text_identity(config, name),
        "answers": lambda name: answers_identity(config, name),
        "pairwise": lambda name: pairwise_identity(config),
        "benchmarks": lambda name: benchmark_identity(config, benchmark_named(config, name), index),
    }
    found = {part: {name: kinds[part](name) for name in names_in(config, part)} for part in parts}
    return dict(json.loads(json.dumps(found)))


def still_true(kept: dict[str, dict[str, Any]], identities: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What was found of that which is wanted now, in the order of tables, unless what it depends on has changed."""
    return {
        part: {
            name: kept[part][name]["found"]
            for name, identity in names.items()
            if kept.get(part, {}).get(name, {}).get("identity") == identity
        }
        for part, names in identities.items()
    }


def without_mended(config: EvaluateConfig, scores: dict[str, Any], registry: TaskRegistry) -> dict[str, Any]:
    """Scores without the benchmarks that could not be measured and now can, or cannot for another reason."""

    def changed(name: str) -> bool:
        benchmark, reason = benchmark_named(config, name), scores[name]["missing"]
        looked_for = reason is not None and benchmark.absent is None
        return looked_for and registry.missing(benchmark.task, config.confirm_run_unsafe_code) != reason

    return {name: score for name, score in scores.items() if not changed(name)}


def measure_model(
    config: EvaluateConfig,
    registry: TaskRegistry | None,
    parts: Sequence[str],
    name: str,
    path: str,
    model: dict[str, Any],
    opened: AbstractContextManager[str],
) -> dict[str, Any]:
    """The parts of one model; what is in the file `path` is taken from there if nothing that it depends on has changed.

    Args:
        registry: of benchmarks, if there are any
        name: for the screen
        model: what tells it from others
        opened: gives its HF folder; entered only if there is something to measure
    """
    identities, kept = identities_of(config, registry, parts), recall(path, model)
    found = still_true(kept, identities)
    if registry is not None and "benchmarks" in found:
        found["benchmarks"] = without_mended(config, found["benchmarks"], registry)
    wanted = [(part, key) for part, names in identities.items() for key in names if key not in found[part]]
    if not wanted:
        return found
    with opened as folder:
        session = Session(config, registry, folder)
        for part, key in wanted:
            logger.info(f"{name}: {part}: {key}")
            entry = {"identity": identities[part][key], "found": session.measure(part, key)}
            kept[part] = kept.get(part, {}) | {key: entry}
            write_json(path, {"identity": {"format": FORMAT, "model": model}, "parts": kept})
        session.close()
    return still_true(kept, identities)


def check_questions(config: EvaluateConfig) -> None:
    """Raise InputError unless there are texts and questions in all files: what is wrong is known before hours are spent."""
    for text in config.text:
        if not any(texts_of(text)):
            raise InputError(f"{text.path} holds no text; expected a row or more")
    for prompts in [*config.prompts, *(config.pairwise.prompts if config.pairwise is not None else [])]:
        if not questions_of(prompts):
            raise InputError(f"{prompts.path} holds no question; expected a row or more")


class Session:
    """A model in memory while it is measured."""

    def __init__(self, config: EvaluateConfig, registry: TaskRegistry | None, folder: str) -> None:
        self._config, self._registry, self._folder = config, registry, folder
        self._device = device_type()
        self._loaded: tuple[Any, Any] | None = None
        self._harness: Harness | None = None
        self._end: TurnEnd | None = None
        self._answers: dict[PromptsConfig, list[dict[str, Any]]] = {}

    def measure(self, part: str, name: str) -> Any:
        """One of the names in one of the parts text, answers, pairwise and benchmarks."""
        parts: dict[str, Callable[[str], Any]] = {
            "text": self.text,
            "answers": self.answers,
            "pairwise": self.pairwise,
            "benchmarks": self.benchmark,
        }
        return parts[part](name)

    def text(self, language: str) -> dict[str, Any]:
        """Loss, bits per byte."""
        model, tokenizer = self._model()
        window = int(min(self._config.max_length, positions_of_config(model.config)))
        documents = [text for item in self._config.text if item.language == language for text in texts_of(item)]
        return dataclasses.asdict(text_loss(model, tokenizer, documents, window))

    def answers(self, language: str) -> dict[str, Any]:
        """Shares of the answers' tokens that are in the language, and the answers."""
        _, tokenizer = self._model()
        asked = [prompts for prompts in self._config.prompts if prompts.language == language]
        pairs = [pair for prompts in asked for pair in self._answered(prompts)]
        try:
            share = dataclasses.asdict(language_share([pair["answer"] for pair in pairs], language, tokenizer))
        except InputError as error:
            share = {"script": None, "identified": None, "tokens": 0, "missing": str(error)}
        return share | {"answers": pairs}

    def pairwise(self, name: str) -> list[dict[str, Any]]:
        """Answers for a judge."""
        asked = self._config.pairwise.prompts if self._config.pairwise is not None else []
        return [pair for prompts in asked for pair in self._answered(prompts)]

    def benchmark(self, name: str) -> dict[str, Any]:
        """A score."""
        assert self._registry is not None
        config = self._config
        if self._harness is None:
            self.close()  # lm-eval loads the model anew
            spread = config.device_map is not None
            self._harness = Harness(
                self._folder, self._registry, config.batch_size, config.apply_chat_template, self._device, spread
            )
        benchmark = benchmark_named(config, name)
        return dataclasses.asdict(self._harness.score(benchmark, config.limit, config.confirm_run_unsafe_code, config.seed))

    def close(self) -> None:
        """Give its memory back."""
        self._loaded = self._harness = None
        gc.collect()

    def _model(self) -> tuple[Any, Any]:
        import transformers

        if self._loaded is None:
            transformers.utils.logging.disable_progress_bar()
            tokenizer = load_hf_tokenizer(self._folder)
            model = load_hf_model(self._folder, dtype="auto", device_map=self._config.device_map or self._device)
            self._loaded = (model.eval(), tokenizer)
        return self._loaded

    def _answered(self, prompts: PromptsConfig) -> list[dict[str, Any]]:
        """Questions with answers; the same prompts are answered once."""
        if prompts not in self._answers:
            model, tokenizer = self._model()
            config, questions = self._config, questions_of(prompts)
            asked = [self._asked(tokenizer, question) for question in questions]
            if self._end is None:  # the tokenizer has the chat template by now
                self._end = turn_end(tokenizer, model.generation_config)
            answers: list[Answer] = []
            for begin in range(0, len(asked), config.batch_size):
                batch = asked[begin : begin + config.batch_size]
                answers += answers_to(model, tokenizer, batch, config.max_new_tokens, self._end)
            self._answers[prompts] = [
                {"question": question, "answer": answer.text, "cut_off": answer.cut_off}
                for question, answer in zip(questions, answers, strict=True)
            ]
        return self._answers[prompts]

    def _asked(self, tokenizer: Any, question: str) -> str:
        """What the model is given: by its chat template, or the bare question."""
        from megatron_cpt.posttrain.conversations import Message

        if tokenizer.chat_template is None and self._config.chat_template is None:
            return question + "\n"
        name = None if tokenizer.chat_template is not None else self._config.chat_template
        try:
            return PromptTemplate(tokenizer, name).prompt([Message("user", question)])
        except RowError as error:
            raise InputError(f"{self._folder}: {error} (asked: {question[:40]!r})") from error


@dataclass(frozen=True)
class Answer:
    """What a model says to a prompt.

    Attributes:
        cut_off: whether it has reached max_new_tokens without an end
    """

    text: str
    cut_off: bool


@torch.inference_mode()
def answers_to(model: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int, end: TurnEnd) -> list[Answer]:
    """The likeliest continuations, token by token, of all at once, each up to its end.

    Raises:
        InputError: a prompt leaves the model too few positions
    """
    from transformers import GenerationConfig, StoppingCriteriaList

    ids = [tokenizer.encode(prompt, add_special_tokens=tokenizer.chat_template is None) for prompt in prompts]
    for prompt, row in zip(prompts, ids, strict=True):
        check_answer_fits(model.name_or_path, positions_of_config(model.config), prompt, len(row), max_new_tokens)
    width = max(map(len, ids))
    padding = 0 if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    inputs = torch.tensor([[padding] * (width - len(row)) + row for row in ids], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids], device=model.device)
    model.generation_config = GenerationConfig()  # what the folder's own says beside the ends is no part of the measure
    output = model.generate(
        input_ids=inputs,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=list(end.token_ids) or None,
        pad_token_id=padding,
        stopping_criteria=StoppingCriteriaList([end.criterion(tokenizer, width)]),
    )
    return [decode_answer(tokenizer, row, end) for row in output[:, width:].tolist()]


def decode_answer(tokenizer: Any, ids: Sequence[int], end: TurnEnd) -> Answer:
    """Text of the tokens up to the first end; what comes after it is padding."""
    size = next((place for place, number in enumerate(ids) if number in end.token_ids), len(ids))
    text = tokenizer.decode(ids[:size], skip_special_tokens=True)
    return Answer(end.cut(text), not end.is_in(ids, text))


def texts_of(text: TextConfig) -> list[str]:
    """The texts of a file.

    Raises:
        InputError: a row has none
    """
    documents = []
    for number, row in read_source_rows(text.path):
        if isinstance(row, RowError) or not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise InputError(f'{text.path}, row {number} has no text; expected an object with "text"')
        documents.append(row["text"])
        if len(documents) == text.max_documents:
            break
    return documents


def questions_of(prompts: PromptsConfig) -> list[str]:
    """The first question of each row, which needs no answer.

    Raises:
        InputError: a row has none
    """
    questions = []
    for number, row in read_source_rows(prompts.path):
        try:
            if isinstance(row, RowError):
                raise row
            row = for_asking(row)
            preference = isinstance(row, dict) and "chosen" in row
            turns = parse_preference(row).prompt if preference else messages_of(row, prompt_only=True)
            check_turns(turns)
        except RowError as error:
            raise InputError(f"{prompts.path}, row {number}: {error}") from error
        questions.append(next(turn.content for turn in turns if turn.role == "user"))
        if len(questions) == prompts.max_prompts:
            break
    return questions
