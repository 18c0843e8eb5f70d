"""Benchmarks of lm-evaluation-harness. A task whose data cannot be had is reported as such, never scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_cpt.errors import InputError
from megatron_cpt.evaluation.sandbox import require_sandbox

TASKS = Path(__file__).with_name("tasks")  # of benchmarks that lm-eval lacks


@dataclass(frozen=True)
class Benchmark:
    """One task of a suite.

    Attributes:
        name: as the paper has it
        task: lm-eval's, or one of a folder of tasks
        metric: of it, as lm-eval names it, with its filter: "acc,none"
        num_fewshot: examples before each question; None: the task's own
    """

    name: str
    task: str
    metric: str
    num_fewshot: int | None = None


@dataclass(frozen=True)
class Score:
    """What became of a benchmark: a value with its standard error, or why there is none.

    Attributes:
        num_fewshot: that were given; None: not the same for all parts of the benchmark, or not known without its data
        others: further metrics of the task, by lm-eval's names
    """

    task: str
    metric: str
    num_fewshot: int | None
    value: float | None
    stderr: float | None
    samples: int
    missing: str | None
    others: dict[str, float]


# The paper's tables name the benchmarks. The settings are those that are usual for them, and for those that lm-eval lacks,
# ours: examples show a base model what an answer looks like, a chat model is told.
CPT = (
    Benchmark("C-Eval", "ceval-valid", "acc,none", 5),
    Benchmark("LCSTS", "lcsts", "rougeL,none", 5),
    Benchmark("MMLU", "mmlu", "acc,none", 5),
    Benchmark("AGI-Eval", "agieval_en", "acc,none", 0),
    Benchmark("BBH", "bbh_cot_fewshot", "exact_match,get-answer", 3),
    Benchmark("GSM8K", "gsm8k", "exact_match,strict-match", 5),
    Benchmark("HumanEval", "humaneval_sandboxed", "pass@1,none", 0),
)
CHAT = (
    Benchmark("LCSTS", "lcsts", "rougeL,none", 0),
    Benchmark("CLUEWSC", "cluewsc2020", "acc,none", 5),
    Benchmark("CMRC", "cmrc2018", "f1,none", 1),
    Benchmark("DRCD", "drcd", "f1,none", 1),
    Benchmark("EPRSTMT", "eprstmt", "acc,none", 5),
    Benchmark("BelleEval", "belle_eval", "rougeL,none", 0),
    Benchmark("TriviaQA", "triviaqa", "exact_match,remove_whitespace", 5),
    Benchmark("WMT22 zh-en", "wmt22_zh_en", "bleu,none", 0),
    Benchmark("WMT22 en-zh", "wmt22_en_zh", "bleu,none", 0),
    Benchmark("CMMLU", "cmmlu", "acc,none", 5),
    Benchmark("IFEval", "ifeval", "prompt_level_strict_acc,none", 0),
)
SUITES = {"cpt": CPT, "chat": CHAT}


class Harness:
    """lm-eval on one model."""

    def __init__(
        self,
        model: str,
        tasks: str | None,
        data_folder: str | None,
        batch_size: int,
        chat: bool,
        device: str,
        spread: bool = False,
    ) -> None:
        """Load the model.

        Args:
            tasks: folder with task YAMLs beside lm-eval's own and this package's
            data_folder: with data of this package's tasks; None: they are taken from the Hugging Face hub
            device: of the model, such as cpu
            spread: its layers are laid over all GPUs instead

        Raises:
            InputError: lm-eval is not installed
        """
        try:
            from lm_eval.models.huggingface import HFLM
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise InputError("benchmarks need lm-eval; wanted: pip install 'megatron-cpt[eval]'") from error
        self._lm = HFLM(pretrained=model, batch_size=batch_size, device=device, parallelize=spread, trust_remote_code=False)
        folders = [str(TASKS), *([tasks] if tasks is not None else [])]
        self._manager = TaskManager(include_path=folders, metadata={"data_folder": data_folder} if data_folder else None)
        self._chat = chat

    def scores(self, benchmarks: Sequence[Benchmark], limit: int | None, allow_code: bool, seed: int) -> dict[str, Score]:
        """Of each benchmark, by its name.

        Raises:
            InputError: a task is not known, or has no such metric
        """
        return {item.name: self._score(item, limit, allow_code, seed) for item in benchmarks}

    def _score(self, benchmark: Benchmark, limit: int | None, allow_code: bool, seed: int) -> Score:
        if benchmark.task not in self._manager.all_tasks:
            raise InputError(f"benchmark {benchmark.name}: lm-eval has no task {benchmark.task}; see lm-eval ls tasks")
        missing = self._refused(benchmark.task, allow_code) or self._without_data(benchmark.task)
        if missing is not None:
            return Score(benchmark.task, benchmark.metric, benchmark.num_fewshot, None, None, 0, missing, {})
        return score_of(benchmark, self._results(benchmark, limit, allow_code, seed))

    def _refused(self, task: str, allow_code: bool) -> str | None:
        """Why a task that runs code which the model has written is left out, if it is."""
        entry = self._manager.task_index[task]
        if not (entry.cfg or {}).get("unsafe_code"):
            return None
        if entry.yaml_path.parent != TASKS:
            return "it runs code that the model has written in this very process; use humaneval_sandboxed"
        if not allow_code:
            return "it runs code that the model has written; use allow_code: true to let it"
        try:
            require_sandbox()
        except InputError as error:
            return str(error)
        return None

    def _without_data(self, task: str) -> str | None:
        """Why a task cannot be asked, if it cannot."""
        import lm_eval

        try:
            lm_eval.tasks.get_task_dict([task], self._manager)  # reads the data
        except (OSError, ValueError) as error:  # InputError, and datasets' errors of files and connections, are among these
            return f"its data cannot be had: {' '.join(str(error).split())[:200]}"
        except ImportError as error:
            return f"a package that it uses is not installed: {' '.join(str(error).split())[:200]}"
        if task == "ifeval" and not has_punkt():  # it would end in the middle of the scores
            return "nltk has no punkt_tab to count sentences with; use python -m nltk.downloader punkt_tab"
        return None

    def _results(self, benchmark: Benchmark, limit: int | None, allow_code: bool, seed: int) -> dict[str, Any]:
        import lm_eval

        results: dict[str, Any] = lm_eval.simple_evaluate(
            model=self._lm,
            tasks=[benchmark.task],
            task_manager=self._manager,
            num_fewshot=benchmark.num_fewshot,
            limit=limit,
            apply_chat_template=self._chat,
            fewshot_as_multiturn=self._chat,
            confirm_run_unsafe_code=allow_code,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
        return results


def has_punkt() -> bool:
    """Whether nltk's splitter of sentences is here; lm-eval downloads it, where that can be done."""
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        return False
    return True


