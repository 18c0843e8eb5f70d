"""Every tool names all mistakes of a start at once: of settings, of files, and of settings that do not go together.

Each case has a configuration file and options with mistakes that do not depend on each other, and as many lines: what the
line of each begins with (after the file's name), or words in it. Nothing of torch is imported, and nothing is left on disk.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from llama_shapes import TINY
from tiny_models import ROOT, tools

from megatron_cpt.corpus.preprocess import PreprocessConfig, preprocess

ROW = {"instruction": "2 + 2?", "output": "4"}


@pytest.fixture(scope="module")
def good_files(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: str) -> Path:
    """A folder with corpora en and zh, rows, a tokenizer, a model without weights and a Megatron checkpoint of it."""
    folder = tmp_path_factory.mktemp("at_once")
    for language, text in (("en", "The quick brown fox {}."), ("zh", "第{}天，今天天气很好。")):
        lines = [json.dumps({"text": text.format(i)}) for i in range(20)]
        (folder / f"{language}.jsonl").write_text("\n".join(lines) + "\n")
        source, prefix = str(folder / f"{language}.jsonl"), str(folder / language)
        preprocess(PreprocessConfig(source, tiny_tokenizer_dir, prefix, language, workers=1))
    (folder / "rows.json").write_text(json.dumps([ROW]))
    (folder / "not.json").write_text("{")
    (folder / "file").write_text("no folder")
    mixture = {"seq_length": 32, "seed": 1, "almr": 0.25, "general": [{"prefix": "en"}], "additional": [{"prefix": "zh"}]}
    (folder / "mixture.yaml").write_text(yaml.safe_dump(mixture))
    wrong = mixture | {"seq_length": 0, "almr": 3, "general": [{"prefix": "lost"}]}
    (folder / "wrong_mixture.yaml").write_text(yaml.safe_dump(wrong))
    shutil.copytree(tiny_tokenizer_dir, folder / "tokenizer")
    shutil.copytree(tiny_tokenizer_dir, folder / "model")
    (folder / "model" / "config.json").write_text(json.dumps(TINY))
    shutil.copytree(folder / "model", folder / "damaged")
    for name in ("config.json", "tokenizer.json"):
        (folder / "damaged" / name).write_text("{")
    release = folder / "megatron" / "release"
    shutil.copytree(folder / "model", release / "hf")
    for name in (".metadata", "common.pt"):
        (release / name).write_bytes(b"")
    (release / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    shutil.copytree(folder / "megatron", folder / "other")
    (folder / "other" / "release" / "hf" / "tokenizer.json").write_text("{")
    (folder / "long.yaml").write_text(yaml.safe_dump(mixture | {"seq_length": 512}))
    (folder / "base.yaml").write_text(yaml.safe_dump({"mixture": "mixture.yaml", "checkpoint": {"load": "megatron"}}))
    bad_base = {"mixture": "nowhere.yaml", "checkpoint": {"load": "lost"}, "optimizer": {"lr": -1}}
    (folder / "bad_base.yaml").write_text(yaml.safe_dump(bad_base))
    return folder


class Case(NamedTuple):
    """A start with mistakes: the tool (with its command), what run.yaml says, further options, and what the lines say."""

    tool: str
    fields: dict[str, Any]
    options: list[str]
    said: list[str]


TRAINING = {"train_iters": 4, "global_batch_size": 8}
SOURCE = {"path": "rows.json", "language": "en"}
TUNING = {
    "model": "nowhere",
    "save": "file/run",
    "data": {
        "sources": [
            {"path": None, "language": "en"},
            {"path": "lost.json", "language": "xx"},
            {"path": "not.json", "language": "en", "max_rows": 0},
            SOURCE,
        ],
        "validation": [SOURCE],
        "validation_share": 7,
        "chat_template": "nofile",
        "almr": "much",
    },
    "training": {"epochs": 0, "micro_batch_size": "x", "seed": -1},
    "lora": {"r": [], "dropout": 1},
    "optimiser": {},
}
TUNED = [
    "data.sources[0].path is null; expected text",
    "data.sources[1].language is 'xx'",
    "data.sources[1].path is lost.json; expected a file (no such file)",
    "data.sources[2].max_rows is 0",
    "not.json is not JSON",
    "data.sources and data.validation have rows in common: rows.json",
    "data.validation_share is 7.0",
    "data.almr is 'much'",
    "chat_template is nofile",
    "training.epochs is 0.0",
    "training.micro_batch_size is 'x'",
    "training.seed is -1",
    "lora.r is []",
    "lora.dropout is 1.0",
    "optimiser is unknown",
    "model is nowhere",
    "save is file/run",
]
STUDY: dict[str, Any] = {
    "base": "bad_base.yaml",
    "folder": "file/study",
    "almr": [0.2, 3],
    "lr": {"min": 1e-3, "max": "big", "number": 1},
    "train_tokens": "long",
    "seeds": [1, 1],
    "limits": {"runs": -1},
    "executor": "cloud",
}
STUDIED = [
    "folder is file/study",
    "almr is 3.0",
    "lr.max is 'big'",
    "lr.number is 1",
    "train_tokens is 'long'",
    "seeds is [1, 1]",
    "limits.runs is -1",
    "executor is 'cloud'",
    "bad_base.yaml: optimizer.lr is -1.0",
    "mixture file nowhere.yaml: No such file",
]
CASES = {
    "settings of a run": Case(
        "pretrain_cpt.py",
        {
            "mixture": "wrong_mixture.yaml",
            "checkpoint": {"load": "lost", "save": "file/run", "save_interval": "often", "keep_every": 2},
            "training": TRAINING | {"train_iters": "many", "seed": -1, "train_samples": 1, "train_tokens": 5},
            "optimizer": {"lr": "fast", "min_lr": -1, "adam_beta1": 1},
            "lr": {"warmup_iters": 1, "warmup_tokens": 1, "decay_style": "sudden"},
            "parallel": {"tensor_model_parallel_size": None, "recompute_method": "block", "overlap_param_gather": True},
            "logging": {"log_interval": "x", "profile_step_end": 3},
            "world": 3,
        },
        ["--loss_spikes.spike_window", "1", "--data.prefetch=none", "--no_such"],
        [
            "wrong_mixture.yaml: seq_length is 0",
            "wrong_mixture.yaml: almr is 3",
            "lost.json: no such file",
            "checkpoint.load is 'lost'",
            "checkpoint.save is file/run",
            "checkpoint.save_interval is 'often'",
            "checkpoint.keep_every is given without keep_last",
            "training.train_iters is 'many'",
            "training.seed is -1",
            "training.train_samples and training.train_tokens are both given",
            "optimizer.lr is 'fast'",
            "optimizer.min_lr is -1.0",
            "optimizer.adam_beta1 is 1.0",
            "lr.warmup_iters and lr.warmup_tokens are both given",
            "lr.decay_style is 'sudden'",
            "parallel.tensor_model_parallel_size is null",
            "parallel.recompute_method is block with recompute_granularity None",
            "parallel.overlap_param_gather is true without overlap_grad_reduce",
            "logging.log_interval is 'x'",
            "logging.profile_step_end is 3",
            "world is unknown",
            "loss_spikes.spike_window is 1",
            "data.prefetch is 'none'",
            "--no_such is unknown",
        ],
    ),
    "layout of a run": Case(
        "pretrain_cpt.py",
        {
            "mixture": "mixture.yaml",
            "checkpoint": {"load": "megatron", "save": "run", "save_interval": "often"},
            "training": TRAINING | {"global_batch_size": 7, "micro_batch_size": 2},
            "parallel": {"pipeline_model_parallel_size": 3, "recompute_granularity": "most"},
            "check_only": True,
            "world_size": 3,
        },
        [],
        [
            "pipeline_model_parallel_size is 3; expected 1, 2 or 4",
            "training.global_batch_size is 7",
            "checkpoint.save_interval is 'often'",
            "parallel.recompute_granularity is 'most'",
        ],
    ),
    "layout and length of a run": Case(
        "pretrain_cpt.py",
        {
            "mixture": "long.yaml",
            "checkpoint": {"load": "megatron", "save": "run"},
            "training": TRAINING | {"params_dtype": "fp16"},
            "parallel": {"tensor_model_parallel_size": 4, "pipeline_model_parallel_size": 3},
            "lr": {"warmup_iters": 9},
            "logging": {"profile_step_start": 5},
            "check_only": True,
            "world_size": 12,
        },
        [],
        [
            "en.bin has only",
            "zh.bin has only",
            "tensor_model_parallel_size is 4; expected 1 or 2",
            "pipeline_model_parallel_size is 3; expected 1, 2 or 4",
            "seq_length is 512; expected at most 256",
            "training.params_dtype is 'fp16'",
            "lr.warmup_iters leaves nothing to decay in",
            "logging.profile_step_start is 5 but the run ends with step 4",
        ],
    ),
    "a run with another tokenizer": Case(
        "pretrain_cpt.py",
        {
            "mixture": "mixture.yaml",
            "checkpoint": {"load": "other", "save": "run"},
            "training": TRAINING,
            "parallel": {"context_parallel_size": 3, "num_layers_in_first_pipeline_stage": 3},
            "data": {"reset_attention_mask": True},
            "check_only": True,
            "world_size": 3,
        },
        [],
        [
            "tokenizer.json: not valid JSON",
            "seq_length is 32; expected a multiple of 2 x context_parallel_size 3",
            "parallel.num_layers_in_first_pipeline_stage is 3 with pipeline_model_parallel_size 1",
            "data.reset_attention_mask is true with context_parallel_size above 1",
        ],
    ),
    "a run without a length, which no schedule fits into": Case(
        "pretrain_cpt.py",
        {
            "mixture": "mixture.yaml",
            "checkpoint": {"load": "megatron", "save": "run", "save_interval": "often"},
            "training": {"global_batch_size": 8},
            "lr": {"warmup_iters": 4},
        },
        [],
        ["the length of the run is not given", "checkpoint.save_interval is 'often'"],
    ),
    "files of a run": Case(
        "pretrain_cpt.py",
        {"mixture": "mixture.yaml", "checkpoint": {"load": "lost", "save": "file/run"}, "training": TRAINING},
        ["--mixture", "nowhere.yaml"],
        ["mixture file nowhere.yaml: No such file", "checkpoint.load is 'lost'", "checkpoint.save is file/run"],
    ),
    "SFT": Case("finetune_sft.py", TUNING | {"packing": "maybe"}, [], [*TUNED, "packing is 'maybe'"]),
    "DPO": Case(
        "finetune_dpo.py",
        TUNING | {"beta": 0, "loss_type": "best", "label_smoothing": 1},
        [],
        [*TUNED, "beta is 0.0", "loss_type is 'best'", "label_smoothing is 1.0"],
    ),
    "chat": Case(
        "chat.py",
        {"model": "nowhere", "chat_template": "nofile", "top_p": 2, "seed": "x", "temperature": -1, "sytem": "x"},
        [],
        [
            "model is nowhere",
            "chat_template is nofile",
            "top_p is 2.0",
            "seed is 'x'",
            "temperature is -1.0",
            "sytem is unknown",
        ],
    ),
    "chat with a model that has no chat template, and few positions": Case(
        "chat.py",
        {"model": "model", "max_new_tokens": 10_000, "temperature": -1},
        [],
        [
            "tokenizer model has no chat template",
            "model holds no .safetensors file",
            "max_new_tokens is 10000; expected less than 256",
            "temperature is -1.0",
        ],
    ),
    "a template whose tokens the model lacks, and an export of SFT": Case(
        "finetune_sft.py",
        {
            "model": "model",
            "save": "run",
            "data": {"sources": [SOURCE], "chat_template": "chatml", "max_length": 10**9},
            "export_to": "tokenizer",
        },
        [],
        [
            "data.chat_template is chatml, but the tokenizer model has no token <|im_start|>",
            "model holds no .safetensors file",
            "data.max_length is 1000000000; expected 8 to 1,048,576",
            "export_to is tokenizer, which is not empty",
        ],
    ),
    "an export of DPO": Case(
        "finetune_dpo.py",
        {
            "model": "model",
            "save": "run",
            "data": {"sources": [SOURCE], "chat_template": "not.json"},
            "loss_type": "apo_zero",
            "export_to": "",
        },
        [],
        [
            "data.chat_template is not.json; LLaMA-Factory has templates of its own",
            "model holds no .safetensors file",
            "loss_type is apo_zero, which LLaMA-Factory does not have",
            "export_to is ''; expected a name for a new folder (it is empty)",
        ],
    ),
    "batch and groups of SFT": Case(
        "finetune_sft.py",
        {
            "model": "damaged",
            "save": "run",
            "data": {"sources": [SOURCE], "almr": 0.5},
            "training": {"global_batch_size": 6, "micro_batch_size": 4, "seed": -1},
        },
        [],
        [
            "damaged/config.json is not JSON",
            "damaged/tokenizer.json is not JSON",
            "damaged holds no .safetensors file",
            "tokenizer damaged has no chat template",
            "data.almr is 0.5, but no source has the group additional",
            "training.global_batch_size is 6; expected a multiple of micro_batch_size 4",
            "training.seed is -1",
        ],
    ),
    "evaluation": Case(
        "evaluate.py",
        {
            "output": "file/out",
            "models": {"a/b": "nowhere", "c": [1], "few": "model"},
            "text": [{"path": [], "language": "xx"}, {"path": "lost.jsonl", "language": "en", "max_documents": 0}],
            "prompts": [{"path": "not.json", "language": "en"}],
            "pairwise": {
                "judge": {"url": "u", "votes": "lost", "model": "m", "parallel": "x", "timeout": 0},
                "pairs": [["c"]],
            },
            "ablation": [{"model": "d", "cpt": "perhaps", "additional_data": True}],
            "trajectory": {"run": "lost", "every": 0, "checkpoints": [{"iteration": -1, "model": "lost"}]},
            "tasks_folder": "lost",
            "limit": "few",
            "max_new_tokens": 300,
            "max_length": 1,
            "chat_template": "nofile",
        },
        [],
        [
            "output is file/out",
            "models has the name 'a/b'",
            "models.a/b is nowhere",
            "models.c is [1]",
            "max_new_tokens is 300; expected less than 256, the positions of model",
            "model holds no .safetensors file",
            "text[0].path is []",
            "text[0].language is 'xx'",
            "text[1].path is lost.jsonl",
            "text[1].max_documents is 0",
            "not.json is not JSON",
            "pairwise.judge has url u and votes lost",
            "pairwise.judge.votes is lost",
            "pairwise.prompts is empty",
            "pairwise.judge.parallel is 'x'",
            "pairwise.judge.timeout is 0.0",
            "pairwise.pairs has ['c']",
            "ablation has the model 'd'",
            "ablation[0].cpt is 'perhaps'",
            "trajectory.run is lost",
            "trajectory.every is 0",
            "trajectory.checkpoints[0].iteration is -1",
            "trajectory.checkpoints[0].model is lost",
            "tasks_folder is lost",
            "limit is 'few'",
            "max_length is 1",
            "chat_template is nofile",
        ],
    ),
    "preprocessing": Case(
        "preprocess_data.py",
        {"input": ["lost", "en.jsonl", "also_lost"], "tokenizer": "nowhere", "output_prefix": "file/zh", "language": "xx"},
        ["--workers", "0", "--holdout", "some", "--partition", "3", "--bos", "maybe", "--eos_tokn", "x"],
        [
            "input lost",
            "input also_lost",
            "tokenizer nowhere",
            "output_prefix is file/zh",
            "language is 'xx'",
            "workers is 0",
            "holdout is 'some'",
            "partition is '3'",
            "bos is 'maybe'",
            "eos_tokn is unknown",
        ],
    ),
    "files of preprocessing": Case(
        "preprocess_data.py",
        {"input": "lost", "tokenizer": "not.json", "output_prefix": "zh", "language": "zh"},
        [],
        ["input lost", "not.json", "output_prefix zh: found zh.bin, zh.idx, zh.json"],
    ),
    "a refused output of preprocessing": Case(
        "preprocess_data.py",
        {"input": ["lost", "en.jsonl"], "tokenizer": "tokenizer", "output_prefix": [], "language": "zh"},
        [],
        ["input lost", "output_prefix is []"],
    ),
    "curation": Case(
        "curate_data.py",
        {
            "input": ["lost", "en.jsonl"],
            "output_folder": "model",
            "keep_languages": ["en", "qq"],
            "filters": ["none_such", "c4_quality"],
            "filter_arguments": {"en": {"c4_quality": {"no_such": 1}}, "fr": {}},
            "language_threshold": 2,
            "language_model": "lost.bin",
            "workers": "x",
            "dry_run": True,
            "slurm": {"cpus_per_task": "y"},
        },
        ["--tasks", "0"],
        [
            "input lost",
            "model: found config.json, which no curation wrote",
            "keep_languages: found 'qq'",
            "filters is none_such",
            "filter_arguments: c4_quality has no 'no_such'",
            "filter_arguments: found 'fr'",
            "language_threshold is 2.0",
            "language_identifier is cld2 with a language_model",
            "language_model is lost.bin",
            "workers is 'x'",
            "dry_run is true with executor local",
            "slurm.cpus_per_task is 'y'",
            "tasks is 0",
        ],
    ),
    "curation of what is given as text": Case(
        "curate_data.py",
        {"input": "en.jsonl", "output_folder": "curated", "keep_languages": "qq", "keep_fields": "url", "workers": "x"},
        [],
        ["keep_languages: found 'qq'", "workers is 'x'"],
    ),
    "merging": Case(
        "merge_datasets.py",
        {"input": ["en", "lost", "also_lost"], "output_prefix": "file/all", "shuffle_documents": -1, "overwrite": "maybe"},
        [],
        ["input lost", "input also_lost", "output_prefix is file/all", "shuffle_documents is -1", "overwrite is 'maybe'"],
    ),
    "import of a corpus": Case(
        "import_corpus.py",
        {"input": ["lost", "en"], "tokenizer": "nowhere", "language": "xx", "eos_token": []},
        [],
        ["input lost", "en.json: there is a manifest already", "language is 'xx'", "eos_token is []", "tokenizer nowhere"],
    ),
    "files of an import": Case(
        "import_corpus.py",
        {"input": ["lost", "en"], "tokenizer": "nowhere", "language": "xx"},
        [],
        ["input lost", "en.json: there is a manifest already", "language is 'xx'", "tokenizer nowhere"],
    ),
    "a refused token of an import": Case(
        "import_corpus.py",
        {"input": "en", "tokenizer": "tokenizer", "language": "en", "eos_token": [], "overwrite": True},
        [],
        ["eos_token is []"],
    ),
    "no tokenizer of an import": Case(
        "import_corpus.py", {"input": "en", "language": "en", "overwrite": True}, [], ["tokenizer is missing"]
    ),
    "inspection": Case(
        "inspect_data.py",
        {"input": ["lost", "also_lost"], "tokenizer": "nowhere", "samples": -1, "overlap": True, "check": "x"},
        ["--global_batch_size", "0"],
        [
            "input lost",
            "input also_lost",
            "tokenizer nowhere",
            "samples is -1",
            "samples, at and overlap are for a mixture",
            "check is 'x'",
            "global_batch_size is 0",
        ],
    ),
    "inspection of a mixture": Case(
        "inspect_data.py",
        {"input": "wrong_mixture.yaml", "samples": "x", "tokenizer": "nowhere", "document": 3},
        [],
        [
            "wrong_mixture.yaml: seq_length is 0",
            "wrong_mixture.yaml: almr is 3",
            "lost.json: no such file",
            "samples is 'x'",
            "tokenizer nowhere",
            "check and document are for corpora",
        ],
    ),
    "an export of an order": Case(
        "export_order.py",
        {
            "mixture": "mixture.yaml",
            "global_batch_size": 2,
            "train_iters": 3,
            "order": "any",
            "find": ["zh:20", "fr:1", "rows.json:3"],
            "output": "file/order.npy",
            "device": "gpu",
            "num_workers": 0,
        },
        [],
        [
            "order is 'any'",
            "find is zh:20; expected a document from 0 to 19",
            "find is fr:1, which names no corpus and no file of the mixture; expected one of en, zh",
            "find is rows.json:3, which names no corpus and no file",
            "output is file/order.npy",
            "device is 'gpu'",
            "num_workers is 0",
        ],
    ),
    "steps of an order": Case(
        "export_order.py",
        {"mixture": "mixture.yaml", "global_batch_size": 2, "train_iters": 3, "first_step": 4, "find": "zh"},
        ["--output", "order.txt"],
        [
            "first_step is 4 and last_step 3; expected steps from 1 to 3",
            "find is zh; expected CORPUS:DOCUMENT or FILE:LINE",
            "output is order.txt; expected NAME.parquet or NAME.npy",
        ],
    ),
    "an order of nothing": Case(
        "export_order.py",
        {"run": "megatron"},
        ["--last_step", "0"],
        [
            "run is megatron; expected a run's folder",
            "output is missing; expected NAME.parquet or NAME.npy, or find",
            "last_step is 0",
        ],
    ),
    "an order without a run": Case(
        "export_order.py",
        {"mixture": "wrong_mixture.yaml", "find": "en:1"},
        [],
        [
            "wrong_mixture.yaml: seq_length is 0",
            "wrong_mixture.yaml: almr is 3",
            "lost.json: no such file",
            "global_batch_size is missing; expected one, or run",
            "train_iters is missing; expected one, or run",
        ],
    ),
    "to Megatron": Case(
        "convert_checkpoint.py hf-to-megatron",
        {
            "hf": "model",
            "megatron": "file/megatron",
            "dtype": "int8",
            "extend_tokenizer": "nowhere",
            "added_tokens": "lost",
            "num_workers": 0,
            "seed": -1,
            "overwrite": "x",
        },
        [],
        [
            "model holds no .safetensors file",
            "file is not a folder",
            "dtype is 'int8'",
            "tokenizer nowhere",
            "added_tokens lost",
            "extend_tokenizer and added_tokens are both given",
            "num_workers is 0",
            "seed is -1",
            "overwrite is 'x'",
        ],
    ),
    "to Hugging Face": Case(
        "convert_checkpoint.py megatron-to-hf",
        {"megatron": "megatron", "hf": "tokenizer", "tokenizer": "nowhere", "max_shard_size": "much", "vocab_size": 0},
        ["--num_workers=x", "--dtype", "float99"],
        [
            "megatron/release has its configuration and tokenizer",
            "tokenizer is not empty and was not written by this tool",
            "max_shard_size is much",
            "vocab_size is 0",
            "num_workers is 'x'",
            "dtype is 'float99'",
        ],
    ),
    "comparison": Case(
        "convert_checkpoint.py verify",
        {"a": "nowhere", "b": "model", "text": "lost", "max_tokens": 1, "tolerance": "x", "tensors": False},
        ["--logits_dtype", "int8"],
        [
            "checkpoint nowhere: no such folder",
            "model holds no .safetensors file",
            "text is lost",
            "max_tokens is 1",
            "tolerance is 'x'",
            "tensors is false with logits false",
            "logits_dtype is 'int8'",
        ],
    ),
    "a plan": Case(
        "plan_run.py",
        {
            "model": "9B",
            "devices": "x",
            "device": "h1",
            "run": "bad_base.yaml",
            "measured": "not.json",
            "json": "file/plan.json",
            "seq_length": 0,
            "fp8": True,
            "params_dtype": "fp32",
            "recompute_modules": ["mlp"],
            "matmul_efficiency": 2,
        },
        [],
        [
            "model is '9B'",
            "devices is 'x'",
            "device is 'h1'",
            "bad_base.yaml: optimizer.lr is -1.0",
            "bad_base.yaml: checkpoint.save is missing",
            "bad_base.yaml: the length of the run is not given",
            "nowhere.yaml",
            "not.json is not JSON",
            "json is file/plan.json",
            "seq_length is 0",
            "params_dtype is fp32",
            "recompute_granularity is None",
            "matmul_efficiency is 2.0",
        ],
    ),
    "the row of a plan": Case("plan_run.py", {"model": "8B", "devices": 8, "row": -1}, [], ["row is -1"]),
    "a check of a cluster": Case(
        "check_cluster.py",
        {"folder": "file/out", "minutes": 0, "only": [], "report": "model", "hours": 3},
        [],
        ["folder is file/out", "minutes is 0.0", "only is []", "report is model", "hours is unknown"],
    ),
    "plan of a study": Case(
        "almr_study.py plan",
        STUDY | {"adaptive": -1, "device": "h1"},
        [],
        [*STUDIED, "adaptive is -1", "device is 'h1'", "checkpoint.load is 'lost'"],
    ),
    "runs of a study": Case(
        "almr_study.py run", STUDY | {"only": []}, [], [*STUDIED, "only is []", "checkpoint.load is 'lost'"]
    ),
    "a ratio of a study, which no mixture is checked with": Case(
        "almr_study.py plan",
        {"base": "base.yaml", "folder": "study", "almr": [3], "lr": [1e-4], "train_tokens": 1000},
        [],
        ["almr is 3.0"],
    ),
    "starting pairs of a study, which its seeds do not change": Case(
        "almr_study.py plan",
        {"base": "base.yaml", "folder": "study", "almr": [0.5], "lr": [1e-4], "train_tokens": 1000}
        | {"seeds": [1, 1], "starting_pairs": 0},
        [],
        ["seeds is [1, 1]", "starting_pairs is 0"],
    ),
    "fit of a study": Case(
        "almr_study.py fit",
        STUDY | {"tolerance": -1, "token_budget": 0, "frontier_axis": "x"},
        [],
        [*STUDIED, "tolerance is -1.0", "token_budget is 0", "frontier_axis is 'x'"],
    ),
    "plot of a study": Case("almr_study.py plot", STUDY | {"tolerance": -1}, [], [*STUDIED, "tolerance is -1.0"]),
    "choice of a study": Case(
        "almr_study.py choose",
        STUDY | {"confidence": 2, "max_general_rise": -1, "goal": "x", "target": "lost.yaml"},
        [],
        [*STUDIED, "confidence is 2.0", "max_general_rise is -1.0", "goal is 'x'", "lost.yaml"],
    ),
}


def files_in(folder: Path) -> list[tuple[str, int]]:
    """All files and folders, and when they were changed."""
    return sorted((str(path), path.stat().st_mtime_ns) for path in folder.rglob("*"))


def start(folder: Path, case: Case, environment: dict[str, str] | None = None) -> list[str]:
    """The lines of a start that must be refused, without torch and without a trace on disk."""
    (folder / "run.yaml").write_text(yaml.safe_dump(case.fields))
    before = files_in(folder)
    tool, *command = case.tool.split()
    words = [str(ROOT / "tools" / tool), *command, "--config", "run.yaml", *case.options]
    environment = {name: value for name, value in os.environ.items() if name != "WORLD_SIZE"} | (environment or {})
    importing = [sys.executable, "-B", "-X", "importtime", *words]
    done = subprocess.run(importing, capture_output=True, text=True, cwd=folder, env=environment)
    imported = set(re.findall(r"^import time:.*\|\s+([\w.]+)$", done.stderr, re.MULTILINE))
    lines = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert done.returncode == 2, "\n".join(lines)
    assert not imported & {"torch", "megatron", "transformers", "scipy"}
    assert done.stdout == ""
    assert files_in(folder) == before
    return lines


def test_every_tool_has_a_case() -> None:
    assert {case.tool.split()[0] for case in CASES.values()} == {path.name for path in tools()}


@pytest.mark.parametrize("name", CASES)
def test_as_many_lines_as_mistakes(name: str, good_files: Path) -> None:
    lines = start(good_files, CASES[name])
    assert all((line.startswith("error: ") and "; " in line) or ": " in line[7:] for line in lines), lines
    unsaid = [said for said in CASES[name].said if not any(said in line for line in lines)]
    assert not unsaid, "\n".join(lines)
    uncalled = [line for line in lines if not any(said in line for said in CASES[name].said)]
    assert not uncalled, "\n".join(uncalled)
    assert len(lines) == len(CASES[name].said), "\n".join(lines)


def test_what_a_launcher_says_is_named_with_the_rest(good_files: Path) -> None:
    case = Case("finetune_sft.py", {"model": "nowhere", "save": "run", "data": {"sources": [SOURCE]}}, ["--lora.r=x"], [])
    lines = start(good_files, case, {"WORLD_SIZE": "abc", "LOCAL_RANK": "x"})
    for said in ("lora.r is 'x'", "model is nowhere", "WORLD_SIZE is 'abc'", "LOCAL_RANK is 'x'"):
        assert any(said in line for line in lines), lines


def test_what_may_be_in_a_file_that_cannot_be_read_is_not_missing(good_files: Path) -> None:
    """Nor does it have its default: the length of the run may be given there."""
    options = ["--config", "not.json", "--optimizer.lr=-1", "--training.seed=-1"]
    lines = start(good_files, Case("pretrain_cpt.py", {}, options, []))
    assert len(lines) == 3, lines


def test_a_configuration_that_cannot_be_read_hides_no_options(good_files: Path) -> None:
    options = ["--config", "not.json", "--model", "nowhere", "--training.seed=x", "--save=file"]
    lines = start(good_files, Case("finetune_sft.py", {}, options, []))
    for said in ("not.json is not YAML", "model is nowhere", "training.seed is 'x'", "save is file"):
        assert any(said in line for line in lines), lines
    assert len(lines) == 4, lines
