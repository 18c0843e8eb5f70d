"""What SFT and DPO have in common in their configurations."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_cpt.config.require import require, require_at_least
from megatron_cpt.errors import InputError


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

    def check(self) -> None:
        """Raise InputError unless this can be done."""
        require_at_least(self, max_steps=1, micro_batch_size=1, global_batch_size=1)
        require(0 < self.epochs < math.inf, "training.epochs", self.epochs, "a number above 0")
        require(0 <= self.seed < 1 << 32, "training.seed", self.seed, "a whole number from 0 to 2^32 - 1")


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

    def check(self) -> None:
        """Raise InputError unless these are settings of AdamW."""
        require(0 < self.lr < 1, "optimizer.lr", self.lr, "a number above 0 and below 1")
        require(0 <= self.warmup_fraction < 1, "optimizer.warmup_fraction", self.warmup_fraction, "0 or more, below 1")
        require_at_least(self, weight_decay=0, clip_grad=0, adam_eps=0)
        for name in ("adam_beta1", "adam_beta2"):
            require(0 <= getattr(self, name) < 1, f"optimizer.{name}", getattr(self, name), "0 or more, below 1")


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
        require_at_least(self, r=1, alpha=1)
        require(0 <= self.dropout < 1, "lora.dropout", self.dropout, "0 or more, below 1")


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

    def check(self) -> None:
        """Raise InputError unless these are numbers of steps."""
        require_at_least(self, save_interval=1, keep_last=1, eval_interval=1, log_interval=1)


def accumulation(training: TrainingSettings, world_size: int) -> int:
    """Micro batches of a process in a step.

    Raises:
        InputError: the batch cannot be divided so
    """
    at_once = training.micro_batch_size * world_size
    if training.global_batch_size % at_once:
        parts = f"micro_batch_size {training.micro_batch_size} x {world_size} processes = {at_once}"
        raise InputError(f"global_batch_size {training.global_batch_size} is not a multiple of {parts}")
    return training.global_batch_size // at_once


def trainer_arguments(
    folder: str, training: TrainingSettings, optimizer: OptimizerSettings, run: RunSettings, world_size: int, use_cpu: bool
) -> dict[str, Any]:
    """Arguments of transformers' Trainer, by its names."""
    return {
        "output_dir": folder,
        "num_train_epochs": training.epochs,
        "max_steps": training.max_steps or -1,
        "per_device_train_batch_size": training.micro_batch_size,
        "per_device_eval_batch_size": training.micro_batch_size,
        "gradient_accumulation_steps": accumulation(training, world_size),
        "bf16": training.params_dtype == "bf16",
        "gradient_checkpointing": training.gradient_checkpointing,
        "seed": training.seed,
        "learning_rate": optimizer.lr,
        "lr_scheduler_type": optimizer.decay_style if optimizer.decay_style != "constant" else "constant_with_warmup",
        "warmup_steps": optimizer.warmup_fraction,
        "weight_decay": optimizer.weight_decay,
        "max_grad_norm": optimizer.clip_grad,
        "adam_beta1": optimizer.adam_beta1,
        "adam_beta2": optimizer.adam_beta2,
        "adam_epsilon": optimizer.adam_eps,
        "save_strategy": "no" if run.save_interval is None else "steps",
        "save_steps": run.save_interval or 500,
        "save_total_limit": run.keep_last,
        "eval_strategy": "no" if run.eval_interval is None else "steps",
        "eval_steps": run.eval_interval,
        "logging_steps": run.log_interval,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,  # or losses that are not numbers would be logged as the mean of the others
        "report_to": list(run.report_to),
        "disable_tqdm": True,
        "use_cpu": use_cpu,
    }