def score_of(benchmark: Benchmark, results: dict[str, Any]) -> Score:
    """One number of lm-eval's results.

    Raises:
        InputError: it is not among them
    """
    found = results["results"][benchmark.task] | results.get("groups", {}).get(benchmark.task, {})
    values = {name: value for name, value in found.items() if "," in name and "_stderr" not in name}
    if benchmark.metric not in values:
        raise InputError(
            f"benchmark {benchmark.name}: task {benchmark.task} has no metric {benchmark.metric}; it has {', '.join(values)}"
        )
    name, _, kind = benchmark.metric.partition(",")
    error = found.get(f"{name}_stderr,{kind}")
    samples = sum(int(counts["effective"]) for counts in results.get("n-samples", {}).values())
    return Score(
        task=benchmark.task,
        metric=benchmark.metric,
        num_fewshot=shots_of(results),
        value=float(values[benchmark.metric]),
        stderr=float(error) if isinstance(error, float) else None,
        samples=samples,
        missing=None,
        others={name: float(value) for name, value in values.items() if name != benchmark.metric},
    )


def shots_of(results: dict[str, Any]) -> int | None:
    """Examples that lm-eval gave: a task that has its own number of them keeps to it."""
    shots = set(results.get("n-shot", {}).values())
    return int(shots.pop()) if len(shots) == 1 else None
