"""Direct preference optimization (Rafailov et al., 2023): of two answers, the better one becomes likelier. TRL's trainer."""

from __future__ import annotations

import dataclasses
import math
import os
from collections import Counter
from typing import Any

import datasets
import torch
from accelerate import PartialState
from accelerate.utils import set_seed
from trl import DPOConfig as TrlConfig
from trl import DPOTrainer

from megatron_cpt.posttrain.data import prepare_dpo
from megatron_cpt.posttrain.models import load_trainable_model, lora, model_to_train, saved_dtype
from megatron_cpt.posttrain.report import show_report, write_report
from megatron_cpt.posttrain.runner import run_training
from megatron_cpt.posttrain.settings import DpoConfig
from megatron_cpt.posttrain.sharding import is_sharded, shard
from megatron_cpt.posttrain.stage import TuningStage, finetune
from megatron_cpt.posttrain.templates import PairExample
from megatron_cpt.posttrain.trainers import FILLER_TOKENS, StepTrainer, own_batches

# What a pair of two empty answers costs, whatever the model: fillers are such pairs, and have no gradient
LOSS_OF_FILLERS = {
    "sigmoid": lambda beta: math.log(2),
    "hinge": lambda beta: 1.0,
    "ipo": lambda beta: (1 / (2 * beta)) ** 2,
    "robust": lambda beta: math.log(2),
    "sppo_hard": lambda beta: 2 * (0.5 / beta) ** 2,
    "apo_zero": lambda beta: 1.0,
}
# TRL's figures that are means over the pairs of all processes, fillers among them, which are 0 in each of them
FIGURES_OF_PAIRS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)


class PairTrainer(StepTrainer, DPOTrainer):
    """Takes pairs that are tokens already. Losses and figures are means over the pairs of a step, or of a set: the same for
    every batch size and number of processes, also where they do not divide the pairs."""

    loss_is_scaled_for_ga = True  # compute_loss has divided by the pairs of the step

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._filler = filler_pair(self.train_dataset[0])
        self.fill_up(self._filler)
        self._sums: Counter[str] = Counter()  # since the last log
        self._loss_of_fillers = sum(
            weight * LOSS_OF_FILLERS[kind](self.beta)
            for kind, weight in zip(self.loss_types, self.loss_weights, strict=True)
        )

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> torch.Tensor:
        """Pairs of a step, over all processes."""
        own = torch.tensor(sum(pairs_in(inputs) for inputs in batch_samples), device=device)
        return self.accelerator.reduce(own, "sum")

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """This process's part of the mean over the pairs of a step; without `num_items_in_batch`, the mean of the batch."""
        rows, own = len(inputs["input_ids"]) // 2, pairs_in(inputs)
        mean = super().compute_loss(model, inputs)
        total = mean * rows - self._loss_of_fillers * (rows - own)
        self._add_figures(rows, own)
        if self.fillers and self.model.training:
            self.take_out(2 * FILLER_TOKENS * (rows - own))
        if num_items_in_batch is None:
            return total / max(own, 1)
        return total * self.args.world_size / num_items_in_batch  # gradients are averaged over the processes

    def _add_figures(self, rows: int, own: int) -> None:
        """Take TRL's figures of a batch over, by the number of its pairs."""
        mode = "train" if self.model.training else "eval"
        self._sums["pairs"] += int(self.accelerator.reduce(torch.tensor(own, device=self.args.device), "sum").item())
        for name in FIGURES_OF_PAIRS:
            self._sums[name] += self._metrics[mode][name].pop() * rows * self.args.world_size

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's, with the figures of pairs."""
        mode = "train" if self.model.training else "eval"
        for name in FIGURES_OF_PAIRS:
            self._metrics[mode].pop(name, None)
            if self._sums["pairs"]:
                self._metrics[mode][name] = [self._sums[name] / self._sums["pairs"]]
        self._sums.clear()
        super().log(logs, start_time)

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """{eval_LANGUAGE_loss, eval_LANGUAGE_rewards/margins, ...}"""
        sets = eval_dataset or self.eval_dataset or {}
        model, kept = self.model_wrapped, self._sums
        was_training = model.training
        model.eval()
        metrics: dict[str, float] = {}
        for name, examples in sets.items():
            self._sums, total = Counter(), torch.zeros((), dtype=torch.float64, device=self.args.device)
            for batch in own_batches(examples, self.args, self._filler):
                inputs = self._prepare_inputs(self.data_collator(batch))
                with self.compute_loss_context_manager():
                    total += self.compute_loss(model, inputs).double() * pairs_in(inputs)
            figures = {figure: value / len(examples) for figure, value in self._sums.items() if figure != "pairs"}
            figures |= {figure: sum(values) / len(values) for figure, values in self._metrics["eval"].items() if values}
            figures |= {"loss": self.accelerator.reduce(total, "sum").item() / len(examples), "pairs": len(examples)}
            metrics |= {f"{metric_key_prefix}_{name}_{figure}": value for figure, value in figures.items()}
            self._metrics["eval"].clear()
        self._sums = Counter()
        self.log(metrics)
        self._sums = kept
        model.train(was_training)
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def filler_pair(pair: dict[str, Any]) -> dict[str, Any]:
    """A pair like this one with two empty answers."""
    references = {name: 0.0 for name in ("ref_chosen_logps", "ref_rejected_logps") if name in pair}
    return {"prompt_ids": pair["prompt_ids"][:FILLER_TOKENS], "chosen_ids": [], "rejected_ids": []} | references


