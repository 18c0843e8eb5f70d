"""metrics.jsonl, the truth about a run: one JSON object per line, each written by a single call.

A kill can leave one last line cut off; reading leaves it out and the next start removes it. What is not a finite number is
null in the file, so that every JSON reader takes it.
"""

from __future__ import annotations

import json
import math
import os
from typing import Any

from megatron_cpt.checkpoint.layout import write_text

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

    def keep_until(self, iteration: int) -> None:
        """Forget the rows of later steps, which a resume will do again, and a line cut off; at 0 forget all."""
        rows = read_rows(self.path) if iteration else []
        write_text(self.path, "".join(line(row) for row in rows if row["iteration"] <= iteration))


def line(row: dict[str, Any]) -> str:
    """A row as it stands in the file."""
    return json.dumps(finite(row), ensure_ascii=False, allow_nan=False) + "\n"


def finite(value: Any) -> Any:
    """The same with None for every number that is not finite."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_rows(path: str) -> list[dict[str, Any]]:
    """All rows of a metrics file, none if there is no file; a last line cut off by a kill is left out."""
    if not os.path.exists(path):
        return []
    with open(path, "rb") as file:
        return [json.loads(text) for text in file if text.endswith(b"\n")]


def read_metrics(folder: str) -> list[dict[str, Any]]:
    """All rows of a run's metrics.jsonl."""
    return read_rows(os.path.join(folder, METRICS))


def validation_baseline(folder: str) -> dict[str, dict[str, Any]]:
    """{set: figures} of the validation before step 1, with which later ones are compared; {} if there was none."""
    for row in read_metrics(folder):
        if row["iteration"] == 0 and "validation" in row:
            return dict(row["validation"])
    return {}
