"""The configurations of SFT and DPO. Nothing here imports torch: a wrong setting is refused before that is."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Literal

from megatron_cpt.config.renamed import formerly
from megatron_cpt.config.require import Requirements, require, require_at_least
from megatron_cpt.config.values import Prose, Text
from megatron_cpt.utils.errors import InputError
from megatron_cpt.utils.language_codes import check_language

Group = Literal["general", "additional"]
MOST_LENGTH = 2**20  # of an example or a pack: TRL's packing takes memory for each possible length


@dataclass(frozen=True)
class TrainingSettings:
    """Length, batch and precision."""

    epochs: float = 1.0
    """Passes over the data; a part of one, too."""
    max_steps: int | None = None
    """Steps, instead of epochs."""
    micro_batch_size: int = 1
    """Examples of a process at a time; with packing, packs of max_length tokens."""
    global_batch_size: int = 8
    """Examples of a step, over all processes."""
    params_dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision of the forward and backward pass; the weights that are trained are fp32."""
    float32_matmul_precision: Literal["highest", "high", "medium"] = "highest"
    """Of products of fp32 matrices, as torch names it; medium is faster where the processor has bf16 (TF32 on GPUs)."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass, to save memory."""
    seed: int = 1234
    """Of the order of the data, of the rows that are picked, and of the first values of adapters."""

    def __post_init__(self) -> None:
        with Requirements() as need:
            need.at_least(self, max_steps=1, micro_batch_size=1, global_batch_size=1)
            need.field(self, "epochs", lambda epochs: 0 < epochs < math.inf, "a number above 0")
            need.field(self, "seed", lambda seed: 0 <= seed < 1 << 32, "a whole number from 0 to 2^32 - 1")


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW and the learning rate."""

    lr: float = 1e-5
    """After the warm-up."""
    decay_style: Literal["cosine", "linear", "constant"] = "cosine"
    """To zero at the end."""
    warmup_fraction: float = 0.03
    """Of the steps."""
    weight_decay: float = 0.0
    """Of matrices; norms and biases have none."""
    clip_grad: float = 1.0
    """Longest gradient; 0: any."""
    adam_beta1: float = 0.9
    """Decay of the first moment."""
    adam_beta2: float = 0.95
    """Decay of the second."""
    adam_eps: float = 1e-8
    """Added to the root of the second moment."""

    def __post_init__(self) -> None:
        with Requirements() as need:
            need.field(self, "lr", lambda lr: 0 < lr < 1, "a number above 0 and below 1")
            need.at_least(self, weight_decay=0, clip_grad=0, adam_eps=0)
            for name in ("warmup_fraction", "adam_beta1", "adam_beta2"):
                need.field(self, name, lambda share: 0 <= share < 1, "0 or more, below 1")


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters (PEFT) instead of training all weights."""

    r: int = 16
    """Rank."""
    alpha: int = 32
    """Scale of the adapters, over the rank."""
    dropout: float = 0.0
    """On what goes into the adapters."""
    target_modules: str | list[str] = "all-linear"
    """Names of layers."""
    merge: bool = True
    """Write a model with the adapters merged into its weights; false: the adapters alone."""

    def __post_init__(self) -> None:
        with Requirements() as need:
            need.at_least(self, r=1, alpha=1)
            need.field(self, "dropout", lambda dropout: 0 <= dropout < 1, "0 or more, below 1")


@dataclass(frozen=True)
class RunSettings:
    """Saving, evaluating, logging."""

    save_interval: int | None = None
    """Steps between checkpoints to resume from; there is one on SIGTERM, too. Default: none."""
    keep_last: int = 2
    """Checkpoints that are kept."""
    eval_interval: int | None = None
    """Steps between evaluations; there is one before the first step and one after the last, too. Default: these two."""
    log_interval: int = 1
    """Steps between lines."""
    report_to: list[Literal["tensorboard", "wandb"]] = field(default_factory=list)
    """Beside metrics.jsonl."""

    def __post_init__(self) -> None:
        require_at_least(self, save_interval=1, keep_last=1, eval_interval=1, log_interval=1)


