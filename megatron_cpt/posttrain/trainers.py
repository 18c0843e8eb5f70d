"""What SFT's and DPO's trainers do otherwise than transformers' and TRL's: the learning rate of every step, examples that
count once on any number of processes, counts of tokens that survive a resume."""

from __future__ import annotations

import errno
import math
import os
import shutil
from collections.abc import Iterator, Sized
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from transformers import Trainer

from megatron_cpt.posttrain.checkpoints import begin_saving, remove_older, seal
from megatron_cpt.training.schedule import remaining
from megatron_cpt.utils.errors import RunError

LEAST_FREE = 1 << 16  # bytes; a disk with less is full
FILLER_TOKENS = 2  # of an example that counts nothing: one to predict from, one to predict


class EpochSampler(torch.utils.data.Sampler[int]):
    """An order of all examples that depends on seed and epoch alone, then the fillers, which follow them in the data."""

    def __init__(self, examples: int, fillers: int, seed: int) -> None:
        self._examples, self._fillers, self._seed, self._epoch = examples, fillers, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate's loader before each pass."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._examples + self._fillers

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed + self._epoch)
        yield from torch.randperm(self._examples, generator=generator).tolist()
        yield from range(self._examples, len(self))


class StepTrainer(Trainer):
    """The part that SFT and DPO have in common.

    Attributes:
        fillers: examples at the end of `train_dataset` that count nothing, so that it divides by what all processes
            take at a time; without them accelerate would repeat the first examples
    """

    fillers = 0
    train_dataset: Any
    lr_scheduler: Any
    _metrics: dict[str, dict[str, list[float]]]  # TRL's, of the steps since the last line

    def fill_up(self, filler: dict[str, Any]) -> None:
        """Append fillers to the training data; one process needs none."""
        at_once = self.args.per_device_train_batch_size * self.args.world_size
        data: Dataset = self.train_dataset
        if self.args.world_size > 1 and len(data) % at_once:
            self.fillers = -len(data) % at_once
            rows = Dataset.from_list([filler] * self.fillers, features=data.features)
            self.train_dataset = concatenate_datasets([data, rows])

    def _get_train_sampler(self, train_dataset: Sized | None = None) -> torch.utils.data.Sampler[int]:
        examples = len(self.train_dataset if train_dataset is None else train_dataset)
        return EpochSampler(examples - self.fillers, self.fillers, self.args.seed)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The learning rate of each step, see `share_of_rate`."""
        if self.lr_scheduler is None:
            warmup = self.args.get_warmup_steps(num_training_steps)
            style = self.args.lr_scheduler_type.removesuffix("_with_warmup")
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                self.optimizer if optimizer is None else optimizer,
                lambda done: share_of_rate(style, done + 1, warmup, num_training_steps),
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Checkpoints get their manifest when all processes have written, and older ones are removed after that only."""
        keep, self.args.save_total_limit = self.args.save_total_limit, None
        step = int(self.state.global_step)
        if self.args.should_save:
            begin_saving(self.args.output_dir, f"checkpoint-{step}")
        try:
            super()._save_checkpoint(model, trial)
        except Exception as error:  # each library that writes has one of its own
            check_disk_room(self.args.output_dir, step, error)
            raise
        finally:
            self.args.save_total_limit = keep
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            seal(os.path.join(self.args.output_dir, f"checkpoint-{step}"), step)
            remove_older(self.args.output_dir, keep)

    def take_out(self, tokens: int) -> None:
        """Of TRL's count, the tokens of this process's fillers in a batch."""
        of_all = self.accelerator.reduce(torch.tensor(tokens, device=self.args.device), "sum")
        self._total_train_tokens -= int(of_all.item())
        self._metrics["train"]["num_tokens"] = [self._total_train_tokens]

    @property
    def _total_train_tokens(self) -> int:
        """TRL's count of the tokens that were trained on, kept where checkpoints keep it."""
        return int(self.state.num_input_tokens_seen)

    @_total_train_tokens.setter
    def _total_train_tokens(self, tokens: int) -> None:
        self.state.num_input_tokens_seen = tokens


def check_disk_room(folder: str, step: int, error: Exception) -> None:
    """Raise RunError if a checkpoint could not be saved because the disk is full.

    Args:
        folder: of the run
        step: of the checkpoint
        error: what the save ended with; torch and safetensors do not say why
    """
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or shutil.disk_usage(folder).free < LEAST_FREE:
        path = os.path.join(folder, f"checkpoint-{step}")
        raise RunError(f"{path} could not be saved: the disk is full; make room, the same command resumes") from error


def share_of_rate(style: str, step: int, warmup: int, steps: int) -> float:
    """The part of the full learning rate that a step has.

    As in pre-training the first of the warm-up's steps has 1 / warmup and the last all of it. The decay would reach 0 one
    step after the last, so that every step learns.

    Args:
        style: linear, cosine or constant
        step: from 1
        warmup: steps of it
        steps: of the run
    """
    if step < warmup:
        return step / warmup
    if style == "constant":
        return 1.0
    full = max(warmup, 1)  # the step with all of the rate
    return remaining(style, min((step - full) / max(steps + 1 - full, 1), 1.0))


def own_batches(examples: Dataset, args: Any, filler: dict[str, Any]) -> Iterator[list[dict[str, Any]]]:
    """This process's part of a set to evaluate on, the same number of batches of the same size for all processes."""
    size, world = args.per_device_eval_batch_size, args.world_size
    own = [examples[number] for number in range(args.process_index, len(examples), world)]
    number = math.ceil(len(examples) / world)
    own += [{name: filler[name] for name in examples.column_names}] * (number - len(own))
    for begin in range(0, number, size):
        yield own[begin : begin + size]
