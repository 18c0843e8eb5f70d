"""Every setting of evaluate.py, read from a YAML by the tool, arrives where it acts; one without a row here is an error.

lm-eval, OpenAI's client and the models are stand-ins that write down what they are given.
"""

from __future__ import annotations

import io
import json
import shutil
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import pytest
import transformers
from every_setting import settings_of
from tiny_models import write_empty_weights, write_yaml

from megatron_cpt.config.cli import run_tool
from megatron_cpt.convert.vocabulary import load_hf_tokenizer
from megatron_cpt.evaluation import judge, report, run, trajectory
from megatron_cpt.evaluation.bits_per_byte import TextLoss
from megatron_cpt.evaluation.config import EvaluateConfig
from megatron_cpt.evaluation.harness import SUITES
from megatron_cpt.evaluation.language_share import LanguageShare
from megatron_cpt.evaluation.report import evaluate

# setting -> what `Seen` has of it when it was set to something else than its default (see `settings`)
ROWS: dict[str, tuple[str, Any]] = {
    "output": ("output", "OUT"),
    "models": ("folders", {"one", "two"}),
    "suite": ("benchmarks", [item.name for item in SUITES["chat"]]),
    "tasks.name": ("own_benchmark", "Own"),
    "tasks.task": ("asked.tasks", ["own_task"]),
    "tasks.metric": ("own_metric", "f1,none"),
    "tasks.num_fewshot": ("asked.num_fewshot", 3),
    "tasks_folder": ("registry.tasks", "TASKS"),
    "data_folder": ("registry.data_folder", "DATA"),
    "text.path": ("documents", ["text 0", "text 1"]),
    "text.language": ("text_languages", ["fr"]),
    "text.max_documents": ("documents", ["text 0", "text 1"]),
    "prompts.path": ("questions", ["own 0", "own 1"]),
    "prompts.language": ("answer_languages", ["de"]),
    "prompts.max_prompts": ("questions", ["own 0", "own 1"]),
    "pairwise.judge.url": ("client.base_url", "http://judge/v1"),
    "pairwise.judge.model": ("judging.model", "wise"),
    "pairwise.judge.api_key_env": ("client.api_key", "secret"),
    "pairwise.judge.prompt": ("judging.text", "OWN PROMPT"),
    "pairwise.judge.parallel": ("parallel", 9),
    "pairwise.judge.timeout": ("client.timeout", 7.5),
    "pairwise.judge.votes": ("voted", (1, 0)),
    "pairwise.prompts.path": ("judged_questions", ["pair 0", "pair 1", "pair 2"]),
    "pairwise.prompts.language": ("pair_language", "ja"),
    "pairwise.prompts.max_prompts": ("judged_questions", ["pair 0", "pair 1", "pair 2"]),
    "pairwise.pairs": ("pairs", [("one", "two")]),
    "ablation.model": ("ablation_row", "| with | with            | two"),
    "ablation.cpt": ("ablation_row", "| with | with            | two"),
    "ablation.additional_data": ("ablation_row", "| with | with            | two"),
    "trajectory.run": ("trajectory.run", "RUN"),
    "trajectory.every": ("trajectory.every", 4),
    "trajectory.checkpoints.iteration": ("points", [(12, 345)]),
    "trajectory.checkpoints.tokens": ("points", [(12, 345)]),
    "trajectory.checkpoints.model": ("along", "two"),
    "apply_chat_template": ("asked.chat", (True, True)),
    "chat_template": ("marked", True),
    "limit": ("asked.limit", 11),
    "max_new_tokens": ("max_new_tokens", 77),
    "max_length": ("window", 99),
    "batch_size": ("batches", (2, 2)),
    "device_map": ("spread", ("auto", True)),
    "confirm_run_unsafe_code": ("code", (True, True)),
    "seed": ("seeds", [5] * 4),
}