@dataclass(frozen=True)
class SourceConfig:
    """One file."""

    path: str
    """JSON (a list), JSON Lines or Parquet: alpaca, ShareGPT or OpenAI messages; for DPO with chosen and rejected."""
    language: str
    """Of its answers, such as en or zh."""
    group: Group = "general"
    """general, or additional: the language that ALMR is about."""
    max_rows: int | None = None
    """Use so many of its rows, picked at random; of `validation`, the first."""

    def __post_init__(self) -> None:
        with Requirements() as need:
            need.at_least(self, max_rows=1)
            with need.noted():
                can_name = re.fullmatch(r"[\w-]+", self.language) is not None  # files and metrics
                require(can_name, "language", repr(self.language), "a code such as en or zh")
                check_language(self.language)


@dataclass(frozen=True)
class TuningDataConfig:
    """What to train and to evaluate on."""

    sources: list[SourceConfig]
    """Files to train on."""
    validation: list[SourceConfig] = field(default_factory=list)
    """Files to evaluate on. Default: validation_share of each source."""
    validation_share: float = 0.02
    """Of each source's rows, where `validation` names no files; 0: no evaluation."""
    almr: float | None = None
    """Share of the additional sources in the tokens: rows of the group that has too many are left out, picked at random.
    Default: all rows."""
    max_length: int = 2048
    """Tokens of an example."""
    on_overlength: Literal["truncate", "skip", "refuse"] = field(default="truncate", metadata=formerly("too_long"))
    """What becomes of longer ones. Truncated at their end; without a token of an answer left they are skipped."""
    on_error: Literal["skip", "refuse"] = field(default="refuse", metadata=formerly("broken"))
    """What becomes of rows that cannot be used. Skipped ones are counted and named in the report."""
    chat_template: str | None = None
    """llama3, chatml, or a file with a Jinja template. Default: the tokenizer's own."""

    def __post_init__(self) -> None:
        with Requirements() as need:
            need.field(self, "max_length", lambda length: 8 <= length <= MOST_LENGTH, f"8 to {MOST_LENGTH:,}")
            need.field(self, "sources", lambda sources: len(sources) > 0, "one file or more")
            need.field(self, "validation_share", lambda share: 0 <= share < 1, "0 or more, below 1")
            need.field(self, "almr", lambda almr: 0 <= almr <= 1, "a number from 0 to 1")
            with need.noted():
                self._check_groups()

    def _check_groups(self) -> None:
        """Whether each group that is to have a share has a source."""
        groups = {source.group for source in self.sources}
        almr = -1.0 if self.almr is None else self.almr  # without one, or with one that is refused, no group has to be there
        wanted = {"general": 0 <= almr < 1, "additional": 0 < almr <= 1}
        for group in (group for group, has_share in wanted.items() if has_share and self.sources and group not in groups):
            raise InputError(f"almr is {self.almr}, but no source has the group {group}; expected one, or almr left out")


@dataclass(frozen=True)
class SftConfig:
    """Supervised fine-tuning of a Hugging Face checkpoint on conversations."""

    model: str
    """HF folder to begin with, such as convert_checkpoint.py megatron-to-hf writes."""
    save: str
    """Folder of the run; the result goes into its subfolder "hf"."""
    data: TuningDataConfig
    """What to train on."""
    packing: bool = True
    """Fill sequences of max_length tokens with whole conversations, which do not see each other."""
    training: TrainingSettings = field(default_factory=TrainingSettings)
    """See TrainingSettings."""
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    """See OptimizerSettings."""
    lora: LoraSettings | None = None
    """Train adapters only. Default: all weights."""
    run: RunSettings = field(default_factory=RunSettings)
    """See RunSettings."""
    export_to: str | None = None
    """Write data and settings for LLaMA-Factory into this folder, instead of training."""


SMOOTHED = ("sigmoid", "robust")  # losses that label_smoothing is defined for


