"""metrics.jsonl, the truth about a run: one JSON object per line, each written by a single call.

A kill can leave one last line cut off; reading leaves it out and the next start removes it, as it does with lines that are
damaged otherwise: a record is no reason not to go on. What is not a finite number is null in the file, so that every JSON
reader takes it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

from megatron_cpt.utils.files import finite, write_text

METRICS = "metrics.jsonl"


class MetricsFile:
    """Appends rows. When the disk is full they wait in memory and are written with a later one."""

    def __init__(self, folder: str) -> None:
        self.path = os.path.join(folder, METRICS)
        self.waiting = b""

    def append(self, row: dict[str, Any]) -> None:
        """Write one row. OSError: it could not be written and waits; so does the rest of one that was written in part."""
        self.waiting += line(row).encode()
        self.flush()

    def flush(self) -> None:
        """Write what waits. OSError: see `append`."""
        with open(self.path, "ab", buffering=0) as file:
            while self.waiting:
                self.waiting = self.waiting[file.write(self.waiting) :]

    def keep_until(self, iteration: int, wanted: Callable[[dict[str, Any]], bool] = lambda row: True) -> list[str]:
        """Forget the rows of later steps, which a resume will do again, and lines cut off or damaged; at -1 forget all.

        Args:
            wanted: of the rows of this step, which to keep

        Returns a sentence for each damaged line.
        """
        parsed = [parse_row(text) for text in read_lines(self.path)] if iteration >= 0 else []
        rows = [row for row in parsed if row is not None]
        kept = [row for row in rows if row["iteration"] < iteration or (row["iteration"] == iteration and wanted(row))]
        write_text(self.path, "".join(line(row) for row in kept))
        return [f"{self.path}: line {n} cannot be read and is left out" for n, row in enumerate(parsed, 1) if row is None]


def line(row: dict[str, Any]) -> str:
    """A row as it stands in the file."""
    return json.dumps(finite(row), ensure_ascii=False, allow_nan=False) + "\n"


def read_lines(path: str) -> list[bytes]:
    """The whole lines of a file, none if there is no file; a last one cut off by a kill is left out."""
    if not os.path.exists(path):
        return []
    with open(path, "rb") as file:
        return [text for text in file if text.endswith(b"\n")]


def parse_row(text: bytes) -> dict[str, Any] | None:
    """The row in a line, None if it is damaged."""
    try:
        row = json.loads(text)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("iteration"), int) else None


def read_rows(path: str) -> list[dict[str, Any]]:
    """All rows of a metrics file that can be read."""
    return [row for text in read_lines(path) if (row := parse_row(text)) is not None]


def read_metrics(folder: str) -> list[dict[str, Any]]:
    """All rows of a run's metrics.jsonl."""
    return read_rows(os.path.join(folder, METRICS))
