"""The wrapper's numbers are lm-eval's; bits per byte are what they are; what cannot be measured is said to be so."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fork_server import ENVIRONMENT, forked_python
from tiny_models import command_of, run_tool, write_yaml

from megatron_cpt.evaluation.bits_per_byte import text_loss
from megatron_cpt.evaluation.config import EvaluateConfig, PromptsConfig, TaskConfig, TextConfig
from megatron_cpt.evaluation.harness import SUITES, TASKS, Benchmark, Harness, Score, TaskRegistry, shots_of
from megatron_cpt.evaluation.report import evaluate
from megatron_cpt.evaluation.run import answers_to, questions_of
from megatron_cpt.evaluation.table import evaluation_markdown
from megatron_cpt.posttrain.turn_end import turn_end
from megatron_cpt.utils.errors import InputError

CHOICES = Benchmark("Choices", "tiny_choices", "acc,none", 1)


def test_scores_are_those_of_lm_evals_own_command(model: str, tasks: str, tmp_path: Path) -> None:
    score = Harness(model, TaskRegistry(tasks, None), 1, False, "cpu").score(CHOICES, None, False, 1234)
    command = [forked_python("lm_eval"), "-m", "lm_eval", "run", "--model", "hf", "--tasks", "tiny_choices"]
    command += ["--include_path", tasks]
    options = ["--model_args", f"pretrained={model}", "--device", "cpu", "--num_fewshot", "1", "--seed", "1234"]
    done = subprocess.run(
        [*command, *options, "--output_path", str(tmp_path / "results")],
        capture_output=True,
        text=True,
        env=os.environ | ENVIRONMENT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(next((tmp_path / "results").rglob("results_*.json")).read_text())["results"]["tiny_choices"]
    assert score.value == found["acc,none"]
    assert score.stderr == pytest.approx(found["acc_stderr,none"])
    assert score.samples == 5
    assert score.missing is None


def test_what_cannot_be_measured_is_not_scored(model: str, tasks: str) -> None:
    harness = Harness(model, TaskRegistry(tasks, None), 1, False, "cpu")
    lost = harness.score(Benchmark("Lost", "lost_choices", "acc,none", 3), 2, False, 1)
    assert lost.value is None
    assert str(lost.missing).startswith("its data cannot be had: ")
    assert (lost.task, lost.metric, lost.num_fewshot, lost.samples) == ("lost_choices", "acc,none", 3, 0)
    with pytest.raises(InputError, match="lm-eval has no task no_such_task"):
        harness.score(Benchmark("X", "no_such_task", "acc,none"), 2, False, 1)
    with pytest.raises(InputError, match=r"task tiny_choices has no metric f1,none; it has acc,none"):
        harness.score(replace(CHOICES, metric="f1,none"), 2, False, 1)


def test_without_a_template_there_is_no_chat(model: str, tasks: str) -> None:
    found = Harness(model, TaskRegistry(tasks, None), 1, True, "cpu").score(CHOICES, None, False, 1234)
    assert (found.value, found.missing) == (None, "the model has no chat template; use apply_chat_template: false")


def test_packages_that_are_not_there_are_told(model: str, tasks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import lm_eval
    import nltk

    def without_package(*_: Any) -> None:
        raise ImportError("No module named 'langdetect'")

    ifeval = Benchmark("IFEval", "ifeval", "prompt_level_strict_acc,none", 0)
    harness = Harness(model, TaskRegistry(tasks, None), 1, False, "cpu")
    monkeypatch.setattr(lm_eval.tasks, "get_task_dict", without_package)
    missing = harness.score(ifeval, 1, False, 1).missing
    assert missing == "a package that it uses is not installed: No module named 'langdetect'"
    monkeypatch.setattr(lm_eval.tasks, "get_task_dict", lambda *_: {})
    harness = Harness(model, TaskRegistry(tasks, None), 1, False, "cpu")  # a registry finds out once
    monkeypatch.setattr(nltk.data, "path", [])
    assert str(harness.score(ifeval, 1, False, 1).missing).startswith("nltk has no punkt_tab")


@pytest.mark.parametrize("suite", list(SUITES))
def test_suites_name_tasks_and_metrics_that_there_are(suite: str) -> None:
    from lm_eval.tasks import TaskManager

    known = TaskManager(include_path=str(TASKS)).task_index
    for item in SUITES[suite]:
        if item.absent is not None:
            continue
        assert item.metric in metrics_of(known[item.task].cfg), item
        assert item.num_fewshot is not None


def metrics_of(task: dict[str, Any]) -> list[str]:
    """With their filters, of a task or a group as its YAML has it."""
    if "aggregate_metric_list" in task:
        return [f"{metric['metric']},{metric.get('filter_list', 'none')}" for metric in task["aggregate_metric_list"]]
    filters = [chain["name"] for chain in task.get("filter_list", [{"name": "none"}])]
    return [f"{metric['metric']},{name}" for metric in task["metric_list"] for name in filters]


def test_suites_are_those_of_the_paper() -> None:
    assert [item.name for item in SUITES["cpt"]] == ["C-Eval", "LCSTS", "MMLU", "AGI-Eval", "BBH", "GSM8K", "HumanEval"]
    chat = "LCSTS,CLUEWSC,CMRC,DRCD,EPRSTMT,BelleEval,TriviaQA,WMT22 zh-en,WMT22 en-zh,CMMLU,IFEval"
    chat += ",SECEU,TAPTAP,BotChat's Turing test"  # named, with the reason why they are not measured
    assert [item.name for item in SUITES["chat"]] == chat.split(",")


def test_bits_per_byte_predict_every_token(model: str) -> None:
    """In windows that do not see each other."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    network, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    documents = ["The quick brown fox. " * 5, "公园散步。"]
    found = text_loss(network, tokenizer, documents, 16)
    nats = count = 0.0
    for document in documents:
        ids = tokenizer.encode(document, add_special_tokens=False)
        count += len(ids)
        for start in range(0, len(ids), 15):
            tokens = torch.tensor([[tokenizer.bos_token_id, *ids[start : start + 15]]])
            nats += network(tokens, labels=tokens).loss.item() * (tokens.shape[1] - 1)
    size = sum(len(document.encode()) for document in documents)
    assert (found.tokens, found.bytes) == (count, size)
    assert found.loss == pytest.approx(nats / count, rel=1e-5)
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    with pytest.raises(InputError, match="there is no text"):
        text_loss(network, tokenizer, [""], 16)


