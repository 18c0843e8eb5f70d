"""What a study will take, before it is run; and what to run next."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_cpt.model.llama import LlamaConfig, hf_shapes
from megatron_cpt.planning.hardware import Cluster, find_device
from megatron_cpt.planning.layouts import Layout, TrainingJob
from megatron_cpt.planning.timing import layout_throughput
from megatron_cpt.study.config import StudyConfig
from megatron_cpt.study.grid import (
    Base,
    GridPoint,
    check_same_study,
    grid_points,
    parse_run_config,
    run_fields,
    run_folder,
    written_configurations,
)
from megatron_cpt.study.inputs import check_inputs, record_inputs
from megatron_cpt.study.run_status import RunOutcome, read_outcome
from megatron_cpt.training.progress_line import show_duration
from megatron_cpt.utils.console import counted
from megatron_cpt.utils.errors import InputError
from megatron_cpt.utils.tables import PlainTable, number_column

MOMENTS_BYTES, MAIN_BYTES = 8, 4  # fp32 moments of Adam, fp32 main weights of a bf16 model


@dataclass(frozen=True)
class StudyPlan:
    """Attributes:
    outcomes: of all runs, None: to be done
    steps, tokens: of a run, whole steps
    seconds: of a run, None: unknown; seconds_from says how they were estimated
    disk: bytes of a run's checkpoints
    """

    study: StudyConfig
    outcomes: dict[GridPoint, RunOutcome | None]
    steps: int
    tokens: int
    seconds: float | None
    seconds_from: str
    disk: int

    @property
    def left(self) -> int:
        """Runs to do."""
        return sum(outcome is None for outcome in self.outcomes.values())

    @property
    def hours_left(self) -> float | None:
        """For all of them."""
        rounds = math.ceil(self.left / self.study.parallel_runs)
        return None if self.seconds is None else rounds * self.seconds / 3600

    @property
    def disk_in_all(self) -> int:
        """The most at a time, or, if checkpoints are kept, in the end."""
        return self.disk * (len(self.outcomes) if self.study.keep_checkpoints else self.study.parallel_runs)


def make_plan(study: StudyConfig, base: Base, proposed: Sequence[tuple[float, float]]) -> StudyPlan:
    """Write the configurations of all runs, check one of each ALMR as the run itself will, and estimate.

    Of a study that is refused none stays.

    Raises:
        InputError: a run would refuse its configuration, what the runs read was replaced since the study began, or the study
            is above its limits
    """
    outcomes = {point: read_outcome(run_folder(study.folder, point)) for point in grid_points(study, proposed)}
    for point in outcomes:
        check_same_study(study, base, point)
    check_inputs(study, base)
    with written_configurations(study, base, [*outcomes]):
        plan = checked_plan(study, base, outcomes)
        check_study_limits(plan)
    record_inputs(study, base)
    return plan


def checked_plan(study: StudyConfig, base: Base, outcomes: dict[GridPoint, RunOutcome | None]) -> StudyPlan:
    """Check a run of each ALMR, and estimate all of them.

    Raises:
        InputError: a run would refuse its configuration
    """
    from megatron_cpt.training.validate_config import check_run  # imports megatron-core

    checked: dict[float, GridPoint] = {}
    for point in outcomes:
        checked.setdefault(point.almr, point)
    for point in checked.values():
        fields = run_fields(study, base, point)
        fields["checkpoint"] = fields["checkpoint"] | {"save": os.path.join(study.folder, "runs", ".check")}  # nothing there
        run = check_run(parse_run_config(fields, study.base), study.processes)
    ended = [outcome for outcome in outcomes.values() if outcome is not None and outcome.kind == "finished"]
    seconds = [outcome.wall_seconds for outcome in ended if outcome.wall_seconds is not None]
    batch = run.config.training.global_batch_size * run.mixture.seq_length
    steps = run.length.train_iters
    if seconds:
        estimate, source = statistics.mean(seconds), f"mean of {len(seconds)} runs that have finished"
    elif study.device is not None:
        estimate = planned_seconds(study, base, run.llama, run.mixture.seq_length, steps)
        source = "steps alone, as plan_run.py estimates them"
    else:
        estimate, source = None, "unknown until a run has finished, or device is given"
    return StudyPlan(study, outcomes, steps, steps * batch, estimate, source, disk_bytes(base, run.llama, steps))


def planned_seconds(study: StudyConfig, base: Base, llama: LlamaConfig, seq_length: int, steps: int) -> float:
    """Of all steps of a run, on a cluster, as tools/plan_run.py estimates them; without start and evaluations."""
    assert study.device is not None
    training, parallel = base.config.training, base.config.parallel
    model = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    data = study.processes // (model * parallel.context_parallel_size)
    job = TrainingJob(llama, seq_length, training.global_batch_size, training.params_dtype, training.fp8 is not None)
    microbatches = training.global_batch_size // (training.micro_batch_size * data)
    layout = Layout(parallel, data, training.micro_batch_size, microbatches)
    return steps * layout_throughput(job, layout, Cluster(find_device(study.device), study.processes)).step.total


def disk_bytes(base: Base, llama: LlamaConfig, steps: int) -> int:
    """Of a run's checkpoints at most."""
    checkpoint = base.config.checkpoint
    bf16 = base.config.training.params_dtype == "bf16"
    each = 2 if bf16 else 4
    if checkpoint.save_optim:
        each += MOMENTS_BYTES + (MAIN_BYTES if bf16 else 0)
    number = math.ceil(steps / checkpoint.save_interval) if checkpoint.save_interval else 1
    if checkpoint.keep_last is not None:
        number = min(number, checkpoint.keep_last + 1)  # the oldest goes once the newest is there
    return number * each * sum(math.prod(shape) for shape in hf_shapes(llama).values())


