"""What the runs of a study have found: results.parquet and results.csv, one row for each run and evaluation."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from megatron_cpt.study.config import StudyConfig
from megatron_cpt.study.grid import Base, GridPoint, check_same_study, grid_points, run_folder
from megatron_cpt.study.inputs import check_inputs
from megatron_cpt.study.records import LEDGER, general_languages, planned_tokens, read_ledger, read_run_metrics
from megatron_cpt.study.run_status import OUTCOME, RunOutcome, read_outcome
from megatron_cpt.study.scores import START, read_all_scores
from megatron_cpt.training.metrics_file import METRICS
from megatron_cpt.utils.errors import InputError
from megatron_cpt.utils.files import replacing

PARQUET, CSV = "results.parquet", "results.csv"
MEAN_METRIC = "mean_metric"


@dataclass(frozen=True)
class Results:
    """Every evaluation of every run that has begun.

    Attributes:
        rows: run, almr, lr, seed, outcome ("finished", "diverged", "unfinished"), iteration, tokens, last (of a finished
            run); general, additional, mixed (losses, nats per token) and balanced; NAME_loss and NAME_bits_per_byte of each
            validation set; scores and mean_metric
        scores: names of the benchmark scores
        planned: (ALMR, LR) of all runs of the study, also of those that have not begun
    """

    rows: list[dict[str, Any]]
    scores: list[str]
    planned: list[tuple[float, float]] = field(default_factory=list)

    def last(self, quantity: str) -> list[dict[str, Any]]:
        """The last evaluation of each finished run that has this quantity."""
        return [row for row in self.rows if row["last"] and row.get(quantity) is not None]

    def column(self, quantity: str) -> npt.NDArray[np.float64]:
        """This quantity of the rows that `last` gives."""
        return np.array([row[quantity] for row in self.last(quantity)], dtype=np.float64)


def collect(study: StudyConfig, base: Base) -> Results:
    """Read what the runs have written.

    Raises:
        InputError: no run has begun, one is of another study, a file is damaged or missing, runs have read different
            things, or the mixture has no validation set of one of the two groups
    """
    rows: list[dict[str, Any]] = []
    names: set[str] = set()
    ledgers = {point: ledger for point in grid_points(study) if (ledger := ledger_of(study, base, point)) is not None}
    check_inputs(study, base)
    general = set().union(*map(general_languages, ledgers.values()))
    for point, ledger in ledgers.items():
        of_run = run_rows(study, point, general, planned_tokens(ledger))
        for row in of_run:
            names |= row["scores"].keys()
        rows += of_run
    if not rows:
        raise InputError(f"{study.folder} has no results yet; use run first")
    scores = sorted(names)
    taken = [name for name in scores if name in rows[0]]
    if taken:
        raise InputError(f"a score has the name {taken[0]}, which is a column of the results; have the command give another")
    wanted = study.scores.mean_of if study.scores is not None and study.scores.mean_of is not None else scores
    for name in wanted:
        if name not in scores and scores:
            raise InputError(f"scores.mean_of has {name}, which the command did not give; it gave {', '.join(scores)}")
    for row in rows:
        found = row.pop("scores")
        row |= {name: found.get(name) for name in scores}
        whole = bool(wanted) and all(name in found for name in wanted)
        row[MEAN_METRIC] = sum(found[name] for name in wanted) / len(wanted) if whole else None
    return Results(rows, scores, sorted({(point.almr, point.lr) for point in grid_points(study)}))


def ledger_of(study: StudyConfig, base: Base, point: GridPoint) -> dict[str, Any] | None:
    """What a run reads; None: it has not begun.

    Raises:
        InputError: it is over and has none, or it was begun with another configuration
    """
    check_same_study(study, base, point)
    folder = run_folder(study.folder, point)
    begun = os.path.exists(os.path.join(folder, LEDGER)) or read_outcome(folder) is not None
    return read_ledger(folder) if begun else None


def run_rows(study: StudyConfig, point: GridPoint, general: set[str], length: int) -> list[dict[str, Any]]:
    """The evaluations of one run of `length` tokens."""
    folder = run_folder(study.folder, point)
    outcome = read_outcome(folder)
    metrics = read_run_metrics(folder)
    evaluations = [row for row in metrics if "validation" in row]
    tokens = {0: 0} | {row["iteration"]: row["consumed_tokens"] for row in metrics if "consumed_tokens" in row}
    check_evaluations(folder, outcome, [tokens.get(row["iteration"]) for row in evaluations], length)
    if not evaluations:
        return []
    groups = group_of_sets(general, evaluations[0]["validation"], folder)
    for evaluation in evaluations:
        if evaluation["validation"].keys() != groups.keys():
            sets = ", ".join(evaluation["validation"])
            raise InputError(
                f"{os.path.join(folder, METRICS)}: step {evaluation['iteration']} has validation sets {sets}; expected "
                f"those of step {evaluations[0]['iteration']}: {', '.join(groups)}"
            )
    scores = read_all_scores(study.folder, START) | read_all_scores(study.folder, point.name)
    rows = []
    for evaluation in evaluations:
        iteration = evaluation["iteration"]
        row: dict[str, Any] = {
            "run": point.name,
            "almr": point.almr,
            "lr": point.lr,
            "seed": point.seed,
            "outcome": outcome.kind if outcome else "unfinished",
            "iteration": iteration,
            "tokens": tokens.get(iteration),
            "last": bool(outcome and outcome.kind == "finished" and evaluation is evaluations[-1]),
        }
        row |= mean_losses(evaluation["validation"], groups, point.almr)
        for name, figures in evaluation["validation"].items():
            row |= {f"{name}_loss": figures["loss"], f"{name}_bits_per_byte": figures["bits_per_byte"]}
        rows.append(row | {"scores": scores.get(iteration, {})})
    for row in rows:
        row["balanced"] = balanced(row, rows[0])
    return rows


def check_evaluations(folder: str, outcome: RunOutcome | None, tokens: list[int | None], length: int) -> None:
    """Raise InputError where a run that is over has no evaluations, or a finished one none after its last step: lines of its
    metrics.jsonl are lost.
    """
    if outcome is None:
        return
    path = os.path.join(folder, METRICS)
    repeat = f"though {OUTCOME} says that the run has {outcome.kind}; remove {folder} to repeat it"
    if not tokens or tokens[0] != 0:
        raise InputError(f"{path} has no evaluation before step 1, {repeat}")
    if None in tokens:
        raise InputError(f"{path} lacks a step after which it has an evaluation, {repeat}")
    if outcome.kind == "finished" and tokens[-1] != length:
        raise InputError(
            f"{path} has its last evaluation at {tokens[-1] or 0:,} tokens; expected one at {length:,}, {repeat}"
        )


def group_of_sets(general: set[str], sets: dict[str, Any], folder: str) -> dict[str, str]:
    """validation set -> "general" or "additional": by its language, as training/validation_table.py does."""
    groups = {name: "general" if figures["language"] in general else "additional" for name, figures in sets.items()}
    for group in ("general", "additional"):
        if group not in groups.values():
            raise InputError(f"{folder}: no validation set has a language of the {group} corpora; add one to the mixture")
    return groups


def mean_losses(sets: dict[str, Any], groups: dict[str, str], almr: float) -> dict[str, float | None]:
    """Means over the sets of each group, and over the run's own mixture; nats per token."""
    means: dict[str, float | None] = {}
    for group in ("general", "additional"):
        found = [figures["loss"] for name, figures in sets.items() if groups[name] == group]
        means[group] = None if None in found else sum(found) / len(found)
    general, additional = means["general"], means["additional"]
    mixed = None if general is None or additional is None else (1 - almr) * general + almr * additional
    return means | {"mixed": mixed}


def balanced(row: dict[str, Any], start: dict[str, Any]) -> float | None:
    """Mean of the relative changes of both groups' losses since the start: both languages count alike."""
    changes = [row[group] / start[group] - 1 for group in ("general", "additional") if row[group] and start[group]]
    return sum(changes) / 2 if len(changes) == 2 else None


def write_results(study: StudyConfig, results: Results) -> str | None:
    """Replace results.parquet and results.csv; returns the path of the former.

    None: not by those of a part of the study, as `fit --almr '[0.25,0.5]'` looks at.
    """
    known = {point.name for point in grid_points(study)}
    begun = {name for name in os.listdir(os.path.join(study.folder, "runs")) if not name.startswith(".")}  # locks
    if begun - known:
        return None
    table = pa.Table.from_pylist(results.rows)
    for name, write in ((PARQUET, pyarrow.parquet.write_table), (CSV, pyarrow.csv.write_csv)):
        path = os.path.join(study.folder, name)
        with replacing(path) as temporary:
            write(table, temporary)
    return os.path.join(study.folder, PARQUET)
