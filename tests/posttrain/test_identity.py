"""A run resumes with what it began with, or says what is another; and then its figures are those of an undisturbed one."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from chats import dpo_config, read_metrics, sft_config
from safetensors.torch import load_file, save_file
from tiny_models import ROOT, write_yaml
from transformers.utils import chat_template_utils

from megatron_cpt.convert.vocabulary import load_hf_tokenizer
from megatron_cpt.posttrain import identity, runner
from megatron_cpt.posttrain.conversations import Message
from megatron_cpt.posttrain.dpo import finetune_dpo
from megatron_cpt.posttrain.identity import check_begun, digest
from megatron_cpt.posttrain.run_files import check_tuning
from megatron_cpt.posttrain.settings import RunSettings, TrainingSettings
from megatron_cpt.posttrain.sft import SftConfig, finetune_sft
from megatron_cpt.posttrain.template_files import CHATML
from megatron_cpt.posttrain.templates import PromptTemplate
from megatron_cpt.utils.errors import InputError


@pytest.fixture(scope="module")
def stopped(chat_model: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[SftConfig, SftConfig]:
    """(a run that was stopped after three of its six steps, an undisturbed one)"""
    folder = tmp_path_factory.mktemp("stopped")
    shutil.copytree(chat_model, folder / "model")
    (folder / "mine.jinja").write_text(CHATML)
    config = sft_config(str(folder / "model"), folder, run=RunSettings(log_interval=2))
    config = replace(config, data=replace(config.data, chat_template=str(folder / "mine.jinja")))
    whole = replace(config, save=str(folder / "whole"), run=RunSettings(log_interval=2, save_interval=3))
    finetune_sft(whole)
    original = runner.Stop.on_step_end

    def stopping(self: Any, args: Any, state: Any, control: Any, **rest: Any) -> Any:
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, args, state, control, **rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner.Stop, "on_step_end", stopping)
        assert finetune_sft(config) == config.save
    return config, whole


@pytest.fixture
def restored(stopped: tuple[SftConfig, SftConfig]) -> Iterator[SftConfig]:
    """The stopped run; files that a test changes are put back."""
    config = stopped[0]
    paths = [*Path(config.model).iterdir(), Path(str(config.data.chat_template)), Path(config.data.sources[0].path)]
    paths.append(Path(config.save) / "run.json")
    contents = {path: path.read_bytes() for path in paths}
    yield config
    for path, content in contents.items():
        path.write_bytes(content)


def edit(path: str, old: str, new: str) -> None:
    """With the same size and time of change."""
    before = os.stat(path)
    text = Path(path).read_text()
    assert old in text
    Path(path).write_text(text.replace(old, new))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def change_weight(config: SftConfig) -> None:
    path = Path(config.model) / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    tensors["model.norm.weight"][3] += 0.01
    save_file(tensors, path, metadata={"format": "pt"})


def drop_merge(config: SftConfig) -> None:
    path = Path(config.model) / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["merges"].pop()
    path.write_text(json.dumps(content))


CHANGES: dict[str, tuple[Callable[[SftConfig], Any], str]] = {
    "template": (lambda config: edit(str(config.data.chat_template), " | trim", ""), "another text of chat_template"),
    "tokenizer": (
        drop_merge,
        "another file of the model tokenizer.json",
    ),
    "weights": (change_weight, r"another file of the model model\.safetensors"),
    "data": (
        lambda config: edit(config.data.sources[0].path, "dog 0", "fox 0"),
        r"another data file .*conversations_en\.json",
    ),
    "damaged run.json": (lambda config: (Path(config.save) / "run.json").write_text("{"), r"run\.json does not say"),
    "missing run.json": (lambda config: (Path(config.save) / "run.json").unlink(), r"run\.json does not say"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_run_does_not_resume_with_something_else(restored: SftConfig, name: str) -> None:
    change, message = CHANGES[name]
    change(restored)
    with pytest.raises(InputError, match=message):
        finetune_sft(restored)
    assert not (Path(restored.save) / "hf").exists()


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("training", {"seed": 7}, r"has begun with training\.seed 1234, now it is 7"),
        ("training", {"max_steps": 7}, r"training\.max_steps 6, now it is 7"),
        ("optimizer", {"adam_beta2": 0.9}, r"optimizer\.adam_beta2 0\.95, now it is 0\.9"),
        ("data", {"almr": 0.5}, r"data\.almr None, now it is 0\.5"),
        (None, {"packing": False}, "packing True, now it is False"),
    ],
)
def test_a_run_does_not_resume_with_other_settings(
    restored: SftConfig, section: str | None, changes: dict[str, Any], message: str
) -> None:
    other = replace(restored, **({section: replace(getattr(restored, section), **changes)} if section else changes))
    with pytest.raises(InputError, match=message):
        finetune_sft(other)


def test_other_examples_of_the_same_files_are_noticed(restored: SftConfig) -> None:
    """As where another version of a library makes other tokens of them."""
    path = Path(restored.save) / "run.json"
    facts = json.loads(path.read_text())
    facts["examples"]["train"] = "0" * 64
    path.write_text(json.dumps(facts))
    with pytest.raises(InputError, match="has begun with another tokenization of train"):
        finetune_sft(restored)


def test_a_resumed_run_has_the_figures_of_an_undisturbed_one(stopped: tuple[SftConfig, SftConfig], tmp_path: Path) -> None:
    """Tokens, mean loss and all; in a folder of another name, with other intervals between checkpoints."""
    config, whole = stopped
    shutil.copytree(config.save, tmp_path / "moved")
    result = finetune_sft(replace(config, save=str(tmp_path / "moved"), run=replace(config.run, keep_last=1)))
    rows, expected = read_metrics(tmp_path / "moved"), read_metrics(Path(whole.save))
    clocks = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "epoch")
    for mine, theirs in zip(rows, expected, strict=True):
        assert {n: v for n, v in mine.items() if n not in clocks} == {n: v for n, v in theirs.items() if n not in clocks}
    steps = [row["loss"] for row in expected if "loss" in row]
    assert [row["iteration"] for row in expected if "loss" in row] == [1, 2, 3, 4, 6]
    (last,) = [row for row in rows if "train_loss" in row]
    assert last["train_loss"] == pytest.approx((sum(steps[:4]) + 2 * steps[4]) / 6)
    tokens = [row["num_tokens"] for row in rows if "loss" in row]
    assert tokens == sorted(tokens)
    assert tokens[0] > 0
    weights, whole_weights = (
        load_file(Path(result) / "model.safetensors"),
        load_file(Path(whole.save) / "hf/model.safetensors"),
    )
    assert all(torch.equal(weights[name], tensor) for name, tensor in whole_weights.items())


def test_large_files_are_known_by_pieces_from_all_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "WHOLE", 100)
    monkeypatch.setattr(identity, "PIECES", 3)
    monkeypatch.setattr(identity, "PIECE", 10)
    path = tmp_path / "weights"
    path.write_bytes(bytes(200))
    before = digest(str(path))
    for place in (0, 95, 104, 199):
        content = bytearray(200)
        content[place] = 1
        path.write_bytes(content)
        assert digest(str(path)) != before, place
    path.write_bytes(bytes(201))
    assert digest(str(path)) != before
    path.write_bytes(bytes(50))
    small = digest(str(path))
    path.write_bytes(bytes(49) + b"\x01")
    assert digest(str(path)) != small


DATED = "{{ '<|im_start|>system\\nToday: ' + strftime_now('%d %b %Y') + '<|im_end|>\\n' }}" + CHATML


@pytest.mark.parametrize("tool", ["sft", "dpo"])
def test_a_template_with_the_date_resumes_after_midnight(
    chat_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tool: str
) -> None:
    """With the date of the first start, as Llama-3.2's template; a line says so."""
    (tmp_path / "dated.jinja").write_text(DATED)
    make, finetune = {"sft": (sft_config, finetune_sft), "dpo": (dpo_config, finetune_dpo)}[tool]
    training = TrainingSettings(max_steps=1, micro_batch_size=1, global_batch_size=2)
    config: Any = make(chat_model, tmp_path, training=training, run=RunSettings(save_interval=1))
    config = replace(config, data=replace(config.data, chat_template=str(tmp_path / "dated.jinja")))
    result = Path(finetune(config))  # type: ignore[operator]
    began = json.loads((tmp_path / tool / "run.json").read_text())["template"]["date"]
    first = f"all have {began[:10]}, the day of the run's first start"
    assert first in capsys.readouterr().err
    shutil.rmtree(result)

    class Later(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime(2071, 3, 4, 5, 6)

    monkeypatch.setattr(identity, "datetime", Later)
    monkeypatch.setattr(chat_template_utils, "datetime", Later)
    finetune(config)  # type: ignore[operator]
    said = capsys.readouterr().err
    assert first in said
    assert "resuming from" in said
    today = PromptTemplate(load_hf_tokenizer(str(result)), None).prompt([Message("user", "a")])
    assert "04 Mar 2071" in today, "chat has the day on which it runs"


def test_a_template_without_the_date_has_none(stopped: tuple[SftConfig, SftConfig]) -> None:
    facts = json.loads((Path(stopped[0].save) / "run.json").read_text())
    assert list(facts["template"]) == ["chat_template"]


@pytest.mark.parametrize(
    ("text", "asks"),
    [
        ("{# no strftime_now here #}", False),
        ("strftime_now", False),
        ("{%- if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% endif %}", True),
        ("{% set day = strftime_now %}{{ day('%d') }}", True),
    ],
)
def test_a_template_asks_for_the_date_only_in_its_code(
    chat_tokenizer_dir: str, tmp_path: Path, text: str, asks: bool
) -> None:
    (tmp_path / "mine.jinja").write_text("{% if false %}" + text + "{% endif %}" + CHATML)
    now = datetime(2071, 3, 4)
    template = PromptTemplate(load_hf_tokenizer(chat_tokenizer_dir), str(tmp_path / "mine.jinja"), now)
    assert template.date == (now.isoformat() if asks else None)


def test_all_that_is_another_is_named_at_once_before_torch(restored: SftConfig, tmp_path: Path) -> None:
    """With a mistake of another kind; another model is one difference, whatever files it has."""
    CHANGES["data"][0](restored)
    with Path(str(restored.data.chat_template)).open("a") as file:
        file.write("{% if %}")
    path = write_yaml(tmp_path / "run.yaml", asdict(restored))
    other = Path(shutil.copytree(restored.model, tmp_path / "other"))
    (other / "chat_template.jinja").write_text(CHATML)
    options = ["--optimizer.lr=0.5", "--training.seed=7", "--training.epochs=-1", f"--model={other}"]
    command = [sys.executable, "-X", "importtime", str(ROOT / "tools" / "finetune_sft.py"), "--config", path, *options]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2, result.stderr[-2000:]
    assert not re.search(r"\|\s+torch$", result.stderr, re.MULTILINE)
    lines = [line.replace(f"{path}: ", "") for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "training.epochs is -1.0" in lines[0]
    begun = f"error: {restored.save} has begun with "
    expected = [
        f"{begun}model {restored.model}, now it is {other}; use another folder as save",
        f"{begun}optimizer.lr 0.003, now it is 0.5; use another folder as save",
        f"{begun}training.seed 1234, now it is 7; use another folder as save",
        f"{begun}another data file {restored.data.sources[0].path}; use another folder as save",
        f"{begun}another text of chat_template; use another folder as save",
    ]
    assert sorted(lines[1:-1]) == sorted(expected)
    assert "mine.jinja" in lines[-1], "what is wrong with it, too"


def test_what_is_spelled_otherwise_is_the_same(
    stopped: tuple[SftConfig, SftConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model by a link, a file by a path from its folder, a copy of another, and the template with dots."""
    began, whole = stopped
    shutil.copytree(began.save, tmp_path / "run")
    (tmp_path / "link").symlink_to(began.model)
    first, second = began.data.sources
    shutil.copy(second.path, tmp_path / "copy.json")
    monkeypatch.chdir(Path(first.path).parent)
    data = replace(
        began.data,
        sources=[replace(first, path=Path(first.path).name), replace(second, path=str(tmp_path / "copy.json"))],
        chat_template=str(Path(first.path).parent / "." / ".." / Path(first.path).parent.name / "mine.jinja"),
    )
    config = replace(began, model=f"{tmp_path}/./link/", data=data, save=str(tmp_path / "run"))
    check_tuning(config)
    result = finetune_sft(config)
    weights, expected = (load_file(Path(folder) / "model.safetensors") for folder in (result, f"{whole.save}/hf"))
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


def test_a_run_of_the_last_release_resumes(restored: SftConfig, tmp_path: Path) -> None:
    """Its run.json has the old names of settings; one that differs is named by its name of today."""
    shutil.copytree(restored.save, tmp_path / "run")
    config = replace(restored, save=str(tmp_path / "run"))
    path = tmp_path / "run" / "run.json"
    facts = json.loads(path.read_text())
    names = {"data.on_error": "data.broken", "data.on_overlength": "data.too_long"}
    facts["settings"] = {names.get(name, name): value for name, value in facts["settings"].items()}
    assert facts["settings"]["data.broken"] == "refuse"
    path.write_text(json.dumps(facts))
    check_begun(config)
    other = replace(config, data=replace(config.data, on_error="skip"))
    with pytest.raises(InputError, match=r"has begun with data\.on_error refuse, now it is skip;"):
        check_begun(other)
    finetune_sft(config)


def test_another_file_of_another_name_is_named_by_both(restored: SftConfig, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    shutil.copy(restored.data.sources[0].path, other)
    edit(str(other), "dog 0", "fox 0")
    sources = [replace(restored.data.sources[0], path=str(other)), restored.data.sources[1]]
    with pytest.raises(InputError, match=rf"has begun with data\.sources .*, now it is .*{re.escape(str(other))}"):
        check_tuning(replace(restored, data=replace(restored.data, sources=sources)))
