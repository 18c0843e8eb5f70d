"""tools/evaluate.py: everything that is measured, compared, laid out and drawn."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Iterator, Sequence

from megatron_cpt.checkpoint.hf_files import say_notes
from megatron_cpt.checkpoint.layout import versions
from megatron_cpt.evaluation import figures
from megatron_cpt.evaluation.ablation import ablation_table
from megatron_cpt.evaluation.columns import Measured
from megatron_cpt.evaluation.config import EvaluateConfig, TrajectoryConfig
from megatron_cpt.evaluation.harness import TaskRegistry
from megatron_cpt.evaluation.identity import folder_identity
from megatron_cpt.evaluation.pairwise import Comparison, PairwiseEvaluator, comparisons_table
from megatron_cpt.evaluation.run import benchmarks_of, check_questions, measure_model, wanted_parts
from megatron_cpt.evaluation.run_files import check_evaluation
from megatron_cpt.evaluation.table import evaluation_markdown
from megatron_cpt.evaluation.trajectory import measure_trajectory, write_trajectory
from megatron_cpt.utils.errors import RunError
from megatron_cpt.utils.files import finite, write_json, write_text
from megatron_cpt.utils.lock import locked

logger = logging.getLogger(__name__)

REPORT = "report.json"


def evaluate(config: EvaluateConfig) -> str:
    """Measure; returns the path of report.md.

    Raises:
        InputError: a model, file or setting is wrong
        RunError: a judge gave no answers; all else is in the report
    """
    check_evaluation(config)
    along = config.trajectory.checkpoints if config.trajectory is not None else []
    for folder in [*config.models.values(), *(checkpoint.model for checkpoint in along)]:
        say_notes(folder)
    check_questions(config)
    evaluator = PairwiseEvaluator(config, config.pairwise) if config.pairwise is not None else None
    registry = registry_of(config)
    os.makedirs(config.output, exist_ok=True)
    with only_evaluation(config.output):
        return measure_and_report(config, evaluator, registry)


@contextlib.contextmanager
def only_evaluation(output: str) -> Iterator[None]:
    """Of this folder, for the length of the block: two would write over what the other has measured.

    A folder in which nothing has been written is removed when the block fails.

    Raises:
        InputError: there is another
    """
    path = os.path.join(output, ".lock")
    with locked(path, f"another evaluation is under way in {output} (it holds {path}); use another output"):
        try:
            yield
        except Exception:
            if os.listdir(output) == [os.path.basename(path)]:
                os.remove(path)
                os.rmdir(output)
            raise


def measure_and_report(config: EvaluateConfig, evaluator: PairwiseEvaluator | None, registry: TaskRegistry | None) -> str:
    """The evaluation itself, of models that there are; returns the path of report.md."""
    measured = measure_models(config, registry)
    comparisons = evaluator.comparisons(measured) if evaluator is not None else []
    report = {
        "models": measured,
        "pairwise": [dataclasses.asdict(item) for item in comparisons],
        "settings": dataclasses.asdict(config),
        "versions": versions(),
    }
    write_json(os.path.join(config.output, REPORT), finite(report))
    sections = tables(config, measured, comparisons)
    logger.info("\n\n".join(sections))
    sections += draw_models(config, measured)
    path = os.path.join(config.output, "report.md")
    write_text(path, page(sections))  # a trajectory may take days
    if config.trajectory is not None:
        write_text(path, page([*sections, report_trajectory(config, registry, config.trajectory)]))
    check_judged(config, comparisons, path)
    return path


def check_judged(config: EvaluateConfig, comparisons: Sequence[Comparison], path: str) -> None:
    """Raise RunError if a model that judges has failed: what comes after it is not to take the report for whole."""
    lost = [item for item in comparisons if item.missing is not None]
    if lost and config.pairwise is not None and config.pairwise.judge.url is not None:
        first = f"{lost[0].model} against {lost[0].against}: {lost[0].missing}"
        raise RunError(
            f"{len(lost)} of {len(comparisons)} pairs not judged ({first}); all else is in {path}; "
            "the same command asks for what is missing"
        )


def page(sections: Sequence[str]) -> str:
    """In Markdown."""
    return "\n\n".join(sections) + "\n"


def registry_of(config: EvaluateConfig) -> TaskRegistry | None:
    """Of the benchmarks, if there are any: what is wrong with them is known before hours are spent.

    Raises:
        InputError: a task is not known, two benchmarks have the same name, or lm-eval is not installed
    """
    benchmarks = benchmarks_of(config)
    if not benchmarks:
        return None
    registry = TaskRegistry(config.tasks_folder, config.data_folder)
    for benchmark in benchmarks:
        registry.check(benchmark)
    return registry


def measure_models(config: EvaluateConfig, registry: TaskRegistry | None) -> dict[str, dict[str, object]]:
    """name -> measurements."""
    parts = wanted_parts(config)
    if config.pairwise is not None and config.pairwise.judge.url is not None:
        parts.append("pairwise")
    measured = {}
    for name, folder in config.models.items():
        path = os.path.join(config.output, f"{name}.json")
        measured[name] = measure_model(
            config, registry, parts, name, path, folder_identity(folder), contextlib.nullcontext(folder)
        )
    return measured


def tables(config: EvaluateConfig, measured: Measured, comparisons: list[Comparison]) -> list[str]:
    """Of the report."""
    sections = [evaluation_markdown(measured).strip()]
    if comparisons:
        sections.append(comparisons_table(comparisons))
    if config.ablation:
        sections.append(ablation_table(config.ablation, measured))
    return [section for section in sections if section]


def draw_models(config: EvaluateConfig, measured: Measured) -> list[str]:
    """scores.png and languages.png; links to them."""
    links = []
    for name, draw in (("scores", figures.scores), ("languages", figures.draw_languages)):
        figure = draw(measured)
        if figure is not None:
            figures.save_figure(figure, os.path.join(config.output, f"{name}.png"))
            links.append(f"![{name}]({name}.png)")
    return links


def report_trajectory(config: EvaluateConfig, registry: TaskRegistry | None, trajectory: TrajectoryConfig) -> str:
    """trajectory.json, .csv and .png; a link to the last."""
    points = measure_trajectory(config, registry, trajectory)
    write_trajectory(config, points)
    figures.save_figure(figures.trajectory(points), os.path.join(config.output, "trajectory.png"))
    return "![trajectory](trajectory.png)"
