"""The commands of tools/almr_study.py."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

from megatron_cpt.errors import InputError
from megatron_cpt.study.config import StudyConfig
from megatron_cpt.study.local import run_locally
from megatron_cpt.study.outcome import read_outcome
from megatron_cpt.study.points import Point, points, read_base, run_folder
from megatron_cpt.study.results import collect, write_results
from megatron_cpt.study.scores import measure, scores_path


def say(text: str) -> None:
    """A line for the user, beside the result on stdout."""
    print(text, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Run(StudyConfig):
    """Do the runs that are not done yet, here or as a SLURM job array, and collect what they found."""

    only: str | None = None
    """Name of the one run to do."""


def run(study: Run) -> str:
    """`almr_study.py run`; returns the path of the results."""
    base = read_base(study)
    todo = wanted_points(study)
    os.makedirs(os.path.join(study.folder, "runs"), exist_ok=True)
    if study.scores is not None and not study.only:
        measure(study, base.config.checkpoint.load, scores_path(study.folder, "start", 0))
    say(f"{len(todo)} runs to do of {len(points(study))}")
    try:
        run_locally(study, base, todo, say)
    finally:
        if os.path.isdir(study.folder) and any(read_outcome(run_folder(study.folder, p)) for p in points(study)):
            path = write_results(study, collect(study))
    return path


def wanted_points(study: Run) -> list[Point]:
    """Runs that are not over, or the one that is asked for."""
    found = points(study)
    if study.only is None:
        return [point for point in found if not is_done(study, point)]
    chosen = [point for point in found if point.name == study.only]
    if not chosen:
        raise InputError(f"only is {study.only}, which is no run of this study; the first is {found[0].name}")
    return chosen


def is_done(study: StudyConfig, point: Point) -> bool:
    """Whether nothing is left of it to do or to measure."""
    folder = run_folder(study.folder, point)
    outcome = read_outcome(folder)
    return outcome is not None and not any(name.startswith("iter_") for name in os.listdir(folder))