def check_study_limits(plan: StudyPlan) -> None:
    """Raise InputError for the first limit that the study is above."""
    limits, runs = plan.study.limits, len(plan.outcomes)
    found: tuple[tuple[str, float | None, float | None], ...] = (
        ("runs", runs, limits.runs),
        ("tokens", runs * plan.tokens, limits.tokens),
        ("disk_gb", plan.disk_in_all / 1e9, limits.disk_gb),
        ("hours", plan.hours_left, limits.hours),
    )
    for name, value, limit in found:
        if value is not None and limit is not None and value > limit:
            raise InputError(f"the study takes {name} {value:,.4g}; limits.{name} is {limit:,.4g}")


def plan_table(plan: StudyPlan, proposed: Sequence[tuple[float, float]]) -> PlainTable:
    """A line for each pair of ALMR and learning rate, and the total."""
    study = plan.study
    total = f"{len(plan.outcomes) * plan.tokens:,}"
    hours, done = plan.hours_left, len(plan.outcomes) - plan.left
    time_left = "" if hours is None else f"{show_duration(3600 * hours)} left"
    how = "kept" if study.keep_checkpoints else f"removed once measured, {study.parallel_runs} at a time"
    caption = f"time: {plan.seconds_from}; {counted(study.parallel_runs, 'run')} at a time. Checkpoints: {how}."
    table = PlainTable(
        number_column("ALMR", "total"),
        number_column("LR"),
        number_column("done", f"{done}/{len(plan.outcomes)}"),
        number_column("tokens", total),
        number_column("additional"),
        number_column("time", time_left),
        number_column("disk", size(plan.disk_in_all)),
        title=f"{counted(len(plan.outcomes), 'run')} of {counted(plan.steps, 'step')}; tokens, time and disk of each",
        caption=caption + (" *: proposed." if proposed else ""),
    )
    pairs = list(dict.fromkeys((point.almr, point.lr) for point in plan.outcomes))
    for almr, lr in pairs:
        of_pair = [outcome for point, outcome in plan.outcomes.items() if (point.almr, point.lr) == (almr, lr)]
        diverged = sum(outcome is not None and outcome.kind == "diverged" for outcome in of_pair)
        state = f"{sum(outcome is not None for outcome in of_pair)}/{len(of_pair)}"
        table.add_row(
            f"{almr:g}{' *' if (almr, lr) in proposed else ''}",
            f"{lr:g}",
            state + (f", {diverged} diverged" if diverged else ""),
            f"{plan.tokens:,}",
            f"{round(almr * plan.tokens):,}",
            "?" if plan.seconds is None else show_duration(plan.seconds) if plan.seconds >= 1 else "<1 s",
            size(plan.disk),
        )
    return table


def size(value: float) -> str:
    """Bytes for people."""
    return f"{value / 1e9:,.1f} GB" if value >= 1e8 else f"{value / 1e6:,.1f} MB"
