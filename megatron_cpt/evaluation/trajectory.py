"""The same measurements along a run: each checkpoint is converted, measured and its conversion removed, once."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_cpt.checkpoint.layout import check_complete, checkpoint_name, iterations, read_checkpoint_manifest, versions
from megatron_cpt.convert.config import MegatronToHf
from megatron_cpt.convert.convert import megatron_to_hf
from megatron_cpt.convert.model_card import seq_length
from megatron_cpt.evaluation.columns import all_columns
from megatron_cpt.evaluation.config import EvaluateConfig, TrajectoryConfig
from megatron_cpt.evaluation.harness import TaskRegistry
from megatron_cpt.evaluation.identity import folder_identity
from megatron_cpt.evaluation.run import identities_of, measure_model, recall, still_true, wanted_parts
from megatron_cpt.utils.errors import InputError
from megatron_cpt.utils.files import write_json

logger = logging.getLogger(__name__)

FOLDER = "trajectory"
CONVERTED = ".hf"  # in it: the checkpoint that is being measured


@dataclass(frozen=True)
class TrajectoryPoint:
    """A checkpoint with its measurements."""

    iteration: int
    tokens: int | None
    parts: dict[str, Any]


def measure_trajectory(
    config: EvaluateConfig, registry: TaskRegistry | None, trajectory: TrajectoryConfig
) -> list[TrajectoryPoint]:
    """All checkpoints, in their order, with those that were measured before the run removed them.

    Raises:
        InputError: there is no checkpoint
    """
    folder = os.path.join(config.output, FOLDER)
    os.makedirs(folder, exist_ok=True)
    shutil.rmtree(os.path.join(folder, CONVERTED), ignore_errors=True)  # of a run that was killed
    run, points = trajectory.run, {}
    live = checkpoints_of(run, trajectory.every) if run is not None else {}
    if run is not None:
        points = removed_points(config, registry, run, folder)
    for item in trajectory.checkpoints:
        if item.iteration in live:
            raise InputError(
                f"trajectory.checkpoints has iteration {item.iteration}, and so has {run}; expected one of the two"
            )
        opened = contextlib.nullcontext(item.model)
        parts = measure_model(
            config,
            registry,
            wanted_parts(config),
            f"iteration {item.iteration}",
            os.path.join(folder, f"hf_{item.iteration:07d}.json"),
            folder_identity(item.model),
            opened,
        )
        points[item.iteration] = TrajectoryPoint(item.iteration, item.tokens, parts)
    for iteration, checkpoint in live.items():
        try:
            points[iteration] = measure_checkpoint(config, registry, str(run), iteration, checkpoint, folder)
        except (InputError, OSError):
            if os.path.exists(checkpoint):
                raise
            logger.info(f"left out: {checkpoint} has been removed by its run")
    if not points:
        raise InputError(f"trajectory.run is {trajectory.run}, which has no complete checkpoint iter_*")
    return [points[iteration] for iteration in sorted(points)]


def checkpoints_of(run: str, every: int | None) -> dict[int, str]:
    """iteration -> folder of the complete checkpoints of a run: those that `every` divides, and the last."""
    found = {}
    for iteration, name in sorted(iterations(run).items()):
        path = os.path.join(run, name)
        try:
            check_complete(path)
        except InputError as error:
            logger.info(f"left out: {error}")
            continue
        found[iteration] = path
    return {iteration: path for iteration, path in found.items() if not iteration % (every or 1) or iteration == max(found)}


def measure_checkpoint(
    config: EvaluateConfig, registry: TaskRegistry | None, run: str, iteration: int, checkpoint: str, folder: str
) -> TrajectoryPoint:
    """One of a run's."""
    manifest = read_checkpoint_manifest(checkpoint)
    tokens = manifest["consumed_samples"] * seq_length(manifest)
    with open(os.path.join(checkpoint, "manifest.json"), "rb") as file:
        digest = hashlib.sha256(file.read()).hexdigest()
    model = {"run": os.path.abspath(run), "iteration": iteration, "tokens": tokens, "manifest": digest}
    path = os.path.join(folder, f"{checkpoint_name(iteration)}.json")
    opened = converted(checkpoint, os.path.join(folder, CONVERTED))
    name = f"iteration {iteration}"
    return TrajectoryPoint(
        iteration, tokens, measure_model(config, registry, wanted_parts(config), name, path, model, opened)
    )


@contextlib.contextmanager
def converted(checkpoint: str, folder: str) -> Iterator[str]:
    """The checkpoint as a HF folder, for as long as it is needed."""
    try:
        yield megatron_to_hf(MegatronToHf(checkpoint, folder, num_workers=1))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def removed_points(
    config: EvaluateConfig, registry: TaskRegistry | None, run: str, folder: str
) -> dict[int, TrajectoryPoint]:
    """What was measured in the same way of checkpoints that a run with `keep_last` has removed since, be it not all.

    A run removes none after its newest: those are of another that was in this folder, or of a part that was taken back.
    """
    points = {}
    here = iterations(run)
    newest = max(here, default=None)
    identities = identities_of(config, registry, wanted_parts(config))
    for path in Path(folder).glob("iter_*.json"):
        model = measured_model(str(path))
        parts = still_true(recall(str(path), model), identities)
        iteration = model["iteration"]
        removed = iteration not in here and (newest is None or iteration < newest)
        if any(parts.values()) and model["run"] == os.path.abspath(run) and removed:
            logger.info(f"iteration {iteration}: its checkpoint is gone; as it was measured before")
            points[iteration] = TrajectoryPoint(iteration, model["tokens"], parts)
    return points


def measured_model(path: str) -> dict[str, Any]:
    """Which checkpoint a file has the measurements of.

    Raises:
        InputError: it is damaged
    """
    with open(path, encoding="utf-8") as file:
        try:
            model = json.load(file)["identity"]["model"]
            return {name: model[name] for name in ("run", "iteration", "tokens", "manifest")}
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is damaged: {error}; remove it to measure again") from error


def trajectory_settings(config: EvaluateConfig) -> dict[str, Any]:
    """How checkpoints are measured."""
    others = ("models", "output", "pairwise", "ablation", "trajectory")
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in others}


def write_trajectory(config: EvaluateConfig, points: Sequence[TrajectoryPoint]) -> None:
    """trajectory.json with everything, trajectory.csv with the numbers and their standard errors."""
    rows = [{"iteration": point.iteration, "tokens": point.tokens} | point.parts for point in points]
    content = {"checkpoints": rows, "settings": trajectory_settings(config), "versions": versions()}
    write_json(os.path.join(config.output, f"{FOLDER}.json"), content)
    columns = all_columns({str(point.iteration): point.parts for point in points})
    header = ["iteration", "tokens"]
    for column in columns:
        header += [column.label, f"{column.label}, standard error"] if column.part == "benchmarks" else [column.label]
    with open(os.path.join(config.output, f"{FOLDER}.csv"), "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        for point in points:
            row: list[Any] = [point.iteration, point.tokens]
            for column in columns:
                number = column.number(point.parts)
                row.append(number.value if number else None)
                if column.part == "benchmarks":
                    row.append(number.stderr if number else None)
            writer.writerow(row)
