"""All that an evaluation names and that is not there is named at once, before anything is imported that takes time."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_models import ROOT, write_empty_weights, write_yaml

from megatron_cpt.evaluation.report import only_evaluation
from megatron_cpt.utils.errors import InputError

MODEL = "which has no config.json; expected a Hugging Face folder, such as convert_checkpoint.py megatron-to-hf writes"
HUB = "if it is a model on the Hugging Face hub, get it first: hf download my-org/model --local-dir model"
FIELDS: dict[str, Any] = {
    "models": {"C-SFT": "my-org/model", "base": "nothere"},
    "text": [{"path": "a.jsonl", "language": "en"}, {"path": "b.jsonl", "language": "zh"}],
    "prompts": [{"path": "q.json", "language": "en"}],
    "pairwise": {
        "judge": {"url": "http://localhost:1/v1", "model": "wise", "prompt": "p.txt"},
        "prompts": [{"path": "q.json", "language": "zh"}],
    },
    "trajectory": {"run": "norun", "checkpoints": [{"iteration": 0, "model": ""}]},
    "chat_template": "nofile",
}
TASK = {"name": "ARC", "task": "arc_easy", "metric": "acc,none"}
TEXT = [{"path": "there.jsonl", "language": "en"}]
MISSING = [
    f"models.C-SFT is my-org/model, {MODEL}; {HUB}",
    f"models.base is nothere, {MODEL}",
    f"trajectory.checkpoints[0].model is '', {MODEL}",
    "trajectory.run is norun; expected the folder of a run (no such folder)",
    "text[0].path is a.jsonl; expected a file (no such file)",
    "text[1].path is b.jsonl; expected a file (no such file)",
    "prompts[0].path is q.json; expected a file (no such file)",
    "pairwise.prompts[0].path is q.json; expected a file (no such file)",
    "pairwise.judge.prompt is p.txt; expected a file (no such file)",
    "chat_template is nofile, no file; expected llama3, chatml, or a file with a Jinja template",
]


def refused(folder: Path, fields: dict[str, Any], *options: str) -> list[str]:
    """What the tool says, of a configuration file run.yaml, without having imported torch."""
    path = write_yaml(folder / "run.yaml", fields)
    command = [sys.executable, "-X", "importtime", str(ROOT / "tools" / "evaluate.py"), "--config", str(path)]
    (folder / "there.jsonl").write_text("")
    command += ["--output", str(folder / "out"), *options]
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert result.returncode == 2, result.stderr[-2000:]
    imported = set(re.findall(r"\|\s+([\w.]+)$", result.stderr, re.MULTILINE))
    assert "megatron_cpt.model.hf_folder" in imported
    assert "torch" not in imported
    assert not (folder / "out").exists()
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    return [line.removeprefix("error: ").replace(str(path), "run.yaml") for line in errors]


def test_all_that_is_missing_is_named_at_once(tmp_path: Path) -> None:
    """With the options that name it, and without the configuration file where an option has taken its place."""
    said = refused(tmp_path, FIELDS, "--tasks_folder", "notasks", "--data_folder", "nodata")
    folders = [f"{name}_folder is no{name}; expected a folder (no such folder)" for name in ("tasks", "data")]
    in_file = [f"run.yaml: {line}" for line in MISSING]
    assert said == [*in_file[:4], *folders, *in_file[4:]]


def test_the_folder_of_another_run_is_no_output(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text('{"kind": "pretrain"}')
    fields = {"models": {"base": "nothere"}, "text": TEXT}
    said = refused(tmp_path, fields, "--output", str(tmp_path / "run"))
    assert said[-1] == f"output is {tmp_path}/run, which holds a run of pretrain_cpt.py; expected a folder of its own"


def test_folders_are_no_files(tmp_path: Path) -> None:
    fields = {"models": {"base": "nothere"}, "text": [{"path": str(tmp_path), "language": "en"}]}
    assert refused(tmp_path, fields)[1:] == [f"run.yaml: text[0].path is {tmp_path}; expected a file (it is a folder)"]


def test_with_wrong_settings_as_well(tmp_path: Path) -> None:
    """A wrong name of a model and a missing folder are two things."""
    fields = {"models": {"a/b": "nothere", "report": "."}, "text": TEXT, "limit": 0}
    said = refused(tmp_path, fields)
    assert [line.split(";")[0] for line in said] == [
        "run.yaml: limit is 0",
        "run.yaml: models has the name 'a/b'",
        "run.yaml: models has the name 'report'",
        "run.yaml: models.a/b is nothere, which has no config.json",
        "run.yaml: models.report is ., which has no config.json",
    ]


@pytest.mark.parametrize("option", ["--models={base: gone}", "--models.base=gone"])
def test_an_option_in_place_of_what_the_file_says(tmp_path: Path, option: str) -> None:
    fields = {"models": {"base": "nothere"}, "text": TEXT}
    assert refused(tmp_path, fields, option) == [f"models.base is gone, {MODEL}"]


def test_tokenizers_that_do_not_go_with_the_template_are_all_named(tmp_path: Path, tiny_tokenizer_dir: str) -> None:
    """A model that has a template of its own needs no other."""
    for name, template in (("first", None), ("own", "{{ messages }}"), ("broken", "{% if %}"), ("last", None)):
        folder = Path(shutil.copytree(tiny_tokenizer_dir, tmp_path / name))
        (folder / "config.json").write_text("{}")
        write_empty_weights(folder)
        if template is not None:
            (folder / "chat_template.jinja").write_text(template)
    lacks = "has no token <|im_start|>; use another template, or add its tokens"
    broken = "broken/chat_template.jinja is no Jinja template: line 1: Expected an expression, got 'end of statement block'"
    missing = [f"chat_template is chatml, but the tokenizer {name} {lacks}" for name in ("first", "last")]
    models = {"one": "first", "two": "own", "three": "broken", "four": "last"}
    (tmp_path / "there.jsonl").write_text("")
    questions = [{"path": "there.jsonl", "language": "en"}]
    said = refused(tmp_path, {"models": models, "prompts": questions, "chat_template": "chatml"})
    assert sorted(line.removeprefix("run.yaml: ") for line in said) == sorted([*missing, broken])
    assert refused(tmp_path, {"models": models, "tasks": [TASK], "apply_chat_template": True}) == [broken]
    (tmp_path / "last" / "tokenizer.json").write_text("{}")
    said = refused(tmp_path, {"models": models, "tasks": [TASK], "text": TEXT})
    assert len(said) == 1
    assert "last/tokenizer.json" in said[0]


@pytest.mark.parametrize("written", [False, True])
def test_a_folder_in_which_nothing_was_measured_goes_with_its_lock(tmp_path: Path, written: bool) -> None:
    output = tmp_path / "out"
    output.mkdir()

    def measure() -> None:
        with only_evaluation(str(output)):
            if written:
                (output / "report.json").write_text("{}")
            raise InputError("a model is refused")

    with pytest.raises(InputError, match="a model is refused"):
        measure()
    assert output.exists() == written
