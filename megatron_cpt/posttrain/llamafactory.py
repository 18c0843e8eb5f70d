"""The same stage in LLaMA-Factory: the data that would be trained on here, dataset_info.json and a YAML with settings."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import yaml

from megatron_cpt.checkpoint.folders import atomic_folder
from megatron_cpt.posttrain.conversations import Conversation, Message, Preference
from megatron_cpt.posttrain.data import Prepared
from megatron_cpt.posttrain.run_files import accumulation, check_export
from megatron_cpt.posttrain.settings import LoraSettings
from megatron_cpt.utils.errors import InputError
from megatron_cpt.utils.files import write_json, write_text

if TYPE_CHECKING:
    from megatron_cpt.posttrain.settings import DpoConfig, SftConfig

FROM = {"user": "human", "assistant": "gpt", "tool": "observation"}
SCHEDULES = {"constant": "constant_with_warmup"}  # by transformers' names, whose constant has no warm-up


def export(folder: str, config: SftConfig | DpoConfig, prepared: Prepared[Any], world_size: int) -> str:
    """Write the folder; returns the path of the YAML, to be run there with llamafactory-cli train.

    Raises:
        InputError: the chat template or the loss is none that both know, or the folder is not empty
    """
    check_export(config)
    if os.pardir in folder.split(os.sep):  # a/../b is b without a, too
        folder = os.path.realpath(folder)
    for item in [*prepared.train, *(item for items in prepared.validation.values() for item in items)]:
        check_messages(item.origin, item.row)
    stage = "dpo" if hasattr(config, "beta") else "sft"
    sets = {"train": prepared.train, "validation": [item for items in prepared.validation.values() for item in items]}
    with atomic_folder(folder) as temporary:
        info = {}
        for name, items in sets.items():
            if items:
                rows = [sharegpt_row(item.origin) for item in items]
                write_text(os.path.join(temporary, f"{name}.json"), json.dumps(rows, ensure_ascii=False, indent=1) + "\n")
                info[name] = dataset_info(f"{name}.json", stage)
        write_json(os.path.join(temporary, "dataset_info.json"), info)
        settings = llamafactory_settings(folder, config, stage, world_size, bool(sets["validation"]))
        settings["warmup_steps"] = warmup_steps(config, prepared)
        write_text(os.path.join(temporary, f"{stage}.yaml"), yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
    return os.path.join(folder, f"{stage}.yaml")


def check_messages(origin: Conversation | Preference, row: str) -> None:
    """Raise InputError, naming the row, where LLaMA-Factory would learn something else, as its rows are texts only."""
    if isinstance(origin, Preference):
        messages: tuple[Message, ...] = (*origin.prompt, origin.chosen, origin.rejected)
    else:
        messages = origin.messages
        if not all(message.learned for message in messages):
            raise InputError(
                f"{row}: an answer is not to be learned, which LLaMA-Factory's rows cannot say; leave such rows out"
            )
    for message in messages:
        if message.reasoning is not None:
            raise InputError(
                f"{row}: a message has {message.reasoning[0]}, for which LLaMA-Factory's rows have no field; leave it out"
            )


def dataset_info(file: str, stage: str) -> dict[str, Any]:
    """An entry of dataset_info.json."""
    columns = {"messages": "conversations", "system": "system"}
    if stage == "dpo":
        columns |= {"chosen": "chosen", "rejected": "rejected"}
    return {"file_name": file, "formatting": "sharegpt", "columns": columns} | ({"ranking": True} if stage == "dpo" else {})


def sharegpt_row(origin: Conversation | Preference) -> dict[str, Any]:
    """In ShareGPT's style."""
    if isinstance(origin, Preference):
        sides = {name: turn(getattr(origin, name)) for name in ("chosen", "rejected")}
        return turns(origin.prompt) | sides
    return turns(origin.messages)


def turns(messages: Sequence[Message]) -> dict[str, Any]:
    """The system prompt and the rest."""
    system = messages[0].content if messages[0].role == "system" else ""
    return {"system": system, "conversations": [turn(message) for message in messages if message.role != "system"]}


def turn(message: Message) -> dict[str, str]:
    """One message."""
    return {"from": FROM[message.role], "value": message.content}


def llamafactory_settings(
    folder: str, config: SftConfig | DpoConfig, stage: str, world_size: int, validation: bool
) -> dict[str, Any]:
    """By LLaMA-Factory's names."""
    training, optimizer, run = config.training, config.optimizer, config.run
    length: dict[str, Any] = {"num_train_epochs": training.epochs}
    if training.max_steps is not None:
        length = {"max_steps": training.max_steps}
    settings = {
        "model_name_or_path": config.model,
        "stage": stage,
        "do_train": True,
        **adapter_settings(config.lora),
        "dataset_dir": folder,
        "dataset": "train",
        "template": config.data.chat_template,
        "cutoff_len": config.data.max_length,
        "output_dir": config.save,
        **length,
        "per_device_train_batch_size": training.micro_batch_size,
        "gradient_accumulation_steps": accumulation(training, world_size),
        "learning_rate": optimizer.lr,
        "lr_scheduler_type": SCHEDULES.get(optimizer.decay_style, optimizer.decay_style),
        "weight_decay": optimizer.weight_decay,
        "max_grad_norm": optimizer.clip_grad,
        "adam_beta1": optimizer.adam_beta1,
        "adam_beta2": optimizer.adam_beta2,
        "adam_epsilon": optimizer.adam_eps,
        "bf16": training.params_dtype == "bf16",
        "disable_gradient_checkpointing": not training.gradient_checkpointing,
        "seed": training.seed,
        "logging_steps": run.log_interval,
        "save_strategy": "no" if run.save_interval is None else "steps",
    }
    if run.save_interval is not None:
        settings |= {"save_steps": run.save_interval, "save_total_limit": run.keep_last}
    if validation:
        settings |= {"eval_dataset": "validation", "per_device_eval_batch_size": training.micro_batch_size}
        settings |= {"eval_strategy": "steps", "eval_steps": run.eval_interval} if run.eval_interval else {"do_eval": True}
    if stage == "dpo":
        preference = {"pref_beta": "beta", "pref_loss": "loss_type", "dpo_label_smoothing": "label_smoothing"}
        return settings | {theirs: getattr(config, ours) for theirs, ours in preference.items()}
    packing = config.packing  # type: ignore[union-attr]
    return settings | {"packing": packing, "neat_packing": packing}  # neat: packed conversations do not see each other


def warmup_steps(config: SftConfig | DpoConfig, prepared: Prepared[Any]) -> int:
    """A number, as versions of transformers differ in how a share is given; packs are counted as if they were full."""
    training = config.training
    steps = training.max_steps
    if steps is None:
        examples = len(prepared.train)
        if getattr(config, "packing", False):
            examples = math.ceil(sum(counts.tokens for counts in prepared.counts) / config.data.max_length)
        steps = math.ceil(training.epochs * examples / training.global_batch_size)
    return math.ceil(config.optimizer.warmup_fraction * steps)


def adapter_settings(lora: LoraSettings | None) -> dict[str, Any]:
    """Full or LoRA."""
    if lora is None:
        return {"finetuning_type": "full"}
    target = "all" if lora.target_modules == "all-linear" else lora.target_modules
    return {
        "finetuning_type": "lora",
        "lora_rank": lora.r,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "lora_target": target if isinstance(target, str) else ",".join(target),
    }
