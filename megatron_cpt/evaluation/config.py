"""What tools/evaluate.py measures, and on what."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from megatron_cpt.config.renamed import formerly
from megatron_cpt.config.require import Requirements, require, require_at_least
from megatron_cpt.config.values import Text
from megatron_cpt.utils.errors import InputError
from megatron_cpt.utils.language_codes import check_language
from megatron_cpt.utils.redaction import redacted


@dataclass(frozen=True)
class TextConfig:
    """Held-out text."""

    path: str
    """JSON Lines with "text"."""
    language: str
    """Of the text, such as en or zh."""
    max_documents: int | None = None
    """Take the first so many."""

    def __post_init__(self) -> None:
        with Requirements() as need:
            need.at_least(self, max_documents=1)
            with need.noted():
                check_language(self.language)


@dataclass(frozen=True)
class PromptsConfig:
    """Questions in a language, to see in which one they are answered."""

    path: str
    """As for finetune_sft.py (JSON, JSON Lines, Parquet), answers or not; the first question of each row is asked."""
    language: str
    """Of the questions, and expected of the answers: its ISO 639 code, by which it is identified."""
    max_prompts: int = 50
    """Take the first so many."""

    def __post_init__(self) -> None:
        with Requirements() as need:
            need.at_least(self, max_prompts=1)
            with need.noted():
                check_language(self.language)
                is_code = re.fullmatch(r"[a-z]{2,3}(-[A-Za-z0-9]+)*", self.language) is not None
                require(is_code, "language", repr(self.language), "a code such as en, zh or zh-TW")


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
class JudgeConfig:
    """Who says which of two answers is better: a model behind an endpoint (url, model), or people (votes)."""

    url: str | None = None
    """OpenAI-compatible, such as http://localhost:8000/v1."""
    model: Text | None = None
    """As the endpoint names it."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the API key. Default: none is sent."""
    prompt: str | None = None
    """File with {question}, {answer_a} and {answer_b} in it, asking for [[A]], [[B]] or [[C]]. Default: JUDGE_PROMPT."""
    parallel: int = 4
    """Questions that are asked at the same time."""
    timeout: float = 120.0
    """Seconds that an answer of the endpoint is waited for, before it is asked again, four times at most."""
    votes: str | None = None
    """JSON Lines with question, model_a, model_b, vote (a, b or tie) and annotator."""

    def __post_init__(self) -> None:
        with Requirements() as need:
            need.at_least(self, parallel=1)
            need.field(self, "timeout", lambda seconds: 0 < seconds < math.inf, "a number of seconds above 0")
            for check in (self._check_kind, self._check_url):
                with need.noted():
                    check()

    def _check_kind(self) -> None:
        url = None if self.url is None else redacted(self.url)
        if (url is None) == (self.votes is None):
            raise InputError(f"pairwise.judge has url {url} and votes {self.votes}; expected one of the two")
        if (url is None) != (self.model is None):
            raise InputError(f"pairwise.judge has url {url} and model {self.model}; an endpoint needs both")

    def _check_url(self) -> None:
        if self.url is not None and redacted(self.url) != self.url:
            found = f"{redacted(self.url)}, with a name, password or key in it"
            raise InputError(f"pairwise.judge.url is {found}; expected a URL without, and the key by api_key_env")


@dataclass(frozen=True)
class PairwiseConfig:
    """Which of two models answers better."""

    judge: JudgeConfig
    prompts: list[PromptsConfig] = field(default_factory=list)
    """What both are asked; not needed for votes."""
    pairs: list[list[str]] | None = None
    """[model, the one it is compared with]. Default: every later model with the first."""

    def __post_init__(self) -> None:
        if self.judge.url is not None and not self.prompts:
            raise InputError("pairwise.prompts is empty; a judge needs answers to compare")


@dataclass(frozen=True)
class TrajectoryCheckpoint:
    """A Hugging Face folder at some point of a run."""

    iteration: int
    model: str
    """HF folder."""
    tokens: int | None = None
    """That it was trained on in the run."""

    def __post_init__(self) -> None:
        require_at_least(self, iteration=0, tokens=0)


@dataclass(frozen=True)
class TrajectoryConfig:
    """The same measurements along a run."""

    run: str | None = None
    """Folder of a CPT run with iter_* checkpoints."""
    every: int | None = None
    """Measure only iterations that this divides, and the last. Default: all checkpoints."""
    checkpoints: list[TrajectoryCheckpoint] = field(default_factory=list)
    """HF folders, instead of a run or beside it: what it started from, say, at iteration 0."""

    def __post_init__(self) -> None:
        with Requirements() as need:
            need.at_least(self, every=1)
            with need.noted():
                if self.run is None and not self.checkpoints:
                    raise InputError("trajectory has neither run nor checkpoints; expected one of the two")
            with need.noted():
                iterations = [checkpoint.iteration for checkpoint in self.checkpoints]
                if len(set(iterations)) < len(iterations):
                    raise InputError(f"trajectory.checkpoints has the iterations {iterations}; expected each once")


