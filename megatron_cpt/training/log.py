"""What a run shows and records, on its first rank: a progress bar or plain lines, metrics.jsonl, run.json, ledger.json."""

from __future__ import annotations

import dataclasses
import json
import os
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_cpt.checkpoint.layout import write_json, write_text
from megatron_cpt.data.ledger import Ledger
from megatron_cpt.data.mixture_inspection import ledger_table
from megatron_cpt.training.validation import ValidationResult


class RunLog:
    """Writes to the run's folder and to the terminal; on other ranks than the first it does nothing.

    On a terminal one progress bar per phase (training, validation) is redrawn in place; elsewhere each step is a line.
    """

    def __init__(self, folder: str, active: bool) -> None:
        self.folder = folder
        self.active = active
        self.console = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
        self.metrics_path = os.path.join(folder, "metrics.jsonl")
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self.console,
            disable=not (active and self.console.is_terminal),
        )

    def __enter__(self) -> RunLog:
        self.progress.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.progress.stop()

    def say(self, message: Any) -> None:
        """Print for the person watching."""
        if self.active:
            self.console.print(message)

    def start(self, run: dict[str, Any], ledger_json: dict[str, Any], ledger: Ledger, iteration: int) -> None:
        """Record what is about to run; forget metrics of steps that a resume will do again."""
        if not self.active:
            return
        os.makedirs(self.folder, exist_ok=True)
        write_json(os.path.join(self.folder, "run.json"), run)
        self.ledger(ledger_json)
        kept = [row for row in read_metrics(self.folder) if row["iteration"] <= iteration] if iteration else []
        write_text(self.metrics_path, "".join(json.dumps(row) + "\n" for row in kept))
        self.say(ledger_table(ledger))

    def ledger(self, ledger_json: dict[str, Any]) -> None:
        """Replace ledger.json."""
        if self.active:
            write_json(os.path.join(self.folder, "ledger.json"), ledger_json)

    def metrics(self, row: dict[str, Any]) -> None:
        """Append one row to metrics.jsonl."""
        if self.active:
            with open(self.metrics_path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def step(self, row: dict[str, Any], train_iters: int) -> None:
        """Show one training step on a plain line (a terminal has the progress bar)."""
        if not self.console.is_terminal:
            self.say(f"step {row['iteration']}/{train_iters} | {step_note(row)}")

    def validation(self, iteration: int, results: list[ValidationResult]) -> None:
        """Show and record an evaluation."""
        self.metrics({"iteration": iteration, "validation": {r.name: dataclasses.asdict(r) for r in results}})
        for r in results:
            self.say(f"validation at step {iteration} | {r.name} | loss {r.loss:.4f} | {r.bits_per_byte:.4f} bits per byte")


def step_note(row: dict[str, Any]) -> str:
    """The numbers of one step in a few words."""
    return (
        f"loss {row['loss']:.4f} | lr {row['lr']:.3g} | grad norm {row['grad_norm']:.2f} | "
        f"{row['tokens_per_second']:,.0f} tokens/s | ALMR {row['almr_realised']:.4f}"
    )


def read_metrics(folder: str) -> list[dict[str, Any]]:
    """All rows of a run's metrics.jsonl; a last line cut off by a kill is left out."""
    path = os.path.join(folder, "metrics.jsonl")
    if not os.path.exists(path):
        return []
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.endswith("\n")]