@pytest.fixture
def config(model: str, tasks: str, tmp_path: Path) -> EvaluateConfig:
    text, prompts = tmp_path / "text.jsonl", tmp_path / "prompts.json"
    text.write_text("".join(json.dumps({"text": f"The dog runs {i}."}) + "\n" for i in range(4)))
    prompts.write_text(json.dumps([{"instruction": f"狗 {i}？", "output": "好"} for i in range(4)]))
    return EvaluateConfig(
        models={"base": model, "same": model},
        output=str(tmp_path / "out"),
        tasks=[TaskConfig("Choices", "tiny_choices", "acc,none", 0), TaskConfig("Lost", "lost_choices", "acc,none")],
        tasks_folder=tasks,
        text=[TextConfig(str(text), "en", 3)],
        prompts=[PromptsConfig(str(prompts), "zh", 3)],
        max_new_tokens=8,
    )


def test_a_model_laid_over_all_devices_has_the_same_scores(config: EvaluateConfig, tmp_path: Path) -> None:
    """Here the CPU is all there is."""
    found, config = [], replace(config, models={"base": config.models["base"]}, prompts=[])
    for name, device_map in (("one", None), ("all", "auto")):
        evaluate(replace(config, output=str(tmp_path / name), device_map=device_map))  # type: ignore[arg-type]
        found.append(json.loads((tmp_path / name / "report.json").read_text()))
    assert found[0]["models"] == found[1]["models"]


