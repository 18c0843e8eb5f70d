"""The commands of tools/almr_study.py."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import threading

from megatron_cpt.checkpoint.layout import iterations
from megatron_cpt.study.choose import Choice, choose, read_choice, write_choice
from megatron_cpt.study.config import StudyConfig
from megatron_cpt.study.critical import predict_critical_ratios
from megatron_cpt.study.fit import Fit, equation, fit_for_choice, fit_study, grouped_notes, write_fit
from megatron_cpt.study.grid import Base, GridPoint, grid_points, read_base, read_proposed, run_folder, write_proposed
from megatron_cpt.study.html_report import critical_words, interval, noise_words, write_html_report
from megatron_cpt.study.inputs import check_inputs, record_inputs
from megatron_cpt.study.local_executor import alone_in, device_shares, run_environment, run_locally
from megatron_cpt.study.plan import make_plan, plan_table
from megatron_cpt.study.results import Results, collect, write_results
from megatron_cpt.study.run_status import read_outcome
from megatron_cpt.study.scores import START, measure_scores, read_all_scores, scores_path
from megatron_cpt.study.settings import ChooseOptions, FitOptions, PlanOptions, PlotOptions, RunOptions
from megatron_cpt.study.slurm_executor import submit_array
from megatron_cpt.utils.console import counted
from megatron_cpt.utils.errors import InputError
from megatron_cpt.utils.tables import PlainTable, log_table, number_column, text_column

logger = logging.getLogger(__name__)


def plan_study(study: PlanOptions) -> str:
    """`almr_study.py plan`; returns the study's folder."""
    base, proposed = read_base(study), read_proposed(study.folder)
    if study.adaptive:
        from megatron_cpt.study.propose import propose  # imports optuna

        found = [point for point in grid_points(study) if read_outcome(run_folder(study.folder, point))]
        results = collect(study, base) if found else Results([], [])
        proposed += propose(study, results, study.adaptive)
    table = plan_table(make_plan(study, base, proposed), proposed)
    if study.adaptive:
        write_proposed(study.folder, proposed)  # within the limits
    log_table(logger, table)
    return study.folder


def run_study(study: RunOptions) -> str:
    """`almr_study.py run`; returns the path of the results, of the array's script, or of the one run's folder."""
    base = read_base(study)
    if study.only is not None:
        return run_only(study, base, study.only)
    make_plan(study, base, read_proposed(study.folder))  # refuses what a run would refuse
    todo = [point for point in grid_points(study) if not is_point_done(study, point)]
    logger.info(f"{len(todo)} of {len(grid_points(study))} runs to do")
    os.makedirs(os.path.join(study.folder, "runs"), exist_ok=True)
    if todo and study.executor == "slurm":
        return submit_array(study, todo)
    try:
        if todo and study.scores is not None:
            measure_start(study, base)
        run_locally(study, base, todo, logger.info)
    finally:
        if any(read_outcome(run_folder(study.folder, point)) for point in grid_points(study)):
            write_results(study, collect(study, base))
    unmeasured = [point.name for point in grid_points(study) if lacks_scores(study, point)]
    if unmeasured:
        logger.info(
            f"{counted(len(unmeasured), 'run')} finished without scores, and the checkpoints are gone; the first is "
            f"{unmeasured[0]}. Remove the folders to repeat them, or use another folder for a study with scores"
        )
    return write_all_results(study, collect(study, base)) or study.folder


def run_only(study: StudyConfig, base: Base, name: str) -> str:
    """One run of the study, or the scores of its start: a task of the job array. Results are for `fit` to collect."""
    check_inputs(study, base)
    record_inputs(study, base)
    if name == START:
        measure_start(study, base)
        return scores_path(study.folder, START, 0)
    found = grid_points(study)
    chosen = [point for point in found if point.name == name]
    if not chosen:
        raise InputError(f"only is {name}, which is no run of this study; the first is {found[0].name}")
    run_locally(study, base, chosen, logger.info)
    return run_folder(study.folder, chosen[0])


def measure_start(study: StudyConfig, base: Base) -> None:
    """The scores of the checkpoint that all runs begin with."""
    with alone_in(study, START, threading.Event()):  # two studies may be started at once
        load = base.config.checkpoint.load
        measure_scores(study, load, scores_path(study.folder, START, 0), run_environment(study, device_shares(study)[0]))


def lacks_scores(study: StudyConfig, point: GridPoint) -> bool:
    """Whether it has finished, and nothing is left of it to measure."""
    outcome = read_outcome(run_folder(study.folder, point))
    if study.scores is None or outcome is None or outcome.kind != "finished":
        return False
    return is_point_done(study, point) and not read_all_scores(study.folder, point.name)


def is_point_done(study: StudyConfig, point: GridPoint) -> bool:
    """Whether nothing is left of it to do or to measure."""
    folder = run_folder(study.folder, point)
    outcome = read_outcome(folder)
    if outcome is None:
        return False
    left = [name for name in os.listdir(folder) if name.startswith("iter_")]
    if study.keep_checkpoints and (study.scores is None or outcome.kind == "diverged"):
        return True
    if study.keep_checkpoints:
        return all(os.path.exists(scores_path(study.folder, point.name, iteration)) for iteration in iterations(folder))
    return not left


