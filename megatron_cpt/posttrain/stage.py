"""A stage of post-training: what SFT and DPO check, read and decide before they train."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import datasets
from accelerate import PartialState

from megatron_cpt.platforms.devices import device_type
from megatron_cpt.posttrain.answer_languages import Identify, language_identifier
from megatron_cpt.posttrain.checkpoints import find_trainer_checkpoint, locked_tuning_folder, sealed_steps
from megatron_cpt.posttrain.data import Prepared
from megatron_cpt.posttrain.identity import facts_of, facts_of_examples
from megatron_cpt.posttrain.llamafactory import export
from megatron_cpt.posttrain.models import check_fit
from megatron_cpt.posttrain.report import show_report
from megatron_cpt.posttrain.run_files import accumulation
from megatron_cpt.posttrain.runner import check_resumes, check_tuning_files, load_dated_template
from megatron_cpt.posttrain.settings import (
    DpoConfig,
    OptimizerSettings,
    RunSettings,
    SftConfig,
    TrainingSettings,
    TuningDataConfig,
)
from megatron_cpt.posttrain.sharding import check_sharding, recomputes
from megatron_cpt.posttrain.templates import Example as Conversation
from megatron_cpt.posttrain.templates import PairExample, Template, load_template

Example = TypeVar("Example", Conversation, PairExample)
Config = TypeVar("Config", SftConfig, DpoConfig)


@dataclass(frozen=True)
class TuningStage(Generic[Config, Example]):
    """A run that is ready to train.

    Attributes:
        config: of the run
        arguments: of transformers' trainer
        template: with the tokenizer
        prepared: the data
        checkpoint: where the run resumes
        facts: for run.json
    """

    config: Config
    arguments: dict[str, Any]
    template: Template
    prepared: Prepared[Example]
    checkpoint: str | None
    facts: dict[str, Any]


def finetune(
    config: Config,
    prepare: Callable[[TuningDataConfig, Template, int, Identify | None], Prepared[Example]],
    train: Callable[[TuningStage[Config, Example]], str],
) -> str:
    """Prepare a stage, and train or export it; returns the folder of the result.

    Args:
        config: of the run
        prepare: makes examples of (the settings of the data, the template, the seed, what names languages)
        train: trains on what was prepared; returns the folder
    """
    files = check_tuning_files(None if config.export_to is not None else config.save, config.model, config.data)
    datasets.disable_progress_bars()
    use_cpu = device_type() == "cpu"
    process = PartialState(cpu=use_cpu)
    check_sharding(config.lora)
    arguments = trainer_arguments(config.save, config.training, config.optimizer, config.run, process.num_processes, use_cpu)
    arguments["gradient_checkpointing"] = config.training.gradient_checkpointing and not recomputes()
    if config.export_to is not None:
        template = load_template(config.model, config.data.chat_template)
        prepared = prepare(config.data, template, config.training.seed, language_identifier())
        show_report(prepared)
        return export(config.export_to, config, prepared, process.num_processes)
    seen = sealed_steps(config.save)
    checkpoint = find_trainer_checkpoint(config.save)
    template = load_dated_template(config.model, config.data.chat_template, checkpoint)
    facts = facts_of(dataclasses.asdict(config), files, config.model, template)
    check_resumes(checkpoint, facts)
    identify = language_identifier() if process.is_main_process else None  # which writes the report
    prepared = prepare(config.data, template, config.training.seed, identify)
    facts |= facts_of_examples(prepared)
    check_resumes(checkpoint, facts)  # such as other rows that an older version would have left out
    check_fit(config.model, prepared)
    with locked_tuning_folder(config.save, seen):
        return train(TuningStage(config, arguments, template, prepared, checkpoint, facts))


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