@dataclass(frozen=True)
class VariantConfig:
    """What went into a model."""

    model: str
    """Name among `models`."""
    cpt: bool
    """Whether it was pre-trained further."""
    additional_data: bool
    """Whether it was fine-tuned on data in the additional language."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Benchmarks, bits per byte and language of the answers of one or more Hugging Face checkpoints."""

    output: str
    """Folder for NAME.json, report.json and report.md; what is there already is not measured again."""
    models: dict[str, str] = field(default_factory=dict)
    """Name in tables -> HF folder."""
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
    pairwise: PairwiseConfig | None = None
    """Compare models by their answers."""
    ablation: list[VariantConfig] = field(default_factory=list)
    """Lay out models by what went into them."""
    trajectory: TrajectoryConfig | None = None
    """Measure the checkpoints of a run."""
    apply_chat_template: bool = field(default=False, metadata=formerly("chat"))
    """Ask benchmarks through the model's chat template, too; `prompts` always are where a model has one."""
    chat_template: str | None = None
    """For `prompts`, of models that have none: llama3, chatml, or a file. Default: they are given the bare question."""
    limit: int | None = None
    """Questions of each benchmark. Default: all."""
    max_new_tokens: int = 128
    """Of the answers to `prompts`."""
    max_length: int = field(default=2048, metadata=formerly("window"))
    """Tokens of text that are read at once."""
    batch_size: int = 1
    """Questions of benchmarks, and prompts, that are asked at once. In bf16 answers may depend on it."""
    device_map: Literal["auto"] | None = None
    """auto: a model's layers are laid over all GPUs, for models that are too large for one. Default: all on one device."""
    confirm_run_unsafe_code: bool = field(default=False, metadata=formerly("allow_code"))
    """Run code that the model writes (HumanEval), in processes with limits. It may do harm all the same."""
    seed: int = 1234
    """Of the choice of examples."""

    def __post_init__(self) -> None:
        with Requirements() as need:
            need.at_least(self, limit=1, max_new_tokens=1, max_length=8, batch_size=1)
            with need.noted():
                if not self.models and self.trajectory is None:
                    raise InputError(f"models is {self.models}; expected a name and a folder for each")
            with need.noted():
                for name in self.models:
                    with need.noted():
                        check_model_name(name)
            with need.noted():
                parts = self.suite or self.tasks or self.text or self.prompts
                if not parts and (self.trajectory is not None or self.pairwise is None):
                    raise InputError("text, prompts, tasks and suite are all empty; expected something to measure")
            with need.noted():
                if self.pairwise is not None:
                    check_pairs(self.pairwise, list(self.models))
            with need.noted():
                check_ablation(self.ablation, list(self.models))


def check_model_name(model: str) -> None:
    """Raise InputError unless the name of a model can be that of a file and of a row in a table."""
    if not model or not model.isprintable() or set(model) & set("/|") or model in ("report", "trajectory"):
        wanted = "one that can be the name of a file and stand in a table, other than report and trajectory"
        raise InputError(f"models has the name {model!r}; expected {wanted}")


def check_pairs(pairwise: PairwiseConfig, models: list[str]) -> None:
    """Raise InputError unless there are pairs, each of two models that there are."""
    if len(models) < 2:
        raise InputError(f"pairwise compares models, and models has {len(models)}; expected two or more")
    with Requirements() as need:
        for pair in pairwise.pairs or []:
            with need.noted():
                if len(pair) != 2 or pair[0] == pair[1] or not set(pair) <= set(models):
                    raise InputError(f"pairwise.pairs has {pair}; expected two names of {', '.join(models)}")


def check_ablation(variants: list[VariantConfig], models: list[str]) -> None:
    """Raise InputError unless each is a model that there is, with something of its own, and one has everything."""
    with Requirements() as need:
        for variant in variants:
            with need.noted():
                if variant.model not in models:
                    raise InputError(f"ablation has the model {variant.model!r}; expected one of {', '.join(models)}")
        with need.noted():
            check_ablation_kinds([(variant.cpt, variant.additional_data) for variant in variants])


def check_ablation_kinds(kinds: Sequence[tuple[bool, bool]]) -> None:
    """Raise InputError unless each model of an ablation differs (cpt, additional_data), and one has both."""
    if len(set(kinds)) < len(kinds):
        raise InputError("ablation has two models with the same cpt and additional_data; expected each combination once")
    if kinds and (True, True) not in kinds:
        raise InputError("ablation has no model with cpt: true and additional_data: true, to which the others compare")
