"""What became of the rows of SFT's and DPO's data: data_report.json, and a table."""

from __future__ import annotations

import os
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_cpt.checkpoint.layout import write_json
from megatron_cpt.posttrain.data import Prepared
from megatron_cpt.posttrain.runner import REPORT


def write_report(folder: str, prepared: Prepared[Any]) -> str:
    """Returns the path."""
    path = os.path.join(folder, REPORT)
    validation = {language: len(examples) for language, examples in prepared.validation.items()}
    sources = [counts.to_json() for counts in prepared.counts]
    write_json(path, {"almr": prepared.almr, "train": len(prepared.train), "validation": validation, "sources": sources})
    return path


def show_report(prepared: Prepared[Any]) -> None:
    """On stderr."""
    table = Table(title=f"data: {len(prepared.train):,} examples, ALMR {prepared.almr:.3f}", title_justify="left")
    table.add_column("source", overflow="fold")
    for name in ("rows", "broken", "train", "valid", "cut", "tokens"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("lengths", no_wrap=True)
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
    Console(stderr=True).print(table)
    for counts in prepared.counts:
        for kind, (numbers, text) in sorted(counts.broken.items()):
            first = ", ".join(map(str, numbers[:5])) + (", ..." if len(numbers) > 5 else "")
            print(f"{counts.source.path}: {len(numbers)} rows left out ({kind}): {first}; {text}", file=sys.stderr)
        if counts.with_tools:
            print(
                f"{counts.source.path}: {counts.with_tools} rows describe tools, which the model is not shown",
                file=sys.stderr,
            )
