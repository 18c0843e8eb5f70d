"""The package's own tasks read the published formats, ask what they should, and score as the benchmarks define it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import published
import pytest
import sacrebleu
from fork_server import ENVIRONMENT, forked_python
from tiny_models import make_tiny_llama, write_yaml

from megatron_cpt.evaluation.harness import SUITES, TASKS, Benchmark, Harness, TaskRegistry
from megatron_cpt.evaluation.tasks import data, metrics
from megatron_cpt.utils.errors import InputError

OWN = {item.task: item for suite in SUITES.values() for item in suite if (TASKS / f"{item.task}.yaml").exists()}


@pytest.fixture
def data_folder(tmp_path: Path) -> str:
    return published.write_all(tmp_path / "data")


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without this, each look at the hub takes minutes of retries where there is no network."""
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def task_of(name: str, data_folder: str) -> Any:
    """As lm-eval builds it."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata={"data_folder": data_folder})
    return manager.load([name])["tasks"][name]


def test_all_tasks_are_in_a_suite() -> None:
    assert set(OWN) == {path.stem for path in TASKS.glob("*.yaml")}


@pytest.mark.parametrize(
    ("name", "rows", "text", "target"),
    [
        ("lcsts", 2, "文章：本文总结了十个可穿戴产品的设计原则", "可穿戴技术十大设计原则"),
        ("cluewsc2020", 2, "我把床搬到窗边，第二天发现它被雨淋湿了。\n上文中的“它”指的是“床”吗？\n回答：", 0),
        ("cmrc2018", 2, "阅读短文，用短文中的原话回答问题。\n短文：范廷颂是枢机。\n问题：问题0？\n答案：", "范廷颂"),
        ("drcd", 2, "閱讀短文，用短文中的原話回答問題。\n短文：范廷颂是枢机。\n問題：问题0？\n答案：", "枢機"),
        ("eprstmt", 2, "评论：外包装上有点磨损，试听后感觉不错\n这条评论的情感是", 0),
        ("belle_eval", 2, "问题：将这句话翻译成英语：今天天气很好。\n回答：", "The weather is nice today."),
        ("wmt22_zh_en", 2, "将中文翻译成英文。\n中文：今天天气很好。\n英文：", "The weather is nice today."),
        ("wmt22_en_zh", 2, "将英文翻译成中文。\n英文：The weather is nice today.\n中文：", "今天天气很好。"),
        ("humaneval_sandboxed", 1, "def add(a: int, b: int) -> int:\n", published.PROBLEM["test"] + "\ncheck(add)"),
    ],
)
def test_published_files_are_asked(name: str, rows: int, text: str, target: Any, data_folder: str) -> None:
    task = task_of(name, data_folder)
    doc = task.eval_docs[0]
    assert len(task.eval_docs) == rows
    assert task.doc_to_text(doc).startswith(text)
    assert task.doc_to_target(doc) == target


def test_examples_are_other_questions(data_folder: str) -> None:
    """From the file of examples; where there is none, a question is not among its own."""
    summaries = task_of("lcsts", data_folder)
    summaries.set_fewshot_seed(1)
    *examples, asked = summaries.fewshot_context(summaries.eval_docs[0], 2).split("\n\n")
    assert asked == f"文章：{published.SUMMARIES[0]['text']}\n摘要："
    pairs = [f"文章：{row['text']}\n摘要：{row['summary']}" for row in published.SUMMARIES]
    assert len(examples) == 2
    assert set(examples) <= set(pairs)
    news = task_of("wmt22_zh_en", data_folder)
    news.set_fewshot_seed(1)
    (first, second), (one, two) = published.CHINESE, published.ENGLISH
    prompt = "将中文翻译成英文。\n中文：{}\n英文：{}"
    assert news.fewshot_context(news.eval_docs[0], 1) == prompt.format(second, two) + "\n\n" + prompt.format(first, "")
    assert news.fewshot_context(news.eval_docs[1], 1) == prompt.format(first, one) + "\n\n" + prompt.format(second, "")


def test_choices_are_scored_by_likelihood(data_folder: str) -> None:
    for name, choices in (("cluewsc2020", ["是", "否"]), ("eprstmt", ["正面", "负面"])):
        task = task_of(name, data_folder)
        likelihoods = [(-1.0, False), (-2.0, False)]
        assert task.doc_to_choice(task.eval_docs[0]) == choices
        assert [task.process_results(doc, likelihoods)["acc"] for doc in task.eval_docs] == [1.0, 0.0]


def test_summaries_are_compared_by_characters(data_folder: str) -> None:
    task = task_of("lcsts", data_folder)
    doc = {"summary": "新地铁线开通"}
    assert task.process_results(doc, ["新 地铁线开通"]) == {"rouge1": 1.0, "rouge2": 1.0, "rougeL": 1.0}
    # 新, 线, 开, 通 of 6 and 5 characters in order; no pair of 新线开通了 but 线开 and 开通
    found = task.process_results(doc, ["新线开通了"])
    assert found == pytest.approx({"rouge1": 8 / 11, "rouge2": 2 * 2 / (5 + 4), "rougeL": 8 / 11})
    assert task.process_results(doc, [""]) == {"rouge1": 0.0, "rouge2": 0.0, "rougeL": 0.0}
    belle = task_of("belle_eval", data_folder)
    assert belle.process_results({"std_answer": "水是H2O。"}, ["水是h2o。"]) == {"rougeL": 1.0}


@pytest.mark.parametrize(
    ("prediction", "exact", "f1"),
    [
        ("范廷颂", 1.0, 1.0),
        ("《范廷颂》。", 1.0, 1.0),  # punctuation does not count
        ("是范廷颂", 0.0, 6 / 7),  # a run of 3 of 3 and 4 characters
        ("范廷颂枢机", 1.0, 1.0),  # the second answer
        ("范，颂", 0.0, 2 / 5),  # the longest run is of one character: 廷 is missing
        ("", 0.0, 0.0),
    ],
)
def test_extracted_answers(prediction: str, exact: float, f1: float, data_folder: str) -> None:
    for name in ("cmrc2018", "drcd"):
        found = task_of(name, data_folder).process_results({"answers": {"text": ["范廷颂", "范廷颂枢机"]}}, [prediction])
        assert found == pytest.approx({"exact_match": exact, "f1": f1})


def test_words_among_characters_are_segments() -> None:
    assert metrics.segments("获得CMRC 2018的Best-Paper。") == ["获", "得", "cmrc", "2018", "的", "bestpaper"]


def test_translations(data_folder: str) -> None:
    for name, references, tokenizer in (
        ("wmt22_zh_en", published.ENGLISH, "13a"),
        ("wmt22_en_zh", published.CHINESE, "zh"),
    ):
        task = task_of(name, data_folder)
        predictions = [references[0], references[1][:-4] + references[0][-1]]
        rows = [task.process_results(doc, [text]) for doc, text in zip(task.eval_docs, predictions, strict=True)]
        found = {metric: task.aggregation()[metric]([row[metric] for row in rows]) for metric in ("bleu", "chrf")}
        bleu = sacrebleu.corpus_bleu(predictions, [list(references)], tokenize=tokenizer).score
        assert found["bleu"] == pytest.approx(bleu / 100)
        assert found["chrf"] == pytest.approx(sacrebleu.corpus_chrf(predictions, [list(references)]).score / 100)
        assert 0 < found["bleu"] < 1


def test_programs_are_scored_in_the_sandbox(data_folder: str) -> None:
    task = task_of("humaneval_sandboxed", data_folder)
    doc = task.eval_docs[0]
    assert task.UNSAFE_CODE
    assert task.process_results(doc, [published.PROBLEM["canonical_solution"]]) == {"pass@1": 1.0}
    assert task.process_results(doc, ["    return a - b\n"]) == {"pass@1": 0.0}
    assert task.process_results(doc, ["    exit()\n"]) == {"pass@1": 0.0}


def test_humaneval_asks_as_lm_evals_does() -> None:
    import lm_eval.tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    theirs = load_yaml(Path(lm_eval.tasks.__file__).parent / "humaneval" / "humaneval.yaml", resolve_func=False)
    ours = load_yaml(TASKS / "humaneval_sandboxed.yaml", resolve_func=False)
    same = ("doc_to_text", "doc_to_target", "generation_kwargs", "output_type", "test_split", "num_fewshot", "repeats")
    assert {name: ours[name] for name in same} == {name: theirs[name] for name in same}
    assert data.HUMANEVAL.hub is not None
    assert data.HUMANEVAL.hub.path == theirs["dataset_path"]


def test_a_hub_dataset_is_read_like_the_files(monkeypatch: pytest.MonkeyPatch, data_folder: str) -> None:
    """Labels are numbers there."""
    import datasets

    rows = [row | {"label": ["true", "false"].index(str(row["label"]))} for row in published.PRONOUNS]
    hub = datasets.Dataset.from_list(rows).cast_column("label", datasets.ClassLabel(names=["true", "false"]))
    asked = []

    def load_dataset(path: str, name: str, split: str) -> datasets.Dataset:
        asked.append((path, name, split))
        return hub

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = data.cluewsc()
    assert asked == [("clue/clue", "cluewsc2020", "validation"), ("clue/clue", "cluewsc2020", "train")]
    assert found["test"][:2] == data.cluewsc(data_folder=data_folder)["test"][:]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("eprstmt/test_public.json", [{"sentence": "好"}], r"test_public\.json, row 1: label is None; expected a str"),
        ("eprstmt/test_public.json", '{"sentence": \n', r"test_public\.json, line 1 is not JSON"),
        ("eprstmt/test_public.json", [], r"test_public\.json has no rows"),
        (
            "cmrc2018/cmrc2018_dev.json",
            {"data": [{}]},
            r"cmrc2018_dev\.json is not in SQuAD's format: KeyError\('paragraphs'\)",
        ),
        ("wmt22/wmttest2022.zh-en.all.xml", "<dataset>", r"zh-en\.all\.xml is not as WMT22 has it"),
    ],
)
def test_broken_files(file: str, content: Any, message: str, data_folder: str) -> None:
    published.write(Path(data_folder, file), content)
    read = {"eprstmt": data.eprstmt, "cmrc2018": data.cmrc2018, "wmt22": lambda **names: data.wmt22("zh-en", **names)}
    with pytest.raises(InputError, match=message):
        read[file.split("/")[0]](data_folder=data_folder)


def test_a_missing_file_is_not_looked_for_elsewhere(data_folder: str) -> None:
    Path(data_folder, "lcsts", "valid.jsonl").unlink()
    with pytest.raises(InputError, match=r"lcsts/valid\.jsonl: no such file"):
        data.lcsts(data_folder=data_folder)
    with pytest.raises(InputError, match=r"there is no eprstmt/test_public\.json; expected: data_folder"):
        data.eprstmt()


def test_a_model_is_scored_on_all(tmp_path: Path, tiny_tokenizer_dir: str, data_folder: str) -> None:
    """With as many examples as the suites say."""
    model = make_tiny_llama(tmp_path / "hf", tiny_tokenizer_dir, max_position_embeddings=4096, num_hidden_layers=1)
    harness = Harness(model, TaskRegistry(None, data_folder), 1, False, "cpu")
    scores = {item.name: harness.score(item, 1, True, 1) for item in OWN.values()}
    assert {name: score.missing for name, score in scores.items() if score.missing} == {}
    for item in OWN.values():
        score = scores[item.name]
        assert (score.task, score.metric, score.num_fewshot) == (item.task, item.metric, item.num_fewshot)
        assert score.value is not None
        assert 0 <= score.value <= 1
        assert score.samples == 1
    assert set(scores["LCSTS"].others) == {"rouge1,none", "rouge2,none"}
    assert set(scores["CMRC"].others) == {"exact_match,none"}
    assert set(scores["WMT22 en-zh"].others) == {"chrf,none"}


def test_scores_are_lm_evals(model: str, data_folder: str, tmp_path: Path) -> None:
    """Its own command, with this package's folder of tasks."""
    benchmark = Benchmark("EPRSTMT", "eprstmt", "acc,none", 2)
    score = Harness(model, TaskRegistry(None, data_folder), 1, False, "cpu").score(benchmark, None, False, 1234)
    command = [forked_python("lm_eval"), "-m", "lm_eval", "run", "--model", "hf", "--tasks", "eprstmt"]
    command += ["--include_path", str(TASKS)]
    options = ["--model_args", f"pretrained={model}", "--device", "cpu", "--num_fewshot", "2", "--seed", "1234"]
    output = ["--metadata", json.dumps({"data_folder": data_folder}), "--output_path", str(tmp_path / "results")]
    done = subprocess.run([*command, *options, *output], capture_output=True, text=True, env=os.environ | ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(next((tmp_path / "results").rglob("results_*.json")).read_text())["results"]["eprstmt"]
    assert score.value == found["acc,none"]
    assert score.stderr == pytest.approx(found["acc_stderr,none"])
    assert (score.samples, score.num_fewshot) == (2, 2)


@pytest.mark.usefixtures("offline")
def test_without_data_nothing_is_scored(model: str, data_folder: str) -> None:
    Path(data_folder, "eprstmt", "test_public.json").write_text("{}\n")
    asked = [OWN["eprstmt"], OWN["lcsts"]]
    broken = Harness(model, TaskRegistry(None, data_folder), 1, False, "cpu").score(asked[0], 1, False, 1)
    assert "row 1: sentence is None" in str(broken.missing)
    harness = Harness(model, TaskRegistry(None, None), 1, False, "cpu")
    for item in asked:
        score = harness.score(item, 1, False, 1)
        assert score.value is None
        assert str(score.missing).startswith("its data cannot be had: "), item.name


def test_code_is_run_in_the_sandbox_only(model: str, data_folder: str) -> None:
    harness = Harness(model, TaskRegistry(None, data_folder), 1, False, "cpu")
    other = Benchmark("HumanEval", "humaneval", "pass@1,create_test", 0)
    found = harness.score(other, 1, True, 1)
    assert found.missing == "it runs code that the model has written in this very process; use humaneval_sandboxed"
    found = harness.score(OWN["humaneval_sandboxed"], 1, False, 1)
    assert found.missing == "it runs code that the model has written; use confirm_run_unsafe_code: true to let it"


@pytest.mark.parametrize(
    "fields",
    [
        {"group": "mixed", "task": ["eprstmt", "humaneval"]},
        {"group": "mixed", "task": [{"task": "mbpp", "num_fewshot": 0}]},
        {"group": "mixed", "task": [{"group": "inner", "task": ["code_of_ours"]}]},
        {"group": "mixed", "task": ["eprstmt", {"task": "humaneval", "unsafe_code": False}]},
        {"group": "mixed", "task": ["code"]},
    ],
)
def test_code_is_refused_within_groups_and_tags(fields: dict[str, Any], tmp_path: Path) -> None:
    """lm-eval's own executor would run it in this process: `confirm_run_unsafe_code` is for the sandbox only."""
    write_yaml(tmp_path / "mixed.yaml", fields | {"metadata": {"version": 1}})
    write_yaml(tmp_path / "inner.yaml", {"task": "code_of_ours", "tag": "code", "unsafe_code": True})
    registry = TaskRegistry(str(tmp_path), None)
    assert "runs code that the model has written in this very process" in str(registry.missing("mixed", True))
    assert registry.code_tasks("code") == ["code_of_ours"]
    assert registry.code_tasks("mmlu") == []


def test_a_group_of_the_sandboxed_task_needs_leave(tmp_path: Path, data_folder: str) -> None:
    write_yaml(tmp_path / "programs.yaml", {"group": "programs", "task": ["humaneval_sandboxed"]})
    registry = TaskRegistry(str(tmp_path), data_folder)
    assert (
        registry.missing("programs", False)
        == "it runs code that the model has written; use confirm_run_unsafe_code: true to let it"
    )
    assert registry.missing("programs", True) is None


def test_what_could_not_be_verified_is_named(model: str) -> None:
    absent = [item for item in SUITES["chat"] if item.absent is not None]
    assert {item.name for item in absent} >= {"SECEU", "TAPTAP"}
    for item in absent:
        score = Harness(model, TaskRegistry(None, None), 1, False, "cpu").score(item, 1, True, 1)
        assert (score.value, score.samples) == (None, 0)
        assert str(score.missing).startswith("there is no task of it")


def test_installed_packages_have_the_tasks(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", str(tmp_path)]
    done = subprocess.run(
        [*command, "build_py", "--build-lib", str(tmp_path / "lib")], cwd=TASKS.parents[2], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    built = tmp_path / "lib" / "megatron_cpt" / "evaluation" / "tasks"
    assert {path.name for path in built.glob("*.yaml")} == {path.name for path in TASKS.glob("*.yaml")}
    assert (built / "metrics.py").is_file()
