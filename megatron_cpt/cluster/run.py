"""One check after the other, a row of the table for each, and the results as JSON."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_cpt.cluster import engine, file_system, inputs, links, machines, training_runs
from megatron_cpt.cluster.check import Check, CheckFailedError, CheckOutcome
from megatron_cpt.cluster.config import CheckConfig
from megatron_cpt.cluster.job import ClusterJob, join
from megatron_cpt.utils.errors import InputError, RunError
from megatron_cpt.utils.files import write_text
from megatron_cpt.utils.logs import ON_SCREEN
from megatron_cpt.version import __version__

logger = logging.getLogger(__name__)

LONGEST = 1800.0  # seconds in which every rank has ended what a check has it do


def run_checks(config: CheckConfig) -> str | None:
    """Make all checks; the path of the results, on the first rank.

    Raises:
        InputError: the folder cannot be written to, or a check is asked for that there is not
        RunError: some have failed
    """
    begin = time.monotonic()
    folder = Path(config.folder) / "check_cluster"
    job = join(folder)
    checks = chosen(all_checks(job), config.only)  # before anything is made, or what an earlier check has left removed
    if job.is_rank_zero:
        empty(folder)
    job.gather("ready", True, 600)
    outcomes = []
    for outcome in outcomes_of(job, checks, begin + 60 * config.minutes):
        outcomes.append(outcome)
        if job.is_rank_zero:
            show_outcome(outcome)
    if not job.is_rank_zero:
        return None
    report = config.report or str(Path(config.folder) / "check_cluster.json")
    os.makedirs(os.path.dirname(os.path.abspath(report)), exist_ok=True)
    write_text(report, json.dumps(as_json(job, outcomes, time.monotonic() - begin), indent=1) + "\n")
    shutil.rmtree(folder / "runs", ignore_errors=True)
    return conclusion(outcomes, report)


def empty(folder: Path) -> None:
    """A folder for what the check writes, without what an earlier one has left.

    Raises:
        InputError: it cannot be made
    """
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"folder is {folder.parent}: {error.strerror}; expected one to write to") from error


def all_checks(job: ClusterJob) -> list[Check]:
    """In their order."""
    return [
        *machines.CHECKS,
        *file_system.CHECKS,
        *links.CHECKS,
        *inputs.CHECKS,
        *engine.engine_checks(job),
        *training_runs.training_checks(job),
    ]


def chosen(checks: Sequence[Check], only: Sequence[str] | None) -> list[Check]:
    """Those that are asked for, and what they need.

    Raises:
        InputError: a word is in no name
    """
    if only is None:
        return list(checks)
    names, wanted = [check.name for check in checks], set[str]()
    for word in only:
        found = {word} & set(names) or {name for name in names if word in name}
        if not found:
            raise InputError(f"only is {word}, which is in no check's name; expected one of {', '.join(map(repr, names))}")
        wanted |= found
    for check in reversed(checks):
        if check.name in wanted:
            wanted |= set(check.needs)
    return [check for check in checks if check.name in wanted]


def outcomes_of(job: ClusterJob, checks: Sequence[Check], deadline: float) -> Iterator[CheckOutcome]:
    """Each check's outcome, on the first rank; other ranks take part, and have nothing to say."""
    passed: set[str] = set()
    for number, check in enumerate(checks):
        begin = time.monotonic()
        if job.is_rank_zero:
            job.tell(f"skip/{number}", reason_to_skip(job, check, passed, deadline))
        reason = job.ask(f"skip/{number}", LONGEST)
        if reason is None:
            outcome = check_outcome(job, check, number, begin)
        else:
            outcome = CheckOutcome(check.name, "skipped", reason)
        if outcome.state == "passed":
            passed.add(check.name)
        yield outcome


def reason_to_skip(job: ClusterJob, check: Check, passed: set[str], deadline: float) -> str | None:
    """Why a check is not made."""
    if (here := check.here(job)) is not None:
        return here
    missing = [name for name in check.needs if name not in passed]
    if missing:
        return f"needs `{missing[0]}`, which has not passed"
    return "time is up (minutes)" if time.monotonic() > deadline else None


def check_outcome(job: ClusterJob, check: Check, number: int, begin: float) -> CheckOutcome:
    """Of a check that is made."""
    try:
        measured: Any = check.measure(job)
    except CheckFailedError as error:
        measured = error
    except Exception as error:
        measured = unexpected(error)
    if not job.is_rank_zero:
        job.tell(f"measured/{number}/{job.rank}", measured)
        return CheckOutcome(check.name, "skipped", "the first rank speaks")
    measured = [measured, *(job.ask(f"measured/{number}/{rank}", LONGEST) for rank in range(1, job.world_size))]
    try:
        errors = [one for one in measured if isinstance(one, CheckFailedError)]
        if errors:
            raise min(errors, key=lambda error: error.waited)
        said, figures = check.judge(measured)
    except CheckFailedError as error:
        return CheckOutcome(check.name, "failed", str(error), time.monotonic() - begin, error.advice, error.figures)
    except Exception as error:
        failed = unexpected(error)
        return CheckOutcome(check.name, "failed", str(failed), time.monotonic() - begin, failed.advice)
    return CheckOutcome(check.name, "passed", said, time.monotonic() - begin, figures=figures)


def unexpected(error: Exception) -> CheckFailedError:
    """An error of the check itself, whose traceback goes to the log of this process."""
    traceback.print_exc()
    return CheckFailedError(f"{type(error).__name__}: {error}", "the traceback is above")


WIDTH = 34
COLOURS = {"passed": "32", "failed": "31", "skipped": "33"}


def show_outcome(outcome: CheckOutcome) -> None:
    """A row of the table, on stderr, with columns of fixed widths: it is shown when its check ends."""
    state = f"{outcome.state:<7}"
    seconds = f"{outcome.seconds:5.0f} s" if outcome.state != "skipped" else " " * 7
    row = f" {seconds}  {outcome.name:<{WIDTH}} {outcome.said}"
    coloured = f"\033[{COLOURS[outcome.state]}m{state}\033[0m" if sys.stderr.isatty() else state
    logger.info(state + row, extra={ON_SCREEN: coloured + row})
    if outcome.advice:
        logger.info(f"{'':{WIDTH + 18}}try: {outcome.advice}")


def as_json(job: ClusterJob, outcomes: Sequence[CheckOutcome], seconds: float) -> dict[str, Any]:
    """What plan_run.py and people read."""
    return {
        "format": 1,
        "version": __version__,
        "processes": job.world_size,
        "devices_per_node": job.devices_per_node,
        "nodes": len(job.nodes),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "seconds": round(seconds, 1),
        "checks": [dataclasses.asdict(outcome) for outcome in outcomes],
    }


def conclusion(outcomes: Sequence[CheckOutcome], report: str) -> str:
    """The path of the results.

    Raises:
        RunError: checks have failed
    """
    failed = [outcome.name for outcome in outcomes if outcome.state == "failed"]
    passed, skipped = (sum(outcome.state == state for outcome in outcomes) for state in ("passed", "skipped"))
    logger.info(f"{passed} passed, {len(failed)} failed, {skipped} skipped")
    if failed:
        raise RunError(f"{len(failed)} of {len(outcomes)} checks failed: {', '.join(failed)}; results: {report}")
    return report
