"""Benchmarks of lm-evaluation-harness. A task whose data cannot be had is reported as such, never scored."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_cpt.checkpoint.hf_files import WITHOUT_ADAPTERS
from megatron_cpt.checkpoint.hf_tokenizer import load_hf_tokenizer
from megatron_cpt.evaluation.sandbox import require_sandbox
from megatron_cpt.posttrain.turn_end import turn_end
from megatron_cpt.utils.errors import InputError

TASKS = Path(__file__).with_name("tasks")  # of benchmarks that lm-eval lacks


@dataclass(frozen=True)
class Benchmark:
    """One task of a suite.

    Attributes:
        name: as the paper has it
        task: lm-eval's, or one of a folder of tasks
        metric: of it, as lm-eval names it, with its filter: "acc,none"
        num_fewshot: examples before each question; None: the task's own
        absent: why there is no task of it, if there is none
    """

    name: str
    task: str
    metric: str
    num_fewshot: int | None = None
    absent: str | None = None


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


UNAVAILABLE = "there is no task of it: in which form its data are published, and how they are scored, could not be verified"

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
    *(Benchmark(name, "-", "-", absent=UNAVAILABLE) for name in ("SECEU", "TAPTAP", "BotChat's Turing test")),
)
SUITES = {"cpt": CPT, "chat": CHAT}


class TaskRegistry:
    """lm-eval's tasks, this package's, and those of a folder; which of them can be asked here."""

    def __init__(self, tasks: str | None, data_folder: str | None) -> None:
        """Find them.

        Args:
            tasks: folder with task YAMLs beside lm-eval's own and this package's
            data_folder: with data of this package's tasks; None: they are taken from the Hugging Face hub

        Raises:
            InputError: lm-eval is not installed
        """
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise InputError("benchmarks need lm-eval; expected: pip install 'megatron-cpt[eval]'") from error
        folders = [str(TASKS), *([tasks] if tasks is not None else [])]
        self.manager = TaskManager(include_path=folders, metadata={"data_folder": data_folder} if data_folder else None)
        self._missing: dict[tuple[str, bool], str | None] = {}

    def check(self, benchmark: Benchmark) -> None:
        """Raise InputError if there is no such task, though there should be."""
        if benchmark.absent is None and benchmark.task not in self.manager.all_tasks:
            raise InputError(f"benchmark {benchmark.name}: lm-eval has no task {benchmark.task}; see lm-eval ls tasks")

    def missing(self, task: str, allow_code: bool) -> str | None:
        """Why a task cannot be asked, if it cannot; found out once."""
        key = task, allow_code
        if key not in self._missing:
            self._missing[key] = self._refused(task, allow_code) or self._without_data(task)
        return self._missing[key]

    def code_tasks(self, item: Any, inherited: bool = False) -> list[str]:
        """The tasks that run code which the model has written: this one, or those of a group or tag.

        Args:
            item: name of a task, group or tag, or what a group has in a name's place
            inherited: whether the group around it says that its tasks do
        """
        fields = item if isinstance(item, dict) else {}
        name = str(fields.get("group") or fields.get("task") if fields else item)
        entry = self.manager.task_index.get(name)
        own = (entry.cfg if entry is not None else None) or {}
        unsafe = any((inherited, own.get("unsafe_code"), fields.get("unsafe_code")))
        members = [*(entry.tags if entry is not None and not own else ())]
        for listed in (fields.get("task"), own.get("task")):
            members += listed if isinstance(listed, list) else []
        if members:
            return [task for member in members for task in self.code_tasks(member, unsafe)]
        return [name] if unsafe else []

    def _refused(self, task: str, allow_code: bool) -> str | None:
        """Why a task that runs code which the model has written is left out, if it is."""
        running = self.code_tasks(task)
        if not running:
            return None
        index = self.manager.task_index
        for name in running:
            if name not in index or index[name].yaml_path.parent != TASKS:
                which = "it" if name == task else f"its part {name}"
                return f"{which} runs code that the model has written in this very process; use humaneval_sandboxed"
        if not allow_code:
            return "it runs code that the model has written; use confirm_run_unsafe_code: true to let it"
        try:
            require_sandbox()
        except InputError as error:
            return str(error)
        return None

    def _without_data(self, task: str) -> str | None:
        """Why a task cannot be asked, if it cannot."""
        import lm_eval

        try:
            lm_eval.tasks.get_task_dict([task], self.manager)  # reads the data
        except (OSError, ValueError) as error:  # InputError, and datasets' errors of files and connections, are among these
            return f"its data cannot be had: {' '.join(str(error).split())[:200]}"
        except ImportError as error:
            return f"a package that it uses is not installed: {' '.join(str(error).split())[:200]}"
        if task == "ifeval" and not has_punkt():  # it would end in the middle of the scores
            return "nltk has no punkt_tab to count sentences with; use python -m nltk.downloader punkt_tab"
        return None


class Harness:
    """lm-eval on one model."""

    def __init__(
        self, model: str, registry: TaskRegistry, batch_size: int, chat: bool, device: str, spread: bool = False
    ) -> None:
        """`model`: HF folder, loaded when it is first asked; `chat`: by its template; `spread`: over all GPUs."""
        self._registry, self._chat = registry, chat
        self._options = {"pretrained": model, "batch_size": batch_size, "device": device, "parallelize": spread}
        self._options |= {"trust_remote_code": False} | WITHOUT_ADAPTERS

    def score(self, benchmark: Benchmark, limit: int | None, allow_code: bool, seed: int) -> Score:
        """Of one benchmark.

        Raises:
            InputError: the task is not known, or has no such metric
        """
        self._registry.check(benchmark)
        missing = benchmark.absent or self._registry.missing(benchmark.task, allow_code)
        if missing is None and self._chat and self._lm.tokenizer.chat_template is None:
            missing = "the model has no chat template; use apply_chat_template: false"
        if missing is not None:
            return Score(benchmark.task, benchmark.metric, benchmark.num_fewshot, None, None, 0, missing, {})
        return score_of(benchmark, self._results(benchmark, limit, allow_code, seed))

    @cached_property
    def _lm(self) -> Any:
        from lm_eval.models.huggingface import HFLM

        options = self._options | {"tokenizer": load_hf_tokenizer(str(self._options["pretrained"]), quiet=True)}
        return turn_ending(HFLM)(**options) if self._chat else HFLM(**options)

    def _results(self, benchmark: Benchmark, limit: int | None, allow_code: bool, seed: int) -> dict[str, Any]:
        import lm_eval

        results: dict[str, Any] = lm_eval.simple_evaluate(
            model=self._lm,
            tasks=[benchmark.task],
            task_manager=self._registry.manager,
            num_fewshot=benchmark.num_fewshot,
            limit=limit,
            apply_chat_template=self._chat,
            fewshot_as_multiturn=self._chat,
            # lm-eval refuses code as well where none was found
            confirm_run_unsafe_code=allow_code and bool(self._registry.code_tasks(benchmark.task)),
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
        return results


def turn_ending(base: type[Any]) -> type[Any]:
    """lm-eval's class of models with answers that end where a turn of the chat template does, beside the task's own ends."""

    class TurnEndingLM(base):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self.turn_end = turn_end(self.tokenizer, self.model.generation_config)
            self.model.generation_config.eos_token_id = list(self.turn_end.token_ids) or None
            self.model.generation_config.stop_strings = None  # they are among the ends, for which it needs no tokenizer

        def generate_until(self, requests: list[Any], *arguments: Any, **options: Any) -> Any:
            asked = [dataclasses.replace(request, arguments=self._ended(*request.args)) for request in requests]
            return super().generate_until(asked, *arguments, **options)

        def _ended(self, context: str, settings: dict[str, Any]) -> tuple[str, dict[str, Any]]:
            until = settings.get("until") or []
            ends = [*([until] if isinstance(until, str) else until), *self.turn_end.strings, *self.turn_end.token_texts]
            return context, settings | {"until": list(dict.fromkeys(ends))}

    return TurnEndingLM


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
