"""Files that are missing are named together with wrong settings."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import ROOT, write_empty_weights, write_yaml
from without_rights import LAUNCHER, lock, needs_somebody

from megatron_cpt.posttrain.run_files import check_chat, check_sources
from megatron_cpt.posttrain.settings import ChatConfig, SourceConfig, TuningDataConfig

MISSING = ["--model", "nothere", "--data.chat_template", "nofile"]
SAID = [
    "model is nothere, which has no config.json",
    "run.yaml: data.sources[1].path is nothing.jsonl",
    "run.yaml: data.validation[0].path is lost.jsonl",
    "data.chat_template is nofile, no file",
]


EMPTY_MODEL = [  # of a folder with nothing but a config.json
    "error: model holds no .safetensors file and no pytorch_model.bin; expected weights",
    "error: model has no tokenizer; expected tokenizer.json, tokenizer.model or another vocabulary in it",
]


def errors_of(command: list[str]) -> list[str]:
    """What a tool says that has not imported torch."""
    result = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert result.returncode == 2, result.stderr[-2000:]
    imported = set(re.findall(r"\|\s+([\w.]+)$", result.stderr, re.MULTILINE))
    assert "megatron_cpt.posttrain.rows" in imported  # by what checks the files
    assert "torch" not in imported
    return [line.removeprefix("error: ") for line in result.stderr.splitlines() if line.startswith("error: ")]


def refused(folder: Path, tool: str, *options: str) -> list[str]:
    """What the tool says of a configuration file run.yaml with a source that is there and others that are not."""
    (folder / "there.jsonl").write_text("")
    names = (str(folder / "there.jsonl"), "nothing.jsonl", "lost.jsonl")
    sources = [{"path": path, "language": "en"} for path in names]
    path = write_yaml(folder / "run.yaml", {"data": {"sources": sources[:2], "validation": sources[2:]}})
    command = [sys.executable, "-X", "importtime", str(ROOT / "tools" / tool), "--config", path]
    return [line.replace(path, "run.yaml") for line in errors_of([*command, "--save", str(folder / "run"), *options])]


@pytest.mark.parametrize("tool", ["finetune_sft.py", "finetune_dpo.py"])
def test_missing_files_and_wrong_settings_at_once(tmp_path: Path, tool: str) -> None:
    """At once: torch is not imported."""
    said = refused(tmp_path, tool, *MISSING, "--optimizer.lr", "-1", "--training.epochs", "0")
    assert [line.split(";")[0] for line in said] == ["training.epochs is 0.0", "optimizer.lr is -1.0", *SAID]


@pytest.mark.parametrize("tool", ["finetune_sft.py", "finetune_dpo.py"])
def test_missing_files_alone(tmp_path: Path, tool: str) -> None:
    said = refused(tmp_path, tool, *MISSING)
    assert [line.split(";")[0] for line in said] == SAID


def test_what_chat_does_not_find(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    command = [sys.executable, "-X", "importtime", str(ROOT / "tools" / "chat.py"), "my-org/model"]
    said = errors_of([*command, "--chat_template", str(tmp_path / "latin")])
    assert said[0].startswith("model is my-org/model, which has no config.json; expected a Hugging Face folder")
    assert said[0].endswith("get it first: hf download my-org/model --local-dir model")
    assert said[1].startswith(f"chat_template is {tmp_path / 'latin'}, which is no text in UTF-8")
    assert len(said) == 2


def test_other_files_of_the_same_size_are_two(tmp_path: Path) -> None:
    for name, text in (("a", "[1]"), ("b", "[2]"), ("c", "")):
        (tmp_path / f"{name}.jsonl").write_text(text)
    a, b, c = (SourceConfig(str(tmp_path / f"{name}.jsonl"), "en") for name in "abc")
    check_sources(TuningDataConfig([a, c], [b]))
    check_sources(TuningDataConfig([a, a], [b]))
    check_sources(TuningDataConfig([a, a], validation_share=0))


def wrong_files(folder: Path, save: str, data: str, *launcher: str) -> list[str]:
    """What the tool says of them, beside a wrong setting."""
    (folder / "model").mkdir(exist_ok=True)
    (folder / "model" / "config.json").write_text("{}")
    words = ["--model", "model", "--save", save, "--optimizer.lr", "5", "--data.chat_template", "chatml"]
    words += ["--data.sources", json.dumps([{"path": data, "language": "en"}])]
    command = [*launcher, sys.executable, "-B", str(ROOT / "tools" / "finetune_sft.py"), *words]
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert result.returncode == 2
    first, *others = result.stderr.splitlines()
    assert first.startswith("error: optimizer.lr is 5.0")
    assert set(others) > set(EMPTY_MODEL) or others == EMPTY_MODEL
    return [line.removeprefix("error: ") for line in others if line not in EMPTY_MODEL]


def test_a_place_where_no_run_can_be_saved_is_named(tmp_path: Path) -> None:
    (tmp_path / "mit Leer 狗.json").write_text("[]")
    (tmp_path / "file").write_text("")
    (tmp_path / "dead").symlink_to("nothing")
    (tmp_path / "cpt" / "iter_0000004").mkdir(parents=True)
    (tmp_path / "converted").mkdir()
    (tmp_path / "converted" / "latest_checkpointed_iteration.txt").write_text("release")
    (tmp_path / "converted" / "release").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "metrics.jsonl").write_text("mine")
    expected = {
        "file/run": f"save is file/run, and {tmp_path}/file is no folder; use another name as save",
        "dead": f"save is dead, and {tmp_path}/dead is no folder; use another name as save",
        "cpt": "save is cpt, which holds a run of pretrain_cpt.py; expected a folder of its own",
        "converted": "save is converted, which holds Megatron checkpoints; expected a folder of its own",
        "model": "save is model, which holds a model; expected a folder of its own",
        "notes": "save is notes, which holds another metrics.jsonl; expected a folder of its own",
        "new/run": None,
    }
    found = {save: wrong_files(tmp_path, save, "mit Leer 狗.json") for save in expected}
    assert found == {save: [] if said is None else [said] for save, said in expected.items()}


def test_data_that_are_no_files_are_called_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dead").symlink_to("nothing")
    expected = {
        "folder": "it is a folder",
        "pipe": "it is a pipe or a device",
        "dead": "no such file",
    }
    found = {name: wrong_files(tmp_path, "run", name) for name in expected}
    assert found == {name: [f"data.sources[0].path is {name}; expected a file ({why})"] for name, why in expected.items()}


@needs_somebody
def test_what_may_not_be_read_or_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "locked.json").write_text("[]")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "in.json").write_text("[]")
    (tmp_path / "readonly").mkdir()
    for name in ("locked.json", "folder"):
        lock(tmp_path / name)
    (tmp_path / "readonly").chmod(0o555)
    place = f"save is readonly/run, and {tmp_path}/readonly cannot be written to: Permission denied"
    try:
        for data in ("locked.json", "folder/in.json"):
            assert wrong_files(tmp_path, "readonly/run", data, *LAUNCHER) == [
                f"{place}; use another name as save",
                f"data.sources[0].path is {data}; expected a file (Permission denied)",
            ]
    finally:
        (tmp_path / "folder").chmod(0o755)


@needs_somebody
def test_a_model_that_may_not_be_entered_is_not_one_without_config(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    lock(tmp_path / "model")
    command = [*LAUNCHER, sys.executable, "-B", str(ROOT / "tools" / "chat.py"), "model", "--top_p=2"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    finally:
        (tmp_path / "model").chmod(0o755)
    assert result.stderr.splitlines() == [
        "error: top_p is 2.0; expected a number above 0, at most 1",
        "error: model is model; expected a Hugging Face folder that you may enter and read (Permission denied)",
    ]


def test_a_prompt_without_a_token_is_refused_at_once(tmp_path: Path, tiny_tokenizer_dir: str) -> None:
    """Unless the tokenizer puts one before each text."""
    model = Path(shutil.copytree(tiny_tokenizer_dir, tmp_path / "model"))
    (model / "config.json").write_text("{}")
    write_empty_weights(model)
    command = [sys.executable, "-X", "importtime", str(ROOT / "tools" / "chat.py"), str(model), "--prompt", ""]
    assert errors_of(command) == [f"prompt is '', of which the tokenizer {model} makes no token; expected a text"]
    fields = json.loads((model / "tokenizer.json").read_text())
    token = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    fields["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [token, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [token, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
    }
    (model / "tokenizer.json").write_text(json.dumps(fields))
    check_chat(ChatConfig(str(model), prompt=""))


@pytest.mark.parametrize(("template", "shown"), [("null", "null"), ("nofile.jinja", "nofile.jinja")])
def test_a_template_that_cannot_be_exported_is_one_mistake(
    tmp_path: Path, tiny_tokenizer_dir: str, template: str, shown: str
) -> None:
    model = Path(shutil.copytree(tiny_tokenizer_dir, tmp_path / "model"))
    (model / "config.json").write_text("{}")
    write_empty_weights(model)
    (tmp_path / "run" / "hf").mkdir(parents=True)  # a finished run, of no account here
    options = ["--model", str(model), "--export_to", str(tmp_path / "new"), "--data.chat_template", template]
    said = refused(tmp_path, "finetune_sft.py", *options)
    assert said[0].startswith(f"data.chat_template is {shown}; LLaMA-Factory has templates of its own")
    assert [line.split(" is ")[0] for line in said[1:]] == [
        "run.yaml: data.sources[1].path",
        "run.yaml: data.validation[0].path",
    ]