def test_a_report_of_two_models(config: EvaluateConfig, capfd: pytest.CaptureFixture[str]) -> None:
    path = Path(evaluate(config))
    report = json.loads((path.parent / "report.json").read_text())
    base = report["models"]["base"]
    assert base == report["models"]["same"]
    assert len(base["answers"]["zh"]["answers"]) == 3
    assert base["text"]["en"]["bytes"] == 3 * len("The dog runs 0.")
    assert report["settings"]["tasks"][0]["num_fewshot"] == 0
    page = path.read_text()
    assert page.splitlines()[0].split("|")[1:4] == [" model ", " Choices      ", " Lost "]
    assert "| Choices   | tiny_choices | acc,none | 0        | 5         |" in page
    assert "| Lost      | lost_choices | acc,none | -        | 0         |" in page
    found = base["benchmarks"]["Choices"]
    assert (found["task"], found["metric"], found["num_fewshot"]) == ("tiny_choices", "acc,none", 0)
    assert "- Lost: not measured, its data cannot be had" in page
    assert "bits per byte, en" in page
    assert "%zh by script" in page
    said = capfd.readouterr().err
    assert "base: benchmarks" in said
    # What was measured is taken from the files, until something that it depends on changes
    evaluate(config)
    assert "base: benchmarks" not in capfd.readouterr().err
    evaluate(replace(config, limit=2))
    assert "base: benchmarks" in capfd.readouterr().err


