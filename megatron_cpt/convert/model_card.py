"""The README.md that makes a HF folder ready for upload: what the model is, and what the run was that made it."""

from __future__ import annotations

import contextlib
import os
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import yaml

from megatron_cpt.checkpoint.layout import RELEASE, read_manifest
from megatron_cpt.utils.errors import InputError


def model_card(name: str, manifest: Mapping[str, Any]) -> str:
    """Markdown with the front matter that the Hugging Face hub reads.

    Args:
        name: of the model
        manifest: manifest.json of a checkpoint that a run saved

    Raises:
        InputError: it is not one of a run
    """
    if manifest.get("kind") != "pretrain":
        raise InputError(f"upload_ready is true but {name} comes from no run: its checkpoint holds converted weights")
    front: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    front |= {"base_model": base_model(manifest), "language": card_languages(manifest), "tags": ["continual-pre-training"]}
    front = {field: value for field, value in front.items() if value}  # checkpoints of earlier versions name no languages
    lines = ["---", yaml.safe_dump(front, sort_keys=False).rstrip(), "---", "", f"# {name}", ""]
    lines += [
        "Continued pre-training on a mixture of general and additional-language text. "
        "To be completed by hand: licence, evaluation, intended use; base_model is to be the hub's name of it.",
        "",
        *card_table(("", ""), card_facts(manifest)),
        "",
        "## Data",
        "",
        *card_table(("corpus", "group", "tokens read", "share"), corpora(manifest)),
        "",
        "`manifest.json` has the SHA-256 of each corpus's token file, the whole schedule of the mixture, and the settings.",
    ]
    return "\n".join(lines) + "\n"


def card_languages(manifest: Mapping[str, Any]) -> list[str]:
    """Of the corpora that were read, the most read first."""
    of_corpus, read = manifest.get("languages", {}), Counter[str]()
    for use in manifest["data"]["consumed"]:
        if use["samples"] and use["name"] in of_corpus:
            read[of_corpus[use["name"]]] += use["samples"]
    return [language for language, _ in read.most_common()]


def base_model(manifest: Mapping[str, Any]) -> str:
    """The model that was trained further: by the hub's name, where its folder is one of the hub's cache, or its folder's."""
    load = str(manifest["config"]["checkpoint"]["load"])
    for folder in (os.path.join(load, RELEASE), load):
        with contextlib.suppress(InputError, OSError):  # it may be gone
            load = str(read_manifest(os.path.join(folder, "manifest.json")).get("source", load))
            break
    in_cache = re.search(r"models--([^/]+?)--([^/]+)", load)
    return f"{in_cache[1]}/{in_cache[2]}" if in_cache else os.path.basename(os.path.normpath(load))


def card_facts(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The run in some lines."""
    config, rate = manifest["config"], manifest["training"]["lr_schedule"]
    batch, length = config["training"]["global_batch_size"], seq_length(manifest)
    read, warmup = tokens_of_groups(manifest), f"{rate['warmup'] // batch:,}"
    almr = read.get("additional", 0) / max(sum(read.values()), 1)
    return [
        ("weights it began with", os.path.basename(os.path.normpath(config["checkpoint"]["load"]))),
        ("steps", f"{manifest['iteration']:,}"),
        ("tokens", f"{manifest['consumed_samples'] * length:,}"),
        ("additional-language mixture ratio (ALMR)", f"{almr:.4f}"),
        ("learning rate", f"{rate['lr']:g} to {rate['min_lr']:g}, {rate['decay_style']}, {warmup} warm-up steps"),
        ("batch", f"{batch:,} samples of {length:,} tokens"),
        ("weight decay, clipping", f"{config['optimizer']['weight_decay']:g}, {config['optimizer']['clip_grad']:g}"),
        ("precision", config["training"]["params_dtype"]),
        ("software", ", ".join(f"{name} {version}" for name, version in manifest["versions"].items())),
    ]


def seq_length(manifest: Mapping[str, Any]) -> int:
    """Tokens of a sample."""
    return int(manifest["data"]["segments"][-1]["mixture"]["seq_length"])


def tokens_of_groups(manifest: Mapping[str, Any]) -> dict[str, int]:
    """{"general": tokens, "additional": tokens}"""
    read: dict[str, int] = {}
    for use in manifest["data"]["consumed"]:
        read[use["group"]] = read.get(use["group"], 0) + use["samples"] * seq_length(manifest)
    return read


def corpora(manifest: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """What was read of each corpus."""
    length, total = seq_length(manifest), max(sum(tokens_of_groups(manifest).values()), 1)
    return [
        (use["name"], use["group"], f"{use['samples'] * length:,}", f"{use['samples'] * length / total:.2%}")
        for use in manifest["data"]["consumed"]
    ]


def card_table(header: tuple[str, ...], rows: list[Any]) -> list[str]:
    """A Markdown table."""
    lines = [header, tuple("---" for _ in header), *rows]
    return ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines]
