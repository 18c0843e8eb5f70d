"""What each measurement depends on: all that it uses, and nothing else."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_models import write_yaml

from megatron_cpt.evaluation import identity
from megatron_cpt.evaluation.config import EvaluateConfig, JudgeConfig, PairwiseConfig, PromptsConfig, TextConfig
from megatron_cpt.evaluation.harness import SUITES, TASKS, Benchmark
from megatron_cpt.evaluation.identity import (
    answers_identity,
    benchmark_identity,
    digest_of,
    pairwise_identity,
    task_identity,
    text_identity,
)

CHOICES = Benchmark("Choices", "tiny_choices", "acc,none", 1)
Change = Callable[[EvaluateConfig], EvaluateConfig]


@pytest.fixture
def config(tmp_path: Path) -> EvaluateConfig:
    for name in ("en.jsonl", "zh.jsonl", "en.json", "zh.json"):
        (tmp_path / name).write_text(f'[{{"text": "{name}"}}]\n')
    prompts = [PromptsConfig(str(tmp_path / "en.json"), "en"), PromptsConfig(str(tmp_path / "zh.json"), "zh")]
    return EvaluateConfig(
        output=str(tmp_path / "out"),
        models={"a": "a", "b": "b"},
        text=[TextConfig(str(tmp_path / "en.jsonl"), "en"), TextConfig(str(tmp_path / "zh.jsonl"), "zh")],
        prompts=prompts,
        pairwise=PairwiseConfig(JudgeConfig(url="http://localhost:1/v1", model="wise"), prompts),
    )


@pytest.mark.parametrize(
    ("changed", "change"),
    [
        (
            [],
            lambda config: replace(config, confirm_run_unsafe_code=True, device_map="auto", output="elsewhere", ablation=[]),
        ),
        (["text"], lambda config: replace(config, max_length=16)),
        (["text"], lambda config: replace(config, text=[replace(config.text[0], max_documents=1), config.text[1]])),
        ([], lambda config: replace(config, text=config.text[:1], prompts=config.prompts[:1])),
        (["text"], lambda config: replace(config, text=[*config.text, replace(config.text[1], language="en")])),
        (["answers", "pairwise"], lambda config: replace(config, max_new_tokens=8)),
        (["answers", "pairwise"], lambda config: replace(config, chat_template="llama3")),
        (["answers", "pairwise", "benchmark"], lambda config: replace(config, batch_size=8)),
        (["answers"], lambda config: replace(config, prompts=[replace(config.prompts[0], max_prompts=1)])),
        (["benchmark"], lambda config: replace(config, limit=2)),
        (["benchmark"], lambda config: replace(config, apply_chat_template=True)),
        (["benchmark"], lambda config: replace(config, seed=2)),
    ],
)
def test_settings_belong_to_what_uses_them(config: EvaluateConfig, changed: list[str], change: Change) -> None:
    def all_of(config: EvaluateConfig) -> dict[str, Any]:
        return {
            "text": text_identity(config, "en"),
            "answers": answers_identity(config, "en"),
            "pairwise": pairwise_identity(config),
            "benchmark": benchmark_identity(config, CHOICES, {}),
        }

    before, after = all_of(config), all_of(change(config))
    assert [part for part in before if before[part] != after[part]] == changed


def test_a_benchmark_is_what_it_asks_not_its_name(config: EvaluateConfig) -> None:
    def found(**changes: Any) -> dict[str, Any]:
        return benchmark_identity(config, replace(CHOICES, **changes), {})

    assert found() == found(name="Other")
    assert all(found() != found(**change) for change in ({"task": "x"}, {"metric": "f1,none"}, {"num_fewshot": 2}))


def test_files_are_known_by_their_content(config: EvaluateConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = text_identity(config, "en")
    path = Path(config.text[0].path)
    os.utime(path, (1, 1))
    moved = path.rename(tmp_path / "moved.jsonl")
    (tmp_path / "template").write_text("x")
    templated = replace(config, chat_template=str(tmp_path / "template"), text=[TextConfig(str(moved), "en")])
    assert text_identity(templated, "en") == before
    answers = answers_identity(templated, "en")
    (tmp_path / "template").write_text("y")
    assert answers_identity(templated, "en") != answers
    # Of large ones place, size and time are looked at
    monkeypatch.setattr(identity, "LARGE", 1)
    os.utime(moved, (2, 2))
    assert digest_of(str(moved)) == [str(moved), moved.stat().st_size, 2 * 10**9]
    assert digest_of(str(tmp_path / "nowhere")) is None


def index_of(*folders: str | Path) -> dict[str, Any]:
    from lm_eval.tasks import TaskManager

    found: dict[str, Any] = TaskManager(include_path=list(folders), include_defaults=False).task_index
    return found


def test_tasks_of_ones_own(tasks: str, tmp_path: Path) -> None:
    """Their YAML with what it includes, the functions that it names, and the data."""
    (tmp_path / "tasks" / "own.py").write_text("def kept(rows):\n    return rows\n")
    (tmp_path / "base").write_text("process_docs: !function tasks.own.kept\n")
    child = {"include": "../base", "task": "child", "dataset_path": str(tmp_path / "rows"), "output_type": "generate_until"}
    write_yaml(tmp_path / "tasks" / "child.yaml", child)
    write_yaml(
        tmp_path / "tasks" / "group.yaml", {"group": "both", "task": ["tiny_choices", {"group": "in", "task": ["child"]}]}
    )
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "test.json").write_text("[]")

    def all_of() -> dict[str, Any]:
        return {name: task_identity(name, index_of(tasks), None) for name in ("tiny_choices", "child", "both")}

    def changed_by(path: Path) -> list[str]:
        before = all_of()
        path.write_text(path.read_text() + f"\n{path.stem}_: 1\n")
        after = all_of()
        return [name for name in before if before[name] != after[name]]

    assert changed_by(tmp_path / "choices.jsonl") == ["tiny_choices", "both"]
    assert changed_by(tmp_path / "tasks" / "lost_choices.yaml") == []
    assert changed_by(tmp_path / "tasks" / "tiny_choices.yaml") == ["tiny_choices", "both"]
    for file in ("base", "tasks/own.py", "tasks/child.yaml", "rows/test.json"):
        assert changed_by(tmp_path / file) == ["child", "both"], file


def test_parts_of_a_group_with_functions_of_one_name_and_data_of_their_own(tasks: str, tmp_path: Path) -> None:
    folder = tmp_path / "tasks"
    for name in ("x", "y"):
        (folder / name).mkdir()
        (folder / name / "utils.py").write_text("def kept(rows):\n    return rows\n")
        fields = "dataset_path: json\noutput_type: generate_until\nprocess_docs: !function utils.kept\n"
        (folder / name / "own.yaml").write_text(f"task: {name}\n{fields}")
    (folder / "rows.jsonl").write_text("")
    member = {"task": "y", "dataset_kwargs": {"data_files": str(folder / "rows.jsonl")}}
    write_yaml(folder / "group.yaml", {"group": "both", "task": ["x", member]})
    for file in ("x/utils.py", "y/utils.py", "rows.jsonl"):
        before = task_identity("both", index_of(tasks), None)
        (folder / file).write_text((folder / file).read_text() + "\n")
        assert task_identity("both", index_of(tasks), None) != before, file


def test_tags_have_their_tasks(tasks: str, tmp_path: Path) -> None:
    write_yaml(tmp_path / "tasks" / "one.yaml", {"include": "tiny_choices.yaml", "task": "one", "tag": ["tagged"]})
    before = task_identity("tagged", index_of(tasks), None)
    (tmp_path / "choices.jsonl").write_text("")
    assert task_identity("tagged", index_of(tasks), None) != before


def test_data_of_the_packages_own_tasks(tmp_path: Path) -> None:
    """Each looks at its own folder in data_folder."""
    folders = {"lcsts": "lcsts", "wmt22_zh_en": "wmt22", "belle_eval": "belle", "humaneval_sandboxed": "humaneval"}
    folders |= {name: name for name in ("cluewsc2020", "cmrc2018", "drcd", "eprstmt")}
    index = index_of(TASKS)
    ours = {item.task for suite in SUITES.values() for item in suite if item.task in index}
    assert ours - {"wmt22_en_zh"} == set(folders)
    before = {task: task_identity(task, index, str(tmp_path)) for task in ours}
    for task, folder in folders.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "file.json").write_text(json.dumps(task))
        after = {name: task_identity(name, index, str(tmp_path)) for name in ours}
        both = {"wmt22_zh_en", "wmt22_en_zh"}
        assert {name for name in ours if before[name] != after[name]} == (both if task in both else {task})
        before = after


def test_data_of_functions_of_ones_own(tmp_path: Path) -> None:
    """Where in data_folder they look is not known: all of it counts."""
    (tmp_path / "own.py").write_text("")
    (tmp_path / "own.yaml").write_text("task: own\ncustom_dataset: !function own.rows\noutput_type: generate_until\n")
    data = tmp_path / "data"
    data.mkdir()
    before = task_identity("own", index_of(tmp_path), str(data))
    (data / "rows.json").write_text("[]")
    assert task_identity("own", index_of(tmp_path), str(data)) != before
    assert task_identity("own", index_of(tmp_path), None)["data"] == []


def test_measurements_of_the_last_release_count(config: EvaluateConfig) -> None:
    """Settings that have other names by now have their old ones where they were written down."""
    assert text_identity(config, "en").keys() == {"files", "window"}
    asked = benchmark_identity(config, CHOICES, {})
    assert {"limit", "chat", "batch_size", "seed"} <= asked.keys()
