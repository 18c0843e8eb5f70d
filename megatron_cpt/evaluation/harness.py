"""Benchmarks of lm-evaluation-harness. A task whose data cannot be had is reported as such, never scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_cpt.errors import InputError


@dataclass(frozen=True)
class Benchmark:
    """One task of a suite.

    Attributes:
        name: as the paper has it
        task: lm-eval's, or one of a folder of tasks
        metric: of it, as lm-eval names it, with its filter: "acc,none"
        num_fewshot: examples before each question; None: the task's own
        allow_code: whether its answers are code that is run
    """

    name: str
    task: str
    metric: str
    num_fewshot: int | None = None
    allow_code: bool = False


@dataclass(frozen=True)
class Score:
    """What became of a benchmark: a value with its standard error, or why there is none."""

    value: float | None
    stderr: float | None
    samples: int
    missing: str | None


# Those of the paper's CPT table that lm-eval has, with the settings that are usual for them.
CPT = (
    Benchmark("C-Eval", "ceval-valid", "acc,none", 5),
    Benchmark("MMLU", "mmlu", "acc,none", 5),
    Benchmark("AGI-Eval", "agieval_en", "acc,none", 0),
    Benchmark("BBH", "bbh_cot_fewshot", "exact_match,get-answer", 3),
    Benchmark("GSM8K", "gsm8k", "exact_match,strict-match", 5),
    Benchmark("HumanEval", "humaneval", "pass@1,create_test", 0, allow_code=True),
)
CHAT = (
    Benchmark("TriviaQA", "triviaqa", "exact_match,remove_whitespace", 5),
    Benchmark("CMMLU", "cmmlu", "acc,none", 5),
    Benchmark("IFEval", "ifeval", "prompt_level_strict_acc,none", 0),
)
SUITES = {"cpt": CPT, "chat": CHAT}


class Harness:
    """lm-eval on one model.

    Attributes:
        tasks: folder with task YAMLs beside lm-eval's own
    """

    def __init__(self, model: str, tasks: str | None, batch_size: int, chat: bool, device: str) -> None:
        """Load the model.

        Raises:
            InputError: lm-eval is not installed
        """
        try:
            from lm_eval.models.huggingface import HFLM
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise InputError("benchmarks need lm-eval; wanted: pip install 'megatron-cpt[eval]'") from error
        self._lm = HFLM(pretrained=model, batch_size=batch_size, device=device, trust_remote_code=False)
        self._manager = TaskManager(include_path=tasks)
        self._chat = chat

    def scores(self, benchmarks: Sequence[Benchmark], limit: int | None, allow_code: bool, seed: int) -> dict[str, Score]:
        """Of each benchmark, by its name.

        Raises:
            InputError: a task is not known, or has no such metric
        """
        return {item.name: self._score(item, limit, allow_code, seed) for item in benchmarks}

    def _score(self, benchmark: Benchmark, limit: int | None, allow_code: bool, seed: int) -> Score:
        import lm_eval

        if benchmark.allow_code and not allow_code:
            return Score(None, None, 0, "it runs code that the model has written; use allow_code: true to let it")
        if benchmark.task not in self._manager.all_tasks:
            raise InputError(f"benchmark {benchmark.name}: lm-eval has no task {benchmark.task}; see lm-eval ls tasks")
        try:
            tasks = lm_eval.tasks.get_task_dict([benchmark.task], self._manager)  # reads the data
        except (OSError, ValueError) as error:  # datasets' errors of files and connections are among these
            return Score(None, None, 0, f"its data cannot be had: {' '.join(str(error).split())[:200]}")
        del tasks
        results = lm_eval.simple_evaluate(
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
        return score_of(benchmark, results)


def score_of(benchmark: Benchmark, results: dict[str, Any]) -> Score:
    """One number of lm-eval's results.

    Raises:
        InputError: it is not among them
    """
    found = results["results"][benchmark.task] | results.get("groups", {}).get(benchmark.task, {})
    if benchmark.metric not in found:
        names = ", ".join(name for name in found if "," in name and "_stderr" not in name)
        raise InputError(
            f"benchmark {benchmark.name}: task {benchmark.task} has no metric {benchmark.metric}; it has {names}"
        )
    name, _, kind = benchmark.metric.partition(",")
    error = found.get(f"{name}_stderr,{kind}")
    samples = sum(int(counts["effective"]) for counts in results.get("n-samples", {}).values())
    return Score(float(found[benchmark.metric]), float(error) if isinstance(error, float) else None, samples, None)