@dataclass(frozen=True)
class DpoConfig:
    """Preference optimization of a fine-tuned Hugging Face checkpoint."""

    model: str
    """HF folder to begin with, which is also the reference: what finetune_sft.py has written."""
    save: str
    """Folder of the run; the result goes into its subfolder "hf"."""
    data: TuningDataConfig
    """What to train on: rows with chosen and rejected."""
    beta: float = 0.1
    """Strength of the tie to the reference."""
    loss_type: Literal["sigmoid", "hinge", "ipo", "robust", "sppo_hard", "apo_zero"] = "sigmoid"
    """As TRL names them; sigmoid is the paper's."""
    label_smoothing: float = 0.0
    """Share of pairs that are taken to be the wrong way round: conservative DPO with loss_type sigmoid, or robust."""
    training: TrainingSettings = field(default_factory=TrainingSettings)
    """See TrainingSettings."""
    optimizer: OptimizerSettings = field(default_factory=lambda: OptimizerSettings(lr=1e-6))
    """See OptimizerSettings."""
    lora: LoraSettings | None = None
    """Train adapters only; the model without them is the reference. Default: all weights, with the reference's
    probabilities computed before the first step, or, with FSDP, in each step by a sharded reference."""
    run: RunSettings = field(default_factory=RunSettings)
    """See RunSettings."""
    export_to: str | None = None
    """Write data and settings for LLaMA-Factory into this folder, instead of training."""

    def __post_init__(self) -> None:
        with Requirements() as need:
            need.field(self, "beta", lambda beta: 0 < beta < math.inf, "a number above 0")
            need.field(self, "label_smoothing", lambda share: 0 <= share < 0.5, "0 or more, below 0.5")
            with need.noted():
                smooths = 0 < self.label_smoothing < 0.5
                wanted = f"0 with loss_type {self.loss_type}, or {' or '.join(SMOOTHED)}"
                require(self.loss_type in SMOOTHED or not smooths, "label_smoothing", self.label_smoothing, wanted)


REPETITION_PENALTY = 1.2  # where a text is completed: small base models would say the same again and again


@dataclass(frozen=True)
class ChatConfig:
    """Talk to a Hugging Face checkpoint."""

    model: str
    """HF folder."""
    system: Text | None = None
    """System prompt."""
    chat_template: str | None = None
    """llama3, chatml, or a file with a Jinja template. Default: the tokenizer's own."""
    prompt: list[Text] | Prose | None = None
    """Text to complete instead of a conversation, as base models do, as it is; several (`--prompt A B`, or a list in a file)
    one after the other."""
    max_new_tokens: int | None = None
    """Longest answer. Default: 512, at most half of the model's positions."""
    temperature: float | None = None
    """0: always the likeliest token. Default: 0.7; 0 with prompt."""
    top_p: float = 0.9
    """Draw from the likeliest tokens that have this probability together."""
    repetition_penalty: float | None = None
    """Above 1: tokens that were there become less likely. Default: 1.0; 1.2 with prompt."""
    seed: int | None = None
    """The same answers again. Default: others each time."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """In which the model is run. Default: as it was saved."""

    def __post_init__(self) -> None:
        with Requirements() as need:
            need.at_least(self, max_new_tokens=1, temperature=0)
            need.field(self, "top_p", lambda share: 0 < share <= 1, "a number above 0, at most 1")
            need.field(self, "repetition_penalty", lambda penalty: penalty > 0, "a number above 0")
            for name in ("system", "chat_template"):
                need.field(self, name, lambda _: self.prompt is None, "nothing with prompt, a text to go on with as it is")

    def temperature_used(self) -> float:
        """What is given, or the default."""
        return self.temperature if self.temperature is not None else 0.7 if self.prompt is None else 0.0

    def penalty_used(self) -> float:
        """What is given, or the default."""
        return self.repetition_penalty or (1.0 if self.prompt is None else REPETITION_PENALTY)

    def prompts(self) -> list[str]:
        """The texts to complete, none in a conversation."""
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt or []
