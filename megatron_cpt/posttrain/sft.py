"""Supervised fine-tuning: a CPT checkpoint learns to answer. TRL's trainer on conversations that data.py has prepared."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from trl import SFTConfig as TrlConfig
from trl import SFTTrainer

from megatron_cpt.posttrain.data import prepare_sft
from megatron_cpt.posttrain.models import lora, model_to_train, saved_dtype
from megatron_cpt.posttrain.report import show_report, write_report
from megatron_cpt.posttrain.runner import run_training
from megatron_cpt.posttrain.settings import SftConfig
from megatron_cpt.posttrain.stage import TuningStage, finetune
from megatron_cpt.posttrain.templates import IGNORED, Example
from megatron_cpt.posttrain.trainers import FILLER_TOKENS, StepTrainer, own_batches


class AnswerLossTrainer(StepTrainer, SFTTrainer):
    """The mean loss of all answer tokens, of a step or of a set to evaluate on: the same for every batch size and layout."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._filler = filler_example(self.train_dataset[0])
        self.fill_up(self._filler)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's; fillers are taken out of its count of tokens."""
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.fillers and self.model.training:
            self.take_out(FILLER_TOKENS * fillers_in(inputs))
        return loss

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """{eval_LANGUAGE_loss, eval_LANGUAGE_tokens}"""
        sets = eval_dataset or self.eval_dataset or {}
        model = self.model_wrapped  # which gathers the weights of a sharded model
        was_training = model.training
        model.eval()
        metrics: dict[str, float] = {}
        for name, examples in sets.items():
            total = torch.zeros(2, dtype=torch.float64, device=self.args.device)
            for batch in own_batches(examples, self.args, self._filler):
                inputs = self._prepare_inputs(self.data_collator(batch))
                labels = inputs["labels"][:, 1:]
                logits = model(**{key: value for key, value in inputs.items() if key != "labels"}).logits[:, :-1]
                losses = torch.nn.functional.cross_entropy(
                    logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
                )
                total += torch.stack([losses.double(), (labels != IGNORED).sum().double()])
            loss, tokens = self.accelerator.reduce(total, "sum").tolist()
            metrics |= {f"{metric_key_prefix}_{name}_loss": loss / tokens, f"{metric_key_prefix}_{name}_tokens": tokens}
        self.log(metrics)  # before the model trains again: TRL adds its figures of the steps to what is logged then
        model.train(was_training)
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def filler_example(example: dict[str, Any]) -> dict[str, Any]:
    """An example like this one, of which no token counts."""
    filler = {"input_ids": example["input_ids"][:FILLER_TOKENS], "labels": [IGNORED] * FILLER_TOKENS}
    return filler | ({"seq_lengths": [FILLER_TOKENS]} if "seq_lengths" in example else {})


def fillers_in(inputs: dict[str, torch.Tensor]) -> int:
    """Number of examples in a batch of which no token counts; packed ones begin at position 0."""
    counts = inputs["labels"] != IGNORED
    if "position_ids" not in inputs:
        return int((~counts.any(dim=1)).sum())
    example = (inputs["position_ids"] == 0).cumsum(dim=1).flatten() - 1
    answered = torch.zeros(int(example[-1]) + 1, dtype=torch.long, device=counts.device)
    return int((answered.index_add(0, example, counts.flatten().long()) == 0).sum())


def finetune_sft(config: SftConfig) -> str:
    """Run it; returns the folder of the result."""
    return finetune(config, prepare_sft, train_sft)


def train_sft(stage: TuningStage[SftConfig, Example]) -> str:
    """Train on what was prepared; returns the folder of the result."""
    config, template, prepared = stage.config, stage.template, stage.prepared
    process, settings = PartialState(), dataclasses.asdict(config)
    if process.is_main_process:
        write_report(config.save, prepared)
        show_report(prepared)
    process.wait_for_everyone()
    torch.set_float32_matmul_precision(config.training.float32_matmul_precision)
    trl_config = TrlConfig(  # before the model: it says whether DeepSpeed is to partition it as it is read
        **stage.arguments,
        max_length=config.data.max_length,
        packing=config.packing,
        eval_packing=False,
        dataset_kwargs={"skip_prepare_dataset": not config.packing},
    )
    model = model_to_train(config.model, template, process.is_main_process)
    trainer = AnswerLossTrainer(
        model=model,
        args=trl_config,
        train_dataset=examples_dataset(prepared.train),
        eval_dataset={language: examples_dataset(examples) for language, examples in prepared.validation.items()} or None,
        processing_class=template.tokenizer,
        peft_config=lora(config.lora, model),
    )
    merge = config.lora is None or config.lora.merge
    dtype = saved_dtype(config.model)
    return run_training(trainer, config.save, stage.checkpoint, template.tokenizer, settings, stage.facts, merge, dtype)


def examples_dataset(examples: list[Example]) -> Dataset:
    """With the names that TRL knows."""
    return Dataset.from_dict(
        {"input_ids": [example.input_ids for example in examples], "labels": [example.labels for example in examples]}
    )