@dataclass
class Seen:
    """What stand-ins were given."""

    found: dict[str, Any] = field(default_factory=dict)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def settings(folder: Path) -> dict[str, Any]:
    """All of them, none as it is by default."""
    text = write_rows(folder / "text.jsonl", [{"text": f"text {i}"} for i in range(4)])
    own = write_rows(folder / "own.jsonl", [{"instruction": f"own {i}"} for i in range(4)])
    pair = write_rows(folder / "pair.jsonl", [{"instruction": f"pair {i}"} for i in range(5)])
    (folder / "judge.txt").write_text("OWN PROMPT {question} {answer_a} {answer_b}")
    for name in ("TASKS", "DATA", "RUN"):
        (folder / name).mkdir()
    endpoint = {"url": "http://judge/v1", "model": "wise", "api_key_env": "OWN_KEY", "parallel": 9, "timeout": 7.5}
    return {
        "output": str(folder / "OUT"),
        "models": {name: str(folder / name) for name in ("one", "two")},
        "suite": "chat",
        "tasks": [{"name": "Own", "task": "own_task", "metric": "f1,none", "num_fewshot": 3}],
        "tasks_folder": str(folder / "TASKS"),
        "data_folder": str(folder / "DATA"),
        "text": [{"path": text, "language": "fr", "max_documents": 2}],
        "prompts": [{"path": own, "language": "de", "max_prompts": 2}],
        "pairwise": {
            "judge": endpoint | {"prompt": str(folder / "judge.txt")},
            "prompts": [{"path": pair, "language": "ja", "max_prompts": 3}],
            "pairs": [["one", "two"]],
        },
        "ablation": [{"model": "two", "cpt": True, "additional_data": True}],
        "trajectory": {
            "run": str(folder / "RUN"),
            "every": 4,
            "checkpoints": [{"iteration": 12, "model": str(folder / "two"), "tokens": 345}],
        },
        "apply_chat_template": True,
        "chat_template": "chatml",
        "limit": 11,
        "max_new_tokens": 77,
        "max_length": 99,
        "batch_size": 2,
        "device_map": "auto",
        "confirm_run_unsafe_code": True,
        "seed": 5,
    }


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory, chat_tokenizer_dir: str) -> dict[str, Any]:
    """What came of one run of the tool with everything set, and of one with votes in the place of a judge."""
    folder = tmp_path_factory.mktemp("settings")
    for name in ("one", "two"):
        shutil.copytree(chat_tokenizer_dir, folder / name)
        (folder / name / "config.json").write_text('{"model_type": "llama"}')
        write_empty_weights(folder / name)
    fields, found = settings(folder), Seen().found
    with pytest.MonkeyPatch.context() as patch:
        stand_in(patch, found)
        said = io.StringIO()
        with redirect_stdout(said):
            run_tool(evaluate, EvaluateConfig, "", ["--config", write_yaml(folder / "evaluate.yaml", fields)])
        page = Path(said.getvalue().strip())
        written = json.loads((page.parent / "report.json").read_text())
        votes = write_rows(
            folder / "votes.jsonl",
            [{"question": "1", "model_a": "one", "model_b": "two", "vote": "a", "annotator": "ann"}],
        )
        people = {"models": fields["models"], "output": str(folder / "people"), "pairwise": {"judge": {"votes": votes}}}
        run_tool(evaluate, EvaluateConfig, "", ["--config", write_yaml(folder / "people.yaml", people)])
    voted = json.loads((folder / "people" / "report.json").read_text())["pairwise"][0]
    measured = written["models"]["one"]
    benchmarks = list(measured["benchmarks"])
    along = json.loads((page.parent / "trajectory.json").read_text())["checkpoints"]
    return (
        found
        | {
            "output": page.parent.name,
            "benchmarks": benchmarks[:-1],
            "own_benchmark": benchmarks[-1],
            "own_metric": measured["benchmarks"]["Own"]["metric"],
            "text_languages": list(measured["text"]),
            "answer_languages": list(measured["answers"]),
            "questions": [pair["question"] for pair in measured["answers"]["de"]["answers"]],
            "judged_questions": [pair["question"] for pair in measured["pairwise"]["answers"]],
            "pair_language": written["settings"]["pairwise"]["prompts"][0]["language"],  # it acts nowhere else
            "pairs": [(item["model"], item["against"]) for item in written["pairwise"]],
            "ablation_row": next(line for line in page.read_text().splitlines() if "| with" in line).rstrip("| ")[:30],
            "points": [(point["iteration"], point["tokens"]) for point in along],
            "voted": (voted["losses"], voted["wins"]),
        }
    )


