"""The runs of a study as a SLURM job array: one task for each, doing what `run` does here."""

from __future__ import annotations

import dataclasses
import logging
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron_cpt.study.config import StudyConfig
from megatron_cpt.study.grid import GridPoint
from megatron_cpt.study.scores import START
from megatron_cpt.utils.errors import InputError
from megatron_cpt.utils.files import write_text

logger = logging.getLogger(__name__)

TOOL = Path(__file__).parent.parent.parent / "tools" / "almr_study.py"


def submit_array(study: StudyConfig, todo: Sequence[GridPoint]) -> str:
    """Write the array's script and submit it; returns the script's path.

    Raises:
        InputError: sbatch is not there, or refuses
    """
    folder = os.path.join(os.path.abspath(study.folder), "slurm")
    os.makedirs(folder, exist_ok=True)
    fields = {field.name: plain_for_yaml(getattr(study, field.name)) for field in dataclasses.fields(StudyConfig)}
    fields |= {"executor": "local", "parallel_runs": 1}
    config, script = os.path.join(folder, "study.yaml"), os.path.join(folder, "study.sbatch")
    write_text(config, yaml.safe_dump(fields, sort_keys=False))
    names = ([START] if study.scores is not None else []) + [point.name for point in todo]
    write_text(script, array_script(study, names, config, folder))
    if study.slurm.dry_run:
        return script
    try:
        done = subprocess.run(["sbatch", script], capture_output=True, text=True)
    except FileNotFoundError as error:
        raise InputError("sbatch is not there; use executor local, or a machine that submits to SLURM") from error
    if done.returncode:
        raise InputError(f"sbatch {script} was refused: {' '.join(done.stderr.split())}")
    logger.info(done.stdout.strip())
    return script


def plain_for_yaml(value: Any) -> Any:
    """For YAML."""
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value


def array_script(study: StudyConfig, names: Sequence[str], config: str, folder: str) -> str:
    """A task for each name. `exec`: the signal before the time limit then reaches Python, which has its run save."""
    command = [sys.executable, str(TOOL), "run", "--config", config, "--only"]
    lines = [
        "#!/usr/bin/env bash",
        f"#SBATCH --job-name={os.path.basename(os.path.abspath(study.folder))}",
        f"#SBATCH --array=0-{len(names) - 1}%{study.parallel_runs}",
        f"#SBATCH --output={folder}/%A_%a.log",
        "#SBATCH --signal=B:TERM@120",
        *(f"#SBATCH {option}" for option in study.slurm.sbatch),
        "set -euo pipefail",
        f"cd {shlex.quote(os.getcwd())}",
        *study.slurm.setup,
        f"names=({' '.join(map(shlex.quote, names))})",
        f'exec {shlex.join(command)} "${{names[$SLURM_ARRAY_TASK_ID]}}"',
    ]
    return "\n".join(lines) + "\n"
