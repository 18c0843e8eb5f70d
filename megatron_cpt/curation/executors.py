# mypy: disable-error-code="import-untyped, import-not-found"
"""The jobs of a curation on this machine, or on a cluster with SLURM. This module imports datatrove."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datatrove.executor import slurm
from datatrove.executor.local import LocalPipelineExecutor
from loguru import logger as datatrove_logger

from megatron_cpt.curation.jobs import CurationJob
from megatron_cpt.utils.console import counted
from megatron_cpt.utils.errors import InputError
from megatron_cpt.utils.lock import open_lock, share
from megatron_cpt.utils.signals import handling

if TYPE_CHECKING:
    from megatron_cpt.curation.config import CurateConfig, CurationSlurmConfig

logger = logging.getLogger(__name__)


class LocalExecutor(LocalPipelineExecutor):
    """datatrove's, with its log in files only (logging_dir/logs), and the lock of the output folder held by every task."""

    def __init__(self, lock: Path, **settings: Any) -> None:
        super().__init__(**settings)
        self.lock, self.main_process = str(lock), os.getpid()

    def _launch_run_for_rank(self, *arguments: Any, **named: Any) -> Any:
        with contextlib.redirect_stderr(Silence()):
            if os.getpid() == self.main_process:  # a single worker; the lock is held already, and closing it would end that
                return super()._launch_run_for_rank(*arguments, **named)
            with open_lock(self.lock) as lock:
                share(lock)
                return super()._launch_run_for_rank(*arguments, **named)


class Silence(io.TextIOBase):
    """A stderr that says nothing and, unlike one on os.devnull, is never closed while a logger holds it."""

    def write(self, text: str) -> int:
        return len(text)


@contextlib.contextmanager
def terminated_like_interrupted() -> Iterator[None]:
    """A terminated run ends its worker processes, as one interrupted from the keyboard does."""

    def stop(number: int, frame: Any) -> None:
        sys.exit(128 + number)

    with handling(stop, signal.SIGTERM):
        yield


def run_jobs_locally(jobs: list[CurationJob], workers: int, root: Path) -> None:
    """Run all jobs but the last (finish) one after another; tasks that are done are passed over."""
    datatrove_logger.remove()
    for job in jobs[:-1]:
        executor = LocalExecutor(
            root / "lock",
            pipeline=job.pipeline,
            tasks=job.tasks,
            workers=min(workers, job.tasks),
            logging_dir=str(root / "logs" / job.name),
        )
        begin, todo = time.monotonic(), len(executor.get_incomplete_ranks())
        if todo:
            done = f", {job.tasks - todo} done before" if todo < job.tasks else ""
            logger.info(f"{job.name}: {counted(job.tasks, 'task')}{done} ...")
            with terminated_like_interrupted():
                executor.run()
            logger.info(f"{job.name}: {time.monotonic() - begin:.1f} s")


def submit_curation(jobs: list[CurationJob], config: CurateConfig, root: Path) -> Path:
    """Submit the jobs (or, in a dry run, pretend to); returns the folder with the scripts. InputError: no sbatch, or jobs of
    an earlier submission that are not over."""
    scripts = root / "slurm"
    if not config.dry_run:
        _refuse_running(scripts / "jobs.json")
    shutil.rmtree(scripts, ignore_errors=True)
    scripts.mkdir(parents=True)
    ids: dict[str, Any] = {}
    submitted: list[str] = []
    datatrove_logger.remove()  # datatrove says "launched" in a dry run, too
    with recorded_submissions(scripts, submitted, config.dry_run):
        for job in jobs:
            # -1 is datatrove's id of a job whose tasks were all done before
            wait = [ids[name] for name in job.after if ids[name] != -1]
            executor = _slurm_executor(job, config.slurm, root, ":".join(wait) or None)
            executor.launch_job()
            ids[job.name] = executor.job_id
    if not config.dry_run:
        logger.info(f"{len(submitted)} jobs submitted; the same command shows the report when the last is done")
    return scripts


def _slurm_executor(job: CurationJob, settings: CurationSlurmConfig, root: Path, wait: str | None) -> Any:
    memory = settings.cluster_mem_per_cpu_gb if job.name.startswith("clusters_") else settings.mem_per_cpu_gb
    return slurm.SlurmPipelineExecutor(
        pipeline=job.pipeline,
        tasks=job.tasks,
        time=settings.time,
        partition=settings.partition,
        cpus_per_task=settings.cpus_per_task,
        mem_per_cpu_gb=memory,
        workers=settings.max_running,
        job_name=f"curate_{job.name}",
        qos=settings.qos,
        env_command=settings.env_command or f"export PATH={shlex.quote(os.path.join(sys.prefix, 'bin'))}:$PATH",
        sbatch_args=dict(settings.sbatch_args),
        max_array_size=settings.max_array_size,
        depends_job_id=wait,
        logging_dir=str(root / "logs" / job.name),
    )


@contextlib.contextmanager
def recorded_submissions(scripts: Path, submitted: list[str], dry_run: bool) -> Iterator[None]:
    """Keep a copy of every script datatrove submits; in a dry run submit none, but print the command and invent an id."""
    really: Callable[..., str] = slurm.launch_slurm_job

    def launch(contents: str, job_id_retriever: Callable[[str], str], *arguments: str) -> str:
        number = len(submitted) + 1
        name = next(line.split("=", 1)[1] for line in contents.splitlines() if line.startswith("#SBATCH --job-name="))
        merge = "_stats" if "\nmerge_stats " in contents else ""
        script = scripts / f"{number:03d}_{name}{merge}.slurm"
        script.write_text(contents)
        if dry_run:
            print(shlex.join(["sbatch", *arguments, str(script)]), f"# job {number}")
            job_id = str(number)
        else:
            job_id = really(contents, job_id_retriever, *arguments)
        submitted.append(job_id)
        return job_id

    slurm.launch_slurm_job = launch
    try:
        yield
    except FileNotFoundError as error:
        raise InputError(
            f"executor slurm: cannot run {error.filename}; expected a machine that submits SLURM jobs"
        ) from None
    except subprocess.CalledProcessError as error:
        raise InputError(f"executor slurm: sbatch failed ({error}); {len(submitted)} jobs were submitted before") from None
    finally:
        slurm.launch_slurm_job = really
        if submitted and not dry_run:
            (scripts / "jobs.json").write_text(json.dumps(submitted))


def _refuse_running(jobs_file: Path) -> None:
    """InputError when jobs of an earlier submission still wait or run: two would write the same files."""
    if not jobs_file.exists():
        return
    ids = ",".join(json.loads(jobs_file.read_text()))
    try:
        answer = subprocess.run(["squeue", "--noheader", f"--jobs={ids}"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise InputError("executor slurm: cannot run squeue; expected a machine that submits SLURM jobs") from None
    if answer.stdout.strip():  # squeue fails, with nothing on stdout, when it has forgotten all of them
        raise InputError(f"output_folder: jobs {ids} of an earlier submission still wait or run; expected them to end first")
