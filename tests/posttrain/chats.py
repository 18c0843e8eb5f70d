"""Conversations and pairs about nothing, and configurations that train on them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from megatron_cpt.posttrain.data import SourceConfig
from megatron_cpt.posttrain.dpo import DpoConfig
from megatron_cpt.posttrain.settings import OptimizerSettings, RunSettings, TrainingSettings, TuningDataConfig
from megatron_cpt.posttrain.sft import SftConfig

ANIMALS = {"en": ("dog", "fox", "cat"), "zh": ("狗", "狐狸", "猫")}


def conversations(language: str, number: int = 24) -> list[dict[str, Any]]:
    """Of one or two turns, of several lengths."""
    names = ANIMALS[language]
    rows = []
    for i in range(number):
        turns = []
        for j in range(1 + i % 2):
            turns += [{"role": "user", "content": f"{names[i % 3]} {i} {j}?"}]
            turns += [{"role": "assistant", "content": " ".join([names[(i + 1) % 3]] * (1 + (i + j) % 5))}]
        rows.append({"messages": turns})
    return rows


def preferences(language: str, number: int = 24) -> list[dict[str, Any]]:
    """The additional language is better."""
    names = ANIMALS[language]
    return [
        {"instruction": f"{names[i % 3]} {i}?", "chosen": "狗" * (1 + i % 3), "rejected": "dog " * (1 + i % 2)}
        for i in range(number)
    ]


def write_rows(folder: Path, make: Any) -> list[SourceConfig]:
    """A file for each language."""
    sources = []
    for language, group in (("en", "general"), ("zh", "additional")):
        path = folder / f"{make.__name__}_{language}.json"
        path.write_text(json.dumps(make(language), ensure_ascii=False))
        sources.append(SourceConfig(str(path), language, group))  # type: ignore[arg-type]
    return sources


def sft_config(model: str, folder: Path, name: str = "sft", **changes: Any) -> SftConfig:
    """Six steps of two packs of 160 tokens."""
    data = TuningDataConfig(write_rows(folder, conversations), validation_share=0.1, max_length=160, chat_template="chatml")
    defaults: dict[str, Any] = {
        "training": TrainingSettings(max_steps=6, micro_batch_size=1, global_batch_size=2),
        "optimizer": OptimizerSettings(lr=3e-3, warmup_fraction=0.1),
        "run": RunSettings(save_interval=2),
    }
    return SftConfig(model=model, save=str(folder / name), data=data, **defaults | changes)


def dpo_config(model: str, folder: Path, name: str = "dpo", **changes: Any) -> DpoConfig:
    """Six steps of four pairs."""
    data = TuningDataConfig(write_rows(folder, preferences), validation_share=0.1, max_length=160, chat_template="chatml")
    defaults: dict[str, Any] = {
        "training": TrainingSettings(max_steps=6, micro_batch_size=2, global_batch_size=4),
        "optimizer": OptimizerSettings(lr=1e-3, warmup_fraction=0.1),
        "run": RunSettings(save_interval=2),
    }
    return DpoConfig(model=model, save=str(folder / name), data=data, **defaults | changes)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl of a run."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def write_config(config: SftConfig | DpoConfig, path: Path) -> str:
    """For the tools; returns the path."""
    path.write_text(yaml.safe_dump({name: value for name, value in asdict(config).items() if value is not None}))
    return str(path)
