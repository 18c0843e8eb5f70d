"""Answers end where the model's turn ends, whichever file of its folder says so: for languages, judges and benchmarks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from judges import judge_server
from rigged_models import last_of_prompt, make_reciter, set_json, tokens_of
from tiny_models import run_tool, write_yaml

from megatron_cpt.evaluation.config import EvaluateConfig, JudgeConfig, PairwiseConfig, PromptsConfig
from megatron_cpt.evaluation.harness import Benchmark, Harness, TaskRegistry
from megatron_cpt.evaluation.report import evaluate
from megatron_cpt.posttrain.template_files import CHATML, LLAMA3

ANSWER, REST = "狗", " quick brown fox"
IM_END, EOT, OTHER = 401, 405, 402  # of the tokenizer with the templates' tokens; 0 is its end of text
PLAIN = (
    "{% for message in messages %}{{ ('Q> ' if message['role'] == 'user' else 'A:') + message['content'] + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'A:' }}{% endif %}"
)
FORGETFUL = PLAIN.replace("+ '\n'", "")  # nothing but the next question's mark tells where an answer ends
# what the folder says -> template, tokens or text between answer and rest, generation_config.json, other files' fields
FOLDERS: dict[str, tuple[str | None, list[int] | str, dict[str, Any], dict[str, Any]]] = {
    "the template alone": (CHATML, [IM_END], {"eos_token_id": 0}, {}),
    "an Instruct folder with an end of text as eos_token": (LLAMA3, [EOT], {"eos_token_id": [0, OTHER]}, {}),
    "one of several ids of generation_config": (CHATML, [OTHER], {"eos_token_id": [0, OTHER]}, {}),
    "no generation_config": (CHATML, [IM_END], {}, {}),
    "the tokenizer alone": (None, [0], {}, {}),
    "plain text of the template": (PLAIN, "\nQ>", {"eos_token_id": 0}, {}),
    "plain text on the same line": (FORGETFUL, "Q>", {"eos_token_id": 0}, {}),
    "a text of generation_config": (CHATML, "#", {"eos_token_id": 0, "stop_strings": ["#"]}, {}),
    "a token that is not special": (CHATML, [IM_END], {"eos_token_id": 0}, {"special": False}),
    "other settings of generation_config": (
        CHATML, [IM_END], {"eos_token_id": 0, "num_beams": 2, "repetition_penalty": 9.0, "min_new_tokens": 12}, {},
    ),
}  # fmt: skip


@pytest.fixture(scope="session", params=list(FOLDERS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, chat_tokenizer_dir: str) -> str:
    """A model that answers every question with ANSWER, an end of its turn, and a text in another language."""
    template, end, generation, other = FOLDERS[request.param]
    place = tmp_path_factory.mktemp("reciter") / "hf"
    asked = template if template in (PLAIN, FORGETFUL) else None
    last = tokens_of(chat_tokenizer_dir, "A:")[-1] if asked else last_of_prompt(chat_tokenizer_dir, "chatml", "?")
    ends = end if isinstance(end, list) else tokens_of(chat_tokenizer_dir, end)
    answer = tokens_of(chat_tokenizer_dir, ANSWER)
    if isinstance(end, str) and end.startswith("\n"):  # as it comes within a text
        assert tokens_of(chat_tokenizer_dir, ANSWER + end) == answer + ends
    chain = [last, *answer, *ends, *tokens_of(chat_tokenizer_dir, REST)]
    make_reciter(place, chat_tokenizer_dir, chain)
    set_json(place / "tokenizer_config.json", chat_template=template)
    set_json(place / "config.json", eos_token_id=None)
    (place / "generation_config.json").unlink()
    if generation:
        set_json(place / "generation_config.json", **generation)
    if other:
        content = json.loads((place / "tokenizer.json").read_text())
        for token in content["added_tokens"]:
            token["special"] = token["special"] and token["id"] != IM_END
        (place / "tokenizer.json").write_text(json.dumps(content))
    return str(place)


@pytest.fixture
def config(folder: str, tmp_path: Path) -> EvaluateConfig:
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps([{"instruction": "狗？"}, {"instruction": "今天天气很好？"}, {"instruction": "?"}]))
    return EvaluateConfig(
        models={"base": folder},
        output=str(tmp_path / "out"),
        prompts=[PromptsConfig(str(prompts), "zh")],
        max_new_tokens=10,
        batch_size=2,
    )


def test_the_language_is_that_of_the_answer(config: EvaluateConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_cpt.evaluation.report.draw_models", lambda *_: [])  # takes longer than all else
    page = Path(evaluate(config))
    found = json.loads(page.with_name("report.json").read_text())["models"]["base"]["answers"]["zh"]
    assert [pair["answer"] for pair in found["answers"]] == [ANSWER] * 3
    assert [pair["cut_off"] for pair in found["answers"]] == [False] * 3
    assert found["script"] == 1.0
    assert "cut off" not in page.read_text()


@pytest.mark.parametrize("folder", ["the template alone"], indirect=True)
def test_the_tool_and_its_judge_see_the_answer_alone(config: EvaluateConfig, folder: str, tmp_path: Path) -> None:
    """What the judge is sent, too."""
    another = tmp_path / "another"
    make_reciter(another, folder, [last_of_prompt(folder, "chatml", "?"), *tokens_of(folder, "fox"), IM_END, 20, 21])
    set_json(another / "tokenizer_config.json", chat_template=CHATML)
    with judge_server(lambda prompt: "[[A]]") as server:
        asked = {"path": config.prompts[0].path, "language": "zh"}
        fields = {
            "models": {"base": folder, "another": str(another)},
            "output": config.output,
            "prompts": [asked],
            "max_new_tokens": 10,
            "pairwise": {"prompts": [asked], "judge": {"url": server.url, "model": "wise"}},
        }
        done = run_tool("evaluate.py", "--config", write_yaml(tmp_path / "evaluate.yaml", fields))
        sent = [request["messages"][0]["content"] for request in server.requests]
    assert "| base    | 100.0%" in Path(done.stdout.strip()).read_text()
    answers = {prompt.split(f"[Answer of assistant {letter}]\n")[1].split("\n")[0] for prompt in sent for letter in "AB"}
    assert answers == {ANSWER, "fox"}


@pytest.mark.parametrize("folder", ["the template alone"], indirect=True)
def test_answers_that_reach_the_limit_are_counted(
    config: EvaluateConfig, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_cpt.evaluation.report.draw_models", lambda *_: [])
    judge = JudgeConfig(url="http://localhost:9/v1", model="none", timeout=0.1)
    pairwise = PairwiseConfig(judge, config.prompts)
    config = replace(config, max_new_tokens=2, models={"base": folder, "same": folder}, pairwise=pairwise)
    page = Path(evaluate(config)).read_text()  # the same answers need no judge
    assert "- base, %zh: 3 of 3 are cut off at max_new_tokens" in page
    assert "- same, answers, for the judge: 3 of 3 are cut off at max_new_tokens" in page


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TaskRegistry]:
    """With a task of free answers on local data."""
    place = tmp_path_factory.mktemp("tasks")
    data = place / "questions.jsonl"
    data.write_text('{"question": "狗？", "answer": "狗"}\n{"question": "？", "answer": "狗"}\n')
    write_yaml(
        place / "tiny_answers.yaml",
        {
            "task": "tiny_answers",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test",
            "output_type": "generate_until",
            "doc_to_text": "{{question}}",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": ["no such text"], "max_gen_toks": 10, "do_sample": False},
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        },
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_DATASETS_CACHE", str(place / "cache"))
        yield TaskRegistry(str(place), None)


# lm-eval generates as generation_config says beside the ends, as its own command does
@pytest.mark.parametrize("folder", ["the template alone", "plain text of the template"], indirect=True)
def test_benchmarks_through_the_template_are_scored_by_the_answer(folder: str, registry: TaskRegistry) -> None:
    """Where lm-eval would stop at the tokenizer's end of text and the task's own texts only."""
    harness = Harness(folder, registry, 1, True, "cpu")
    assert harness.score(Benchmark("Answers", "tiny_answers", "exact_match,none", 0), None, False, 1234).value == 1.0