def stand_in(patch: pytest.MonkeyPatch, found: dict[str, Any]) -> None:
    """Replace what measures, judges and generates."""
    found["folders"] = set()

    def load_model(folder: str, device_map: Any, **_: Any) -> Any:
        found["folders"].add(Path(folder).name)
        found["device_map"] = device_map
        limits = SimpleNamespace(max_position_embeddings=4096)
        model = SimpleNamespace(config=limits, generation_config=None, name=Path(folder).name)
        model.eval, model.named_parameters = lambda: model, dict
        return model, {"missing_keys": [], "mismatched_keys": []}

    def text_loss(model: Any, tokenizer: Any, documents: list[str], window: int) -> TextLoss:
        found.update(documents=documents, window=window)
        return TextLoss(1.0, 1.0, 1, 1)

    def answers_to(model: Any, tokenizer: Any, prompts: list[str], max_new_tokens: int, end: Any) -> list[run.Answer]:
        found["max_new_tokens"] = max_new_tokens
        found["marked"] = all(prompt.startswith("<|im_start|>user") for prompt in prompts)
        found["batch"] = max(found.get("batch", 0), len(prompts))
        return [run.Answer(f"{model.name} says {prompt}", False) for prompt in prompts]

    class TaskRegistry:
        def __init__(self, tasks: str, data_folder: str) -> None:
            found.update({"registry.tasks": Path(tasks).name, "registry.data_folder": Path(data_folder).name})
            self.manager = SimpleNamespace(task_index={})

        def check(self, benchmark: Any) -> None: ...

        def missing(self, task: str, allow_code: bool) -> None:
            found["missing.allow_code"] = allow_code

        def code_tasks(self, task: str) -> list[str]:
            return [task]

    class HFLM:
        def __init__(self, **options: Any) -> None:
            found["lm"] = options
            self.tokenizer = load_hf_tokenizer(options["pretrained"])
            self.tokenizer.chat_template = "{{ messages }}"
            self.model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=0, stop_strings=None))

    def simple_evaluate(tasks: list[str], num_fewshot: int | None, **asked: Any) -> dict[str, Any]:
        metrics = {item.metric: 0.5 for item in SUITES["chat"] if item.task == tasks[0]} or {"f1,none": 0.5, "acc,none": 0.1}
        if tasks == ["own_task"]:
            found.update({"asked.tasks": tasks, "asked.num_fewshot": num_fewshot, "asked.limit": asked["limit"]})
            found["asked.chat"] = (asked["apply_chat_template"], asked["fewshot_as_multiturn"])
            found["seeds"] = [value for name, value in asked.items() if name.endswith("_seed")]
            found["code"] = (asked["confirm_run_unsafe_code"], found["missing.allow_code"])
            found["batches"] = (found["lm"]["batch_size"], found["batch"])
            found["spread"] = (found["device_map"], found["lm"]["parallelize"])
        return {"results": {tasks[0]: metrics}, "n-shot": {tasks[0]: num_fewshot}}

    class Client:
        def __init__(self, **options: Any) -> None:
            found.update({f"client.{name}": value for name, value in options.items()})
            self.chat = SimpleNamespace(completions=self)

        def create(self, model: str, messages: list[dict[str, str]], temperature: float) -> Any:
            found.update({"judging.model": model, "judging.text": messages[0]["content"][:10]})
            return SimpleNamespace(choices=[SimpleNamespace(message=SimpleNamespace(content="[[A]]"))])

    pool = judge.ThreadPoolExecutor
    measure_along = trajectory.measure_model

    def along(config: Any, registry: Any, parts: Any, name: str, path: str, model: dict[str, Any], opened: Any) -> Any:
        found["along"] = Path(model["folder"]).name
        return measure_along(config, registry, parts, name, path, model, opened)

    def checkpoints_of(run_folder: str, every: int) -> dict[int, str]:
        found.update({"trajectory.run": Path(run_folder).name, "trajectory.every": every})
        return {}

    patch.setenv("OWN_KEY", "secret")
    patch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load_model)
    patch.setattr(run, "text_loss", text_loss)
    patch.setattr(run, "answers_to", answers_to)
    patch.setattr(run, "language_share", lambda *_: LanguageShare(1.0, 1.0, 1))
    patch.setattr(report, "TaskRegistry", TaskRegistry)
    patch.setattr(report, "draw_models", lambda *_: [])
    patch.setattr(report.figures, "trajectory", lambda *_: None)
    patch.setattr(report.figures, "save_figure", lambda *_: None)
    patch.setattr(judge, "ThreadPoolExecutor", lambda number: found.update(parallel=number) or pool(number))
    patch.setattr(openai, "OpenAI", Client)
    patch.setattr(trajectory, "checkpoints_of", checkpoints_of)
    patch.setattr(trajectory, "measure_model", along)
    modules = {"lm_eval": SimpleNamespace(simple_evaluate=simple_evaluate), "lm_eval.models": SimpleNamespace()}
    for name, module in (modules | {"lm_eval.models.huggingface": SimpleNamespace(HFLM=HFLM)}).items():
        patch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("setting", sorted(settings_of(EvaluateConfig)))
def test_a_setting_arrives(setting: str, seen: dict[str, Any]) -> None:
    name, expected = ROWS[setting]
    assert seen[name] == expected
