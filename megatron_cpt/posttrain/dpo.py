"""Direct preference optimization (Rafailov et al., 2023): of two answers, the better one becomes likelier. TRL's trainer."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from typing import Any, Literal

import datasets
import torch
from accelerate import PartialState
from trl import DPOConfig as TrlConfig
from trl import DPOTrainer

from megatron_cpt.chat_data.languages import language_identifier
from megatron_cpt.chat_data.templates import PairExample, load_template
from megatron_cpt.config.require import require
from megatron_cpt.platforms.devices import device_type
from megatron_cpt.posttrain.data import DataConfig, prepare_dpo
from megatron_cpt.posttrain.llamafactory import export
from megatron_cpt.posttrain.models import check_fit, load_model, lora, make_ready_to_answer, saved_dtype
from megatron_cpt.posttrain.report import show_report, write_report
from megatron_cpt.posttrain.runner import check_folder, check_same, train, write_run
from megatron_cpt.posttrain.settings import (
    LoraSettings,
    OptimizerSettings,
    RunSettings,
    TrainingSettings,
    trainer_arguments,
)
from megatron_cpt.posttrain.sharding import check_sharding, is_sharded, recomputes, shard


@dataclass(frozen=True)
class DpoConfig:
    """Preference optimization of a fine-tuned Hugging Face checkpoint."""

    model: str
    """HF folder to begin with, which is also the reference: what finetune_sft.py has written."""
    save: str
    """Folder of the run; the result goes into its subfolder "hf"."""
    data: DataConfig
    """What to train on: rows with chosen and rejected."""
    beta: float = 0.1
    """Strength of the tie to the reference."""
    loss_type: Literal["sigmoid", "hinge", "ipo", "robust", "sppo_hard", "apo_zero"] = "sigmoid"
    """As TRL names them; sigmoid is the paper's."""
    label_smoothing: float = 0.0
    """Share of pairs that are taken to be the wrong way round (cDPO; robust)."""
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
        require(self.beta > 0, "beta", self.beta, "a number above 0")
        require(0 <= self.label_smoothing < 0.5, "label_smoothing", self.label_smoothing, "0 or more, below 0.5")
        for section in (self.data, self.training, self.optimizer, self.run):
            section.check()


class TokenizedTrainer(DPOTrainer):
    """Takes pairs that are tokens already."""

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset


def finetune_dpo(config: DpoConfig) -> str:
    """Run it; returns the folder of the result."""
    check_folder(config.save, config.model)
    datasets.disable_progress_bars()
    use_cpu = device_type() == "cpu"
    process = PartialState(cpu=use_cpu)
    check_sharding(config.lora)
    arguments = trainer_arguments(config.save, config.training, config.optimizer, config.run, process.num_processes, use_cpu)
    arguments["gradient_checkpointing"] = config.training.gradient_checkpointing and not recomputes()
    if config.export_to is not None:
        template = load_template(config.model, config.data.chat_template)
        prepared = prepare_dpo(config.data, template, config.training.seed, language_identifier())
        show_report(prepared)
        return export(config.export_to, config, prepared, process.num_processes)
    settings = dataclasses.asdict(config)
    facts = check_same(config.save, settings, config.data.files())
    template = load_template(config.model, config.data.chat_template)
    identify = language_identifier() if process.is_main_process else None  # which writes the report
    prepared = prepare_dpo(config.data, template, config.training.seed, identify)
    check_fit(config.model, prepared)
    folder = os.path.join(config.save, "data")
    if process.is_main_process:
        write_run(config.save, facts)
        write_report(config.save, prepared)
        show_report(prepared)
        as_dataset(prepared.train).save_to_disk(os.path.join(folder, "train"))
        for language, pairs in prepared.validation.items():
            as_dataset(pairs).save_to_disk(os.path.join(folder, f"validation_{language}"))
    process.wait_for_everyone()
    # From files: the reference's probabilities are kept beside them, where all processes find them
    validation = {
        language: datasets.load_from_disk(os.path.join(folder, f"validation_{language}")) for language in prepared.validation
    }
    torch.set_float32_matmul_precision(config.training.float32_matmul_precision)
    # TRL would put the reference whole on every GPU to compute these; a sharded one beside the model takes little
    precompute = config.lora is None and not is_sharded()
    trl_config = TrlConfig(  # before the model: it says whether DeepSpeed is to partition it as it is read
        **arguments,
        max_length=None,
        beta=config.beta,
        loss_type=[config.loss_type],
        label_smoothing=config.label_smoothing,
        precompute_ref_log_probs=precompute,
        precompute_ref_batch_size=config.training.micro_batch_size,
    )
    model = load_model(config.model)
    make_ready_to_answer(model, template)
    needs_reference = config.lora is None and not precompute
    trainer = TokenizedTrainer(
        model=model,
        ref_model=shard(load_model(config.model), trl_config.mixed_precision) if needs_reference else None,
        args=trl_config,
        train_dataset=datasets.load_from_disk(os.path.join(folder, "train")),
        eval_dataset=validation or None,
        processing_class=template.tokenizer,
        peft_config=lora(config.lora, model),
    )
    merge = config.lora is None or config.lora.merge
    return train(trainer, config.save, template.tokenizer, settings, merge, saved_dtype(config.model))


def as_dataset(pairs: list[PairExample]) -> datasets.Dataset:
    """With the names that TRL knows."""
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return datasets.Dataset.from_dict({name: [getattr(pair, name) for pair in pairs] for name in names})