def fitted(study: FitOptions) -> tuple[Results, Fit]:
    """What the runs have found, and what it says."""
    results = collect(study, read_base(study))
    found = fit_study(results, study.frontier_axis, study.tolerance)
    if study.token_budget is not None:
        critical = predict_critical_ratios(results, found.cmr, study.tolerance, study.token_budget)
        none = (
            []
            if critical
            else [f"no critical mixture ratio of {study.token_budget:,} tokens: no learning rate has a CMR law"]
        )
        found = dataclasses.replace(found, critical=critical, notes=found.notes + none)
    write_all_results(study, results)
    return results, found


def write_all_results(study: StudyConfig, results: Results) -> str | None:
    """Write results.parquet, or say why not; returns its path."""
    path = write_results(study, results)
    if path is None:
        logger.info(f"{study.folder} has more runs than are asked for here: results.parquet is left as it is")
    return path


def fit_command(study: FitOptions) -> str:
    """`almr_study.py fit`; returns the path of fit.json."""
    _, found = fitted(study)
    log_table(logger, fit_table(found))
    for name, line in ((f"frontier of {found.frontier_of}", found.frontier), ("loss line", found.line)):
        if line is not None and not math.isnan(line.a):
            intervals = f"a{interval(line.a_interval)}, b{interval(line.b_interval)}"
            intervals = intervals if math.isfinite(line.b_interval[0]) else "no intervals"
            logger.info(f"{name}: {equation(line)}; {intervals}{' (not supported)' if line.refused else ''}")
    for critical in found.critical:
        logger.info(critical_words(critical))
    for note in grouped_notes(found.notes):
        logger.info(f"note: {note}")
    return write_fit(study.folder, found)


def fit_table(found: Fit) -> PlainTable:
    """The surfaces."""
    figures = map(number_column, ("runs", "noise", "left-out error", "explained"))
    table = PlainTable(text_column(), *figures, text_column("supported"), title="surfaces over ALMR and log LR")
    for name, fitted_surface in found.surfaces.items():
        runs = str(len(fitted_surface.surface.values))
        found_of = noise_words(fitted_surface), f"{fitted_surface.error:.3g}", f"{fitted_surface.explained:.1%}"
        table.add_row(name, runs, *found_of, "no" if fitted_surface.refused else "yes")
    return table


def plot(study: PlotOptions) -> str:
    """`almr_study.py plot`; returns the path of report.html."""
    from megatron_cpt.study import figures  # imports matplotlib

    try:
        results, found = fitted(study)
    except InputError as error:
        return plot_trajectories(study, error)
    choice = read_choice(study.folder)
    chosen = figures.chosen_pair(choice)
    rates = sorted({row["lr"] for row in results.last("general")})
    lr = min(rates, key=lambda rate: abs(rate - chosen[1])) if chosen else rates[len(rates) // 2]
    limit = choice["max_general_rise"] if choice else None
    images = figures.save_all(
        study.folder,
        (
            ("contours", lambda: figures.contours(results, found, chosen)),
            ("languages", lambda: figures.draw_language_losses(results, found, chosen)),
            ("trajectories", lambda: figures.trajectories(results, lr)),
            ("pareto", lambda: figures.pareto(results, found, chosen, limit)),
            ("laws", lambda: figures.laws(results, found)),
        ),
    )
    write_fit(study.folder, found)
    title = f"ALMR x LR study: {os.path.basename(os.path.abspath(study.folder))}"
    return write_html_report(study.folder, title, results, found, choice, images)


def plot_trajectories(study: PlotOptions, error: InputError) -> str:
    """The one figure that needs no surface, say of runs with one learning rate; returns its path."""
    from megatron_cpt.study import figures

    results = collect(study, read_base(study))
    rates = sorted({row["lr"] for row in results.rows})
    logger.info(f"trajectories only: {error}")
    (path,) = figures.save_all(
        study.folder, [("trajectories", lambda: figures.trajectories(results, rates[len(rates) // 2]))]
    )
    return path


def choose_command(study: ChooseOptions) -> str:
    """`almr_study.py choose`; returns the path of the configuration to start."""
    results = collect(study, read_base(study))
    choice = choose(results, fit_for_choice(results, study.goal), study.max_general_rise, study.confidence, study.goal)
    path = write_choice(study.folder, choice, study.target or study.base, study.max_general_rise)
    show_choice(choice)
    return path


def show_choice(choice: Choice) -> None:
    """The choice on screen."""
    logger.info(f"ALMR           {choice.almr:.3g}{interval(choice.almr_interval)}")
    logger.info(f"learning rate  {choice.lr:.3g}{interval(choice.lr_interval)}")
    logger.info(choice.reason)
    for note in grouped_notes(choice.notes):
        logger.info(f"note: {note}")
