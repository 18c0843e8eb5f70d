"""The quickstart's report: what continuing the pre-training did to the model.

    python examples/quickstart/report.py runs/quickstart --wall_seconds 300

reads RUN/checkpoints (metrics, ledger) and both HF models, and writes RUN/report.json, report.md and report.png.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_cpt.posttrain.generate import complete_text
from megatron_cpt.training.metrics_file import read_metrics
from megatron_cpt.training.report import write_run_report
from megatron_cpt.training.validation_table import baseline_of

PROMPTS = {"zh": "今年春节期间，", "en": "The capital of France is"}
LANGUAGES = {"zh": "Chinese", "en": "English"}


def collect(run: Path) -> dict[str, Any]:
    """The figures of the training run."""
    rows = read_metrics(str(run / "checkpoints"))
    steps = [row for row in rows if "loss" in row]
    evaluations = [row for row in rows if "validation" in row]
    after = evaluations[-1]["validation"]
    found = {name: baseline_of(evaluations, name) for name in after}
    before = {name: baseline for name, baseline in found.items() if baseline is not None}
    ledger = json.loads((run / "checkpoints" / "ledger.json").read_text())
    description = json.loads((run / "checkpoints" / "run.json").read_text())
    tokens = steps[-1]["consumed_tokens"]
    return {
        "bits_per_byte": {
            name: {"before": before[name]["bits_per_byte"], "after": after[name]["bits_per_byte"]} for name in before
        },
        "almr": {"asked": ledger["planned"]["almr_asked"], "realised": steps[-1]["almr_realised"]},
        "layout": description["layout"],
        "tokens": tokens,
        "tokens_per_second": tokens / sum(row["seconds"] for row in steps),
        "peak_memory_gb": rows[-1]["peak_memory_bytes"] / 1e9,
    }


def layout_name(layout: dict[str, Any]) -> str:
    names = {"TP": "tensor_model_parallel_size", "PP": "pipeline_model_parallel_size", "DP": "data_parallel_size"}
    return " x ".join(f"{short}{layout[name]}" for short, name in names.items()) + f" on {layout['device']}"


def generations(run: Path) -> dict[str, dict[str, str]]:
    """Greedy completions of one prompt in each language, by the model before and after."""
    before, after = (complete_text(str(run / folder), list(PROMPTS.values()), 32) for folder in ("inputs/hf", "hf-cpt"))
    return {
        language: {"prompt": prompt, "before": one_line(old), "after": one_line(new)}
        for (language, prompt), old, new in zip(PROMPTS.items(), before, after, strict=True)
    }


def one_line(text: str) -> str:
    return " ".join(text.split()).rstrip("\ufffd")  # half a character at the cut


def change(values: dict[str, float]) -> str:
    """Relative change of bits per byte, in per cent."""
    return f"{100 * (values['after'] / values['before'] - 1):+.1f} %"


def facts(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Everything but bits per byte and text, as name and value."""
    return [
        ("ALMR asked / realised", f"{report['almr']['asked']:.4f} / {report['almr']['realised']:.4f}"),
        ("layout", layout_name(report["layout"])),
        ("tokens trained", f"{report['tokens']:,}"),
        ("tokens per second", f"{report['tokens_per_second']:,.0f}"),
        ("peak memory, all processes", f"{report['peak_memory_gb']:.1f} GB"),
        ("wall time without downloads", f"{report['wall_seconds']:.0f} s"),
    ]


def show(report: dict[str, Any], console: Console) -> None:
    """The report as a table in the terminal."""
    table = Table(title="Bits per byte on held-out text (lower is better)", title_justify="left")
    for name in ("language", "before", "after", "change"):
        table.add_column(name, justify="left" if name == "language" else "right")
    for language, values in report["bits_per_byte"].items():
        table.add_row(LANGUAGES[language], f"{values['before']:.4f}", f"{values['after']:.4f}", change(values))
    console.print(table)
    for name, value in facts(report):
        console.print(f"{name:<30}{value}")
    for text in report["text"].values():
        console.print(f"\n[bold]{text['prompt']}[/bold]\n  before: {text['before']}\n  after:  {text['after']}")


def write_markdown(report: dict[str, Any], path: Path) -> None:
    lines = ["# Quickstart report", "", "| bits per byte | before | after | change |", "|---|---|---|---|"]
    for language, values in report["bits_per_byte"].items():
        lines.append(f"| {LANGUAGES[language]} | {values['before']:.4f} | {values['after']:.4f} | {change(values)} |")
    lines += ["", "| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts(report)), ""]
    lines += ["![curves](report.png)", ""]
    for text in report["text"].values():
        lines += [f"**{text['prompt']}**", "", f"- before: {text['before']}", f"- after: {text['after']}", ""]
    path.write_text("\n".join(lines), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--wall_seconds", type=float, default=0.0, help="time the steps before this one took")
    arguments = parser.parse_args()
    start = time.perf_counter()
    run: Path = arguments.run
    report = collect(run)
    report["text"] = generations(run)
    shutil.copyfile(Path(write_run_report(str(run / "checkpoints"))).with_suffix(".png"), run / "report.png")
    report["wall_seconds"] = arguments.wall_seconds + time.perf_counter() - start
    (run / "report.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    write_markdown(report, run / "report.md")
    show(report, Console(highlight=False, soft_wrap=True))
    print(f"\n{run / 'report.md'}")


if __name__ == "__main__":
    main()