def pairs_in(inputs: dict[str, torch.Tensor]) -> int:
    """Number of pairs in a batch whose answers are not empty."""
    answered = inputs["completion_mask"].any(dim=1)
    return int(answered[: len(answered) // 2].sum())


def finetune_dpo(config: DpoConfig) -> str:
    """Run it; returns the folder of the result."""
    return finetune(config, prepare_dpo, train_dpo)


def train_dpo(stage: TuningStage[DpoConfig, PairExample]) -> str:
    """Train on what was prepared; returns the folder of the result."""
    config, template, prepared = stage.config, stage.template, stage.prepared
    process, settings = PartialState(), dataclasses.asdict(config)
    folder = os.path.join(config.save, "data")
    if process.is_main_process:
        write_report(config.save, prepared)
        show_report(prepared)
        pairs_dataset(prepared.train).save_to_disk(os.path.join(folder, "train"))
        for language, pairs in prepared.validation.items():
            pairs_dataset(pairs).save_to_disk(os.path.join(folder, f"validation_{language}"))
    process.wait_for_everyone()
    # From files: the reference's probabilities are kept beside them, where all processes find them
    validation = {
        language: datasets.load_from_disk(os.path.join(folder, f"validation_{language}")) for language in prepared.validation
    }
    torch.set_float32_matmul_precision(config.training.float32_matmul_precision)
    # TRL would put the reference whole on every GPU to compute these; a sharded one beside the model takes little
    precompute = config.lora is None and not is_sharded()
    trl_config = TrlConfig(  # before the model: it says whether DeepSpeed is to partition it as it is read
        **stage.arguments,
        max_length=None,
        beta=config.beta,
        **loss_of(config),
        disable_dropout=config.lora is None or config.lora.dropout == 0,  # or TRL would switch off that of the adapters
        precompute_ref_log_probs=precompute,
        precompute_ref_batch_size=config.training.micro_batch_size,
    )
    model = model_to_train(config.model, template, process.is_main_process)
    needs_reference = config.lora is None and not precompute
    set_seed(config.training.seed)  # of adapters' first values
    trainer = PairTrainer(
        model=model,
        ref_model=shard(load_trainable_model(config.model), trl_config.mixed_precision) if needs_reference else None,
        args=trl_config,
        train_dataset=datasets.load_from_disk(os.path.join(folder, "train")),
        eval_dataset=validation or None,
        processing_class=template.tokenizer,
        peft_config=lora(config.lora, model),
    )
    merge = config.lora is None or config.lora.merge
    dtype = saved_dtype(config.model)
    return run_training(trainer, config.save, stage.checkpoint, template.tokenizer, settings, stage.facts, merge, dtype)


def loss_of(config: DpoConfig) -> dict[str, Any]:
    """The loss in TRL's words.

    With e = label_smoothing, A = -log sigmoid(beta d) and B = -log sigmoid(-beta d), cDPO is (1 - e) A + e B, which TRL does
    not have. It has robust DPO, R = ((1 - e) A - e B) / (1 - 2 e), so that cDPO is 2 (1 - e) A - (1 - 2 e) R.
    """
    smoothing = config.label_smoothing
    loss: dict[str, Any] = {"loss_type": [config.loss_type], "label_smoothing": smoothing}
    if smoothing and config.loss_type == "sigmoid":
        loss |= {"loss_type": ["sigmoid", "robust"], "loss_weights": [2 * (1 - smoothing), -(1 - 2 * smoothing)]}
    return loss


def pairs_dataset(pairs: list[PairExample]) -> datasets.Dataset:
    """With the names that TRL knows."""
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return datasets.Dataset.from_dict({name: [getattr(pair, name) for pair in pairs] for name in names})
