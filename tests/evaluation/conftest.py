from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tiny_models import make_tiny_llama, write_yaml

QUESTIONS = [
    {"question": "The dog", "choices": ["runs", "flies", "公园"], "answer": 0},
    {"question": "今天天气", "choices": ["fox", "很好", "lazy"], "answer": 1},
    {"question": "Numbers like", "choices": ["3.14", "woods", "我们"], "answer": 0},
    {"question": "The fox", "choices": ["知识", "sleeps", "split"], "answer": 1},
    {"question": "A language", "choices": ["model", "over", "散步"], "answer": 0},
]


@pytest.fixture(scope="session", autouse=True)
def index_read_once() -> Iterator[None]:
    """lm-eval reads the YAML of its 14,000 tasks for each registry, which takes ten seconds: here once."""
    from lm_eval.tasks import _index

    build = _index.TaskIndex.build
    own = Path(_index.__file__).parent

    @cache
    def indexed() -> dict[str, _index.Entry]:
        return build([own])

    def build_once(paths: Iterable[Path], **options: Any) -> dict[str, _index.Entry]:
        first, *others = paths
        return indexed() | build(others, **options) if first == own else build([first, *others], **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_index.TaskIndex, "build", staticmethod(build_once))
        yield


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: str) -> str:
    return make_tiny_llama(tmp_path_factory.mktemp("evaluated") / "hf", tiny_tokenizer_dir)


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder with a multiple-choice task on local data, and one whose data is not there."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = tmp_path / "choices.jsonl"
    data.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in QUESTIONS))
    for name, path in (("tiny_choices", data), ("lost_choices", tmp_path / "nowhere.jsonl")):
        write_yaml(
            folder / f"{name}.yaml",
            {
                "task": name,
                "dataset_path": "json",
                "dataset_kwargs": {"data_files": {"test": str(path)}},
                "test_split": "test",
                "fewshot_split": "test",
                "output_type": "multiple_choice",
                "doc_to_text": "{{question}}",
                "doc_to_choice": "{{choices}}",
                "doc_to_target": "{{answer}}",
                "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
            },
        )
    return str(folder)
