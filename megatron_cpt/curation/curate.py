"""Raw corpora -> curated JSON lines: language identification, quality filters, MinHash deduplication.

The work is datatrove's (https://github.com/huggingface/datatrove): its filters, its four MinHash stages, its executors for
one machine and for SLURM. This module is what a user meets: the checks, the output folder.

    OUTPUT_FOLDER/LANGUAGE/00000.jsonl.zst ...   the curated documents; a folder appears when all of it is complete
    OUTPUT_FOLDER/.curation/report.json          documents and bytes in and out of every step, with reasons
    OUTPUT_FOLDER/.curation/{config.json,logs,work,dropped,slurm}

datatrove is imported when a curation starts, not with this module.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_cpt.config.require import Requirements, require
from megatron_cpt.corpus.sources import Source, find_sources, note_passed_over, printable
from megatron_cpt.curation import languages
from megatron_cpt.curation import report as curation_report
from megatron_cpt.curation.config import CurateConfig
from megatron_cpt.utils.errors import InputError, RefusedValueError
from megatron_cpt.utils.files import write_json
from megatron_cpt.utils.input_files import why_unreadable, why_unwritable
from megatron_cpt.utils.lock import locked, share

logger = logging.getLogger(__name__)

# How it runs, not what comes out: these may change when a curation is continued.
RUN_SETTINGS = ("workers", "executor", "slurm", "dry_run", "overwrite")


def curate(config: CurateConfig) -> str:
    """Curate `config.input` into `config.output_folder`; returns the folder (of a dry run: the folder of the scripts).

    InputError: no or unreadable input, an unknown language, filter or threshold, a missing library, a folder that holds
    something else or is being written by another run, or nothing left at the end. A curation that was stopped goes on after
    its last complete task. With `executor: slurm` the jobs are submitted and the last of them completes the folder.
    """
    sources, passed_over = find_input(config)
    note_passed_over(passed_over)
    check_installed()
    from megatron_cpt.curation import executors as curation_executors
    from megatron_cpt.curation import jobs as curation_jobs

    folder = Path(config.output_folder).expanduser().absolute()
    root = folder / ".curation"
    jobs = curation_jobs.plan_jobs(config, sources, root)  # finds every mistake in the settings
    prepare_folder(folder, identity(config, sources), config.overwrite)
    if (root / "report.json").exists():
        logger.info(f"{folder}: complete already")
    elif config.executor == "slurm":
        scripts = curation_executors.submit_curation(jobs, config, root)
        return str(scripts if config.dry_run else folder)
    else:
        with sole_writer(root, folder):
            curation_executors.run_jobs_locally(jobs, config.workers, root)
            curation_report.finish(folder)
    report = curation_report.read_report(root)
    curation_report.print_table(report)
    curation_report.refuse_nothing(report)
    return str(folder)


def check_curate_files(config: CurateConfig) -> None:
    """Check the input, models, thresholds and the output that a configuration names, whatever is wrong with it.

    Raises:
        InputError: something is wrong with one of them; InputErrors: with several
    """
    with Requirements() as need:
        for check in (check_curate_input, check_curate_output):
            with need.noted():
                check(config)
        with need.noted():
            check_installed()
        with need.noted():
            if config.language_model is not None:
                why = why_unreadable(os.path.expanduser(config.language_model))
                need(why is None, "language_model", config.language_model or "''", f"a fastText model ({why})")
        if importlib.util.find_spec("datatrove") is not None:
            with need.noted():
                check_of_languages(config)


def check_curate_input(config: CurateConfig) -> None:
    """Raise InputError unless there are files to read, and none lies in the output folder."""
    try:
        find_input(config)
    except RefusedValueError:  # the name of the output folder; whether the files are there is known all the same
        find_sources(list(config.input))


def check_curate_output(config: CurateConfig) -> None:
    """Raise InputError unless the output folder holds a curation or nothing, and can be written to."""
    folder = Path(config.output_folder).expanduser().absolute()
    why = why_unwritable(str(folder))
    require(why is None, "output_folder", config.output_folder, f"a folder to write to, or a name for a new one ({why})")
    if not (folder / ".curation" / "config.json").exists():
        refuse_others(folder)


def check_installed() -> None:
    """Raise InputError unless datatrove is there."""
    if importlib.util.find_spec("datatrove") is None:
        raise InputError("datatrove is not installed; expected: pip install 'megatron-cpt[curate]'")


def check_of_languages(config: CurateConfig) -> None:
    """Raise InputError for languages that cannot be told or split into words, and for thresholds that no filter has."""
    with Requirements() as need:
        with need.noted():
            for language in config.keep_languages:
                with need.noted():
                    languages.check_languages([language], config.language_identifier)
                with need.noted():
                    if config.fineweb2_configs:
                        languages.fineweb2_arguments(config.fineweb2_configs, language)
        with need.noted():
            if config.filter_arguments:
                from megatron_cpt.curation.jobs import check_filter_arguments

                check_filter_arguments(config)


def find_input(config: CurateConfig) -> tuple[list[Source], list[str]]:
    """The input files, and those of unknown kind in folders. InputError: none, or one inside the output folder."""
    sources, passed_over = find_sources(list(config.input))
    folder = os.path.realpath(os.path.expanduser(config.output_folder))
    for source in sources:
        if source.is_local and os.path.realpath(source.url).startswith(folder + os.sep):
            raise InputError(
                f"input {printable(source.url)} lies in output_folder {folder}; expected a folder of its own for the output"
            )
    return sources, passed_over


def identity(config: CurateConfig, sources: list[Source]) -> dict[str, Any]:
    """What a curation is made from; a stopped one is only continued when this is the same."""
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in RUN_SETTINGS}
    files = [[printable(source.url), source.bytes, source.version] for source in sources]
    return json.loads(json.dumps(settings | {"output_folder": "", "input": files}, default=str))


def prepare_folder(folder: Path, wanted: dict[str, Any], overwrite: bool) -> None:
    """Make the folder for this curation. InputError when it holds another one (without `overwrite`) or anything else."""
    root = folder / ".curation"
    found = json.loads((root / "config.json").read_text()) if (root / "config.json").exists() else None
    if found is not None and overwrite:
        with sole_writer(root, folder):
            for language in found["keep_languages"]:
                shutil.rmtree(folder / language, ignore_errors=True)
        shutil.rmtree(root)
        found = None
    if found is not None:
        for name in sorted(found.keys() | wanted.keys()):
            if found.get(name) != wanted.get(name):
                there, now = (_short(x.get(name)) for x in (found, wanted))
                held = f"holds a curation with {name} {there}; expected {now}"
                raise InputError(f"output_folder {folder}: {held}; give another folder or overwrite")
        return
    refuse_others(folder)
    root.mkdir(parents=True, exist_ok=True)
    write_json(root / "config.json", wanted)


def refuse_others(folder: Path) -> None:
    """Raise InputError if there is something in an output folder that holds no curation."""
    if folder.exists() and (inside := sorted(path.name for path in folder.iterdir() if path.name != ".curation")):
        raise InputError(
            f"output_folder {folder}: found {inside[0]}, which no curation wrote; expected a new or empty folder"
        )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 120 else text[:117] + "..."


@contextmanager
def sole_writer(root: Path, folder: Path) -> Iterator[None]:
    """Hold the folder for this run. InputError when a run, or a task that outlived a killed run, is writing in it."""
    # datatrove forks a process that a killed run leaves behind: the lock must not be its, too
    with locked(root / "lock", f"output_folder {folder}: another run is writing there; expected it to end first") as lock:
        share(lock)  # the tasks take it too, each for as long as it runs
        yield