def test_a_kill_loses_no_benchmark(config: EvaluateConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor a language, and what could not be measured is measured once its data is there."""
    first = TaskConfig("First", "tiny_choices", "acc,none", 0)
    config = replace(config, models={"base": config.models["base"]}, tasks=[first, replace(first, name="Second")])
    asked = []

    def until_second(self: Harness, benchmark: Benchmark, *rest: Any) -> Score:
        asked.append(benchmark.name)
        if benchmark.name == "Second" and asked.count("Second") == 1:
            raise KeyboardInterrupt
        return Score("tiny_choices", "acc,none", 0, 0.5, None, 5, None, {})

    monkeypatch.setattr(Harness, "score", until_second)
    with pytest.raises(KeyboardInterrupt):
        evaluate(config)
    assert kept_benchmarks(config) == ["First"]
    evaluate(config)
    assert asked == ["First", "Second", "Second"]


def kept_benchmarks(config: EvaluateConfig) -> list[str]:
    path = Path(config.output, "base.json")
    return list(json.loads(path.read_text())["parts"].get("benchmarks", {})) if path.exists() else []


GATE = """
import os, time

def wait(rows):
    end = time.monotonic() + 600
    while os.path.exists({closed!r}) and time.monotonic() < end:
        time.sleep(0.05)
    return rows
"""


def test_a_kill_that_nothing_can_catch(config: EvaluateConfig, tasks: str, tmp_path: Path) -> None:
    """SIGKILL within the second benchmark: the first and the texts are not measured again, the report is the same."""
    closed = tmp_path / "closed"
    closed.touch()
    Path(tasks, "gate.py").write_text(GATE.format(closed=str(closed)))
    fields = "include: tiny_choices.yaml\ntask: gated_choices\nprocess_docs: !function gate.wait\n"
    Path(tasks, "gated_choices.yaml").write_text(fields)
    gated = TaskConfig("Gated", "gated_choices", "acc,none", 0)
    config = replace(config, models={"base": config.models["base"]}, tasks=[config.tasks[0], gated])
    path = write_yaml(tmp_path / "evaluate.yaml", json.loads(json.dumps(asdict(config))))
    command = [*command_of("evaluate.py"), "--config", path]
    killed = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | ENVIRONMENT)
    end = time.monotonic() + 600
    while kept_benchmarks(config) != ["Choices"] and killed.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    killed.kill()
    _, said = killed.communicate()
    assert killed.returncode == -signal.SIGKILL, said[-3000:]
    assert kept_benchmarks(config) == ["Choices"]
    half = Path(config.output, "base.json.tmp")
    half.write_text('{"identity": {')  # as a kill within the writing leaves it
    closed.unlink()
    again = run_tool("evaluate.py", "--config", path)
    assert [line for line in again.stderr.splitlines() if line.startswith("base: ")] == ["base: benchmarks: Gated"]
    undisturbed = replace(config, output=str(tmp_path / "undisturbed"))
    page = Path(evaluate(undisturbed))
    assert Path(config.output, "report.md").read_text() == page.read_text()
    reports = [json.loads(Path(folder, "report.json").read_text()) for folder in (config.output, undisturbed.output)]
    assert reports[0]["models"] == reports[1]["models"]
    assert sorted(os.listdir(config.output)) == sorted(os.listdir(undisturbed.output))


def test_what_is_new_is_measured_alone(
    config: EvaluateConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A benchmark, a text, data that have changed; what is not wanted for a while stays."""
    score = Score("tiny_choices", "acc,none", 0, 0.5, None, 5, None, {})
    monkeypatch.setattr(Harness, "score", lambda *_: score)
    monkeypatch.setattr("megatron_cpt.evaluation.report.draw_models", lambda *_: [])  # takes longer than all else

    def measured(config: EvaluateConfig) -> list[str]:
        evaluate(config)
        said = capfd.readouterr().err.splitlines()
        return [line.removeprefix("base: ") for line in said if line.startswith("base: ")]

    config = replace(config, models={"base": config.models["base"]}, tasks=config.tasks[:1])
    assert measured(config) == ["text: en", "answers: zh", "benchmarks: Choices"]
    more = replace(config, tasks=[replace(config.tasks[0], name="More", num_fewshot=1), *config.tasks])
    assert measured(more) == ["benchmarks: More"]
    more = replace(more, text=[*more.text, replace(more.text[0], language="fr")])
    assert measured(more) == ["text: fr"]
    assert measured(config) == []
    report = json.loads(Path(config.output, "report.json").read_text())["models"]["base"]
    assert (list(report["text"]), list(report["benchmarks"])) == (["en"], ["Choices"])
    (tmp_path / "choices.jsonl").write_text((tmp_path / "choices.jsonl").read_text() + "\n")
    assert measured(config) == ["benchmarks: Choices"]
    (tmp_path / "prompts.json").write_text('[{"instruction": "?"}]')
    assert measured(config) == ["answers: zh"]
    assert measured(more) == ["benchmarks: More"]  # of the data before
    assert measured(more) == []
    report = json.loads(Path(config.output, "report.json").read_text())["models"]["base"]
    assert list(report["benchmarks"]) == ["More", "Choices"]


def test_data_that_has_come_is_measured(config: EvaluateConfig, tmp_path: Path) -> None:
    config = replace(config, models={"base": config.models["base"]}, text=[], prompts=[], tasks=config.tasks[::-1])
    assert "- Lost: not measured" in Path(evaluate(config)).read_text()
    (tmp_path / "nowhere.jsonl").write_text((tmp_path / "choices.jsonl").read_text())
    page = Path(evaluate(config)).read_text()
    assert "not measured" not in page
    assert page.startswith("| model | Lost")


@pytest.mark.parametrize("content", ["", "[]", '{"parts": {}'])
def test_damaged_measurements_are_named(config: EvaluateConfig, content: str) -> None:
    Path(config.output).mkdir()
    Path(config.output, "base.json").write_text(content)
    with pytest.raises(InputError, match=r"base\.json is damaged"):
        evaluate(replace(config, tasks=[]))


def test_a_damaged_model_is_named(config: EvaluateConfig, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(config.models["base"], damaged)
    (damaged / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(InputError, match=r"model\.safetensors has 100 bytes and no whole header"):
        evaluate(replace(config, models={"base": str(damaged)}, tasks=[]))
    assert not Path(config.output).exists()  # nothing was measured


def test_an_adapter_beside_merged_weights_is_not_applied_again(
    config: EvaluateConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """In any of the measures; the adapter changes the model much."""
    import peft
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr("megatron_cpt.evaluation.report.draw_models", lambda *_: [])
    base, merged = config.models["base"], tmp_path / "merged"
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.constant_(parameter, 0.5)
    shutil.copytree(base, merged)
    model.save_pretrained(tmp_path / "adapter")
    for path in (tmp_path / "adapter").glob("adapter_*"):
        shutil.copy(path, merged)
    page = evaluate(replace(config, models={"base": base, "merged": str(merged)}, tasks=config.tasks[:1]))
    found = json.loads(Path(page).with_name("report.json").read_text())["models"]
    assert found["merged"] == found["base"]
    assert "merged: its weights are used as they are; adapter_config.json beside them" in capfd.readouterr().err


def test_names_that_come_twice_are_refused(config: EvaluateConfig) -> None:
    with pytest.raises(InputError, match="have the name Choices 2 times"):
        evaluate(replace(config, tasks=[*config.tasks, config.tasks[0]]))
    with pytest.raises(InputError, match="lm-eval has no task nothing"):
        evaluate(replace(config, tasks=[*config.tasks, TaskConfig("X", "nothing", "acc,none")]))
    assert not Path(config.output).exists()  # nothing is measured before


def test_answers_do_not_depend_on_the_batch(model: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    network, tokenizer = AutoModelForCausalLM.from_pretrained(model).eval(), AutoTokenizer.from_pretrained(model)
    prompts = ["The dog", "狗在公园里散步，今天天气很好", "A"]
    end = turn_end(tokenizer, network.generation_config)
    alone = [answers_to(network, tokenizer, [prompt], 12, end)[0] for prompt in prompts]
    assert answers_to(network, tokenizer, prompts, 12, end) == alone
    ids = tokenizer(prompts[1], return_tensors="pt")
    output = network.generate(**ids, max_new_tokens=12, do_sample=False)
    assert alone[1].text == tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def test_a_question_and_its_answer_have_to_fit(model: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    network, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    end = turn_end(tokenizer, network.generation_config)
    said = r"prompt 'x+' has \d+ tokens, and max_new_tokens is 12; expected"
    with pytest.raises(InputError, match=said):
        answers_to(network, tokenizer, ["The dog", "x" * network.config.max_position_embeddings], 12, end)


def test_questions_of_one_language_are_put_together(config: EvaluateConfig) -> None:
    config = replace(config, models={"base": config.models["base"]}, text=[], tasks=[])
    config = replace(config, prompts=[*config.prompts, replace(config.prompts[0], max_prompts=1)])
    report = json.loads(Path(evaluate(config)).with_name("report.json").read_text())
    assert len(report["models"]["base"]["answers"]["zh"]["answers"]) == 4


def test_the_tool(config: EvaluateConfig, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"models": config.models, "output": config.output, "text": [vars(config.text[0])]}
    votes = tmp_path / "votes.jsonl"
    votes.write_text('{"question": "1", "model_a": "same", "model_b": "base", "vote": "a", "annotator": "ann"}\n')
    fields |= {"pairwise": {"judge": {"votes": str(votes)}, "pairs": [["same", "base"]]}}
    fields["ablation"] = [{"model": "same", "cpt": True, "additional_data": True}]
    path = write_yaml(tmp_path / "evaluate.yaml", fields)
    result = run_tool("evaluate.py", "--config", path)
    page = Path(result.stdout.strip()).read_text()
    assert "| same  | base    | 1    | 0    | 0      | 100.0% (" in page
    assert "| with | with            | same  |" in page
    assert result.stdout.strip() == str(Path(config.output) / "report.md")
    wrong = run_tool("evaluate.py", "--config", path, "--models", '{"base": "nowhere", "same": "nowhere"}', check=False)
    assert wrong.returncode == 2
    assert "models.base is nowhere, which has no config.json" in wrong.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": {}}, "models is {}"),
        ({"models": {"a/b": "x"}}, "models has the name 'a/b'"),
        ({"tasks": [], "text": [], "prompts": []}, "expected something to measure"),
        (
            {"models": {"a|b": "x"}},
            r"models has the name 'a\|b'; expected one that can be the name of a file",
        ),
        ({"limit": 0}, "limit is 0"),
    ],
)
def test_wrong_configurations(config: EvaluateConfig, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(config, **changes)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TextConfig("t.jsonl", "en", 0), "max_documents is 0"),
        (lambda: TextConfig("t.jsonl", ""), "language is ''"),
        (lambda: PromptsConfig("q.jsonl", "zh", 0), "max_prompts is 0"),
        (lambda: PromptsConfig("q.jsonl", "Chinese"), "language is 'Chinese'; expected zh"),
    ],
)
def test_wrong_files(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def test_files_without_text_or_questions(config: EvaluateConfig, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"txt": "a"}\n')
    with pytest.raises(InputError, match=r"bad\.jsonl, row 1 has no text"):
        evaluate(replace(config, text=[TextConfig(str(tmp_path / "bad.jsonl"), "en")]))
    with pytest.raises(InputError, match=r"bad\.jsonl, row 1: it has no messages"):
        evaluate(replace(config, prompts=[PromptsConfig(str(tmp_path / "bad.jsonl"), "en")]))
    (tmp_path / "empty.json").write_text("[]")
    with pytest.raises(InputError, match=r"empty\.json holds no text"):
        evaluate(replace(config, text=[TextConfig(str(tmp_path / "empty.json"), "en")]))
    with pytest.raises(InputError, match=r"empty\.json holds no question"):
        evaluate(replace(config, prompts=[PromptsConfig(str(tmp_path / "empty.json"), "en")]))
    assert not Path(config.output).exists()  # nothing is measured before


def test_questions_need_no_answers(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    asked = [{"role": "user", "content": "c"}]
    rows = [
        {"instruction": "a"},
        {"prompt": "b"},
        {"messages": asked},
        {"messages": [*asked, {"role": "assistant", "content": "x"}]},
        {"prompt": "d", "chosen": "x", "rejected": "y"},
        {"prompt": "e", "chosen": "x", "rejected": "y", "weight": 0},  # what is learned of a row is nothing to the question
        {"messages": [*asked, {"role": "assistant", "content": "x", "weight": 0.5, "mask": "no"}], "train": "no"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert questions_of(PromptsConfig(str(path), "en")) == ["a", "b", "c", "c", "d", "e", "c"]


@pytest.mark.parametrize("file", ["text.jsonl", "model/tokenizer_config.json"])
def test_changed_files_are_measured_anew(
    config: EvaluateConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str], file: str
) -> None:
    shutil.copytree(config.models["base"], tmp_path / "model")
    config = replace(config, models={"base": str(tmp_path / "model")}, tasks=[], prompts=[])
    evaluate(config)
    evaluate(config)
    assert capfd.readouterr().err.count("base: text: en") == 1
    (tmp_path / file).write_bytes((tmp_path / file).read_bytes() + b"\n")
    evaluate(config)
    assert "base: text: en" in capfd.readouterr().err


def test_a_table_says_why_there_is_no_share() -> None:
    share = {"script": None, "identified": None, "tokens": 0, "missing": "none of the 3 answers has a letter"}
    assert "| base  | -             | -                     |\n\n- base, %zh: none of the 3 answers" in evaluation_markdown(
        {"base": {"answers": {"zh": share}}}
    )


def test_a_table_shows_what_is_missing() -> None:
    asked = {"task": "mmlu", "metric": "acc,none", "num_fewshot": 5}
    score = asked | {"value": 0.5, "stderr": 0.01, "samples": 3, "missing": None}
    lost = asked | {"task": "ceval-valid", "value": None, "stderr": None, "samples": 0, "missing": "its data cannot be had"}
    text = evaluation_markdown(
        {
            "CPT": {"benchmarks": {"MMLU": score, "C-Eval": lost}},
            "base": {"benchmarks": {"MMLU": score | {"value": None, "samples": 0}}},
        }
    )
    assert "| CPT   | 50.00 ± 1.0 | -      |" in text
    assert "| base  | -           | -      |" in text
    assert "| MMLU      | mmlu        | acc,none | 5        | 3         |" in text
    assert "| C-Eval    | ceval-valid | acc,none | 5        | 0         |" in text
    assert text.count("C-Eval: not measured, its data cannot be had") == 1


def test_examples_are_counted_as_they_were_given() -> None:
    """A task that fixes their number keeps to it; parts of a benchmark may differ."""
    assert shots_of({"n-shot": {"a": 3, "b": 3}}) == 3
    assert shots_of({"n-shot": {"a": 3, "b": 0}}) is None


@pytest.mark.parametrize(
    ("chat_template", "said"),
    [("{{ raise_exception('no questions') }}", "refuses it: no questions"), ("{# nothing #}", "makes nothing of it")],
)
def test_a_template_that_does_not_ask(model: str, tmp_path: Path, chat_template: str, said: str) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    (folder / "chat_template.jinja").write_text(chat_template)
    (tmp_path / "q.jsonl").write_text('{"instruction": "How are you?"}\n')
    prompts = [PromptsConfig(str(tmp_path / "q.jsonl"), "en")]
    config = EvaluateConfig(str(tmp_path / "out"), {"a": str(folder)}, prompts=prompts)
    with pytest.raises(InputError, match=f"{folder}: the chat template {said} .asked: 'How are you"):
        evaluate(config)
