"""Benchmark scores of a study's checkpoints, by a command that the user gives, such as lm-eval's."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any

from megatron_cpt.checkpoint.layout import iterations
from megatron_cpt.convert.config import MegatronToHf
from megatron_cpt.convert.convert import megatron_to_hf
from megatron_cpt.study.config import StudyConfig
from megatron_cpt.study.grid import GridPoint, run_folder
from megatron_cpt.study.records import is_number, read_record_file
from megatron_cpt.study.run_status import StoppedError
from megatron_cpt.utils.errors import InputError, RunError
from megatron_cpt.utils.files import write_json

# Of lm-eval's results, which of a task's metrics is its score: the first of these that is there.
LM_EVAL_METRICS = ("acc_norm", "acc", "exact_match", "pass@1", "f1", "rouge1", "rougeL", "bleu")
START = "start"  # where the scores of the checkpoint are that all runs begin with


def measure_run(study: StudyConfig, point: GridPoint, environment: dict[str, str], stop: threading.Event) -> None:
    """Measure every checkpoint of a run that is not measured yet, each into a file of its own.

    Raises:
        StoppedError: `stop` is set; what is measured stays
    """
    folder = run_folder(study.folder, point)
    for iteration, name in sorted(iterations(folder).items()):
        if stop.is_set():
            raise StoppedError
        measure_scores(study, os.path.join(folder, name), scores_path(study.folder, point.name, iteration), environment)


def scores_path(folder: str, name: str, iteration: int) -> str:
    """The scores of one checkpoint."""
    return os.path.join(folder, "scores", name, f"iter_{iteration:07d}.json")


def measure_scores(study: StudyConfig, checkpoint: str, path: str, environment: dict[str, str]) -> None:
    """Write {"name": score} of a Megatron checkpoint, unless it is written.

    Raises:
        RunError: the command failed, or its results are none
    """
    assert study.scores is not None
    if os.path.exists(path):
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    folder = os.path.join(study.folder, f".scores-{os.path.basename(os.path.dirname(path))}")
    shutil.rmtree(folder, ignore_errors=True)  # of a study that was killed
    hf, output, log = os.path.join(folder, "hf"), os.path.join(folder, "output"), path.removesuffix(".json") + ".log"
    os.makedirs(output)
    try:
        megatron_to_hf(MegatronToHf(checkpoint, hf, num_workers=1))
        command = [word.replace("{hf}", hf).replace("{output}", output) for word in study.scores.command]
        if shutil.which(command[0]) is None:
            raise InputError(f"scores.command: {command[0]} is no program that can be found")
        with open(log, "w", encoding="utf-8") as file:
            done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment)
        if done.returncode:
            raise RunError(f"the command for scores ended with status {done.returncode} (log: {log})")
        write_json(path, read_scores(output))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def read_scores(folder: str) -> dict[str, float]:
    """What a command has left: {"name": number}, or lm-eval's results, in the newest JSON file below a folder.

    Raises:
        RunError: there is nothing of the kind
    """
    files = sorted(Path(folder).rglob("*.json"), key=os.path.getmtime)
    if not files:
        raise RunError("the command for scores has left no .json file below {output}")
    text = files[-1].read_text(encoding="utf-8", errors="replace")
    try:
        found = json.loads(text)
    except ValueError as error:
        raise RunError(
            f"the command for scores has left {text[:200]!r}, which is not JSON; it should be numbers by name"
        ) from error
    if isinstance(found, dict) and isinstance(found.get("results"), dict):
        found = {task: lm_eval_score(task, metrics) for task, metrics in found["results"].items()}
    if not isinstance(found, dict) or not found or not all(map(is_number, found.values())):
        raise RunError(f"the command for scores has left {str(found)[:200]}; it should be numbers by name")
    return {str(name): float(value) for name, value in found.items()}


def lm_eval_score(task: str, metrics: Any) -> float:
    """The score of a task: of lm-eval's "metric,filter" the first filter of the metric that is usual."""
    if not isinstance(metrics, dict):
        raise RunError(f"lm-eval's results for {task} are {str(metrics)[:200]}; they should be numbers by name")
    for wanted in LM_EVAL_METRICS:
        for name, value in metrics.items():
            if name.split(",")[0] == wanted and is_number(value):
                return float(value)
    raise RunError(f"lm-eval's results for {task} have none of {', '.join(LM_EVAL_METRICS)}; found {', '.join(metrics)}")


def read_all_scores(folder: str, name: str) -> dict[int, dict[str, float]]:
    """iteration -> scores of one run."""
    found = {}
    for path in sorted(Path(folder, "scores", name).glob("iter_*.json")):
        if re.fullmatch(r"iter_\d+", path.stem) is None:
            raise InputError(f"{path} is no name of scores; expected iter_ and a number, such as iter_0000016.json")
        scores = read_record_file(str(path), dict, "numbers by name")
        if not scores:
            raise InputError(f"{path} holds no scores; expected numbers by name. Remove the file")
        for score, value in scores.items():
            if not is_number(value):
                raise InputError(
                    f"{path}: {score} is {value}; expected a number. Remove the file and leave {score} out of the mean"
                )
        found[int(path.stem.removeprefix("iter_"))] = scores
    return found
