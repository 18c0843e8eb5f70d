"""What bench/gpu_session.sh has measured, in one file and as the tables of the benchmark page.

    python -m bench.gpu_session FOLDER

reads what the session's steps have left in FOLDER, writes FOLDER/gpu_session.json and prints Markdown.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_cpt.training.metrics_file import read_metrics


def collect(folder: Path) -> dict[str, Any]:
    """The results of all steps that have come to an end."""
    found: dict[str, Any] = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("speed_*.json"))}
    if (checks := folder / "check_cluster.json").exists():
        found["check_cluster"] = json.loads(checks.read_text())
    if (folder / "quickstart" / "metrics.jsonl").exists():
        found["quickstart"] = quickstart(read_metrics(str(folder / "quickstart")))
    return found


def quickstart(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Speed (tokens per second, median of the steps after the first) and validation before and after."""
    steps = [row for row in rows if "loss" in row]
    evaluations = [row["validation"] for row in rows if "validation" in row]
    return {
        "steps": len(steps),
        "tokens": steps[-1]["consumed_tokens"],
        "tokens_per_second": statistics.median(row["tokens_per_second"] for row in steps[1:]),
        "bits_per_byte": {
            name: [evaluation[name]["bits_per_byte"] for evaluation in (evaluations[0], evaluations[-1])]
            for name in evaluations[0]
        },
    }


def tables(found: Mapping[str, Any]) -> Iterator[str]:
    """Lines of Markdown."""
    checks = found.get("check_cluster", {"checks": [], "device": "no result"})
    yield from ("", f"Checks on {checks['device']}:", "", "| check | | found |", "|---|---|---|")
    yield from (f"| {row['name']} | {row['state']} | {row['said'].replace('|', '/')} |" for row in checks["checks"])
    yield from ("", "| layers | tokens per second | memory at most |", "|---|---|---|")
    for name, speed in found.items():
        if name.startswith("speed_"):
            memory = f"{speed['peak_memory_bytes'] / 1e9:.1f} GB"
            yield f"| {name.removeprefix('speed_')} | {speed['tokens_per_second_per_device']:,.0f} | {memory} |"
    if "quickstart" in found:
        run = found["quickstart"]
        yield from ("", "| the quickstart's training | |", "|---|---|")
        yield f"| {run['steps']} steps, {run['tokens']:,} tokens | {run['tokens_per_second']:,.0f} tokens per second |"
        for name, (before, after) in run["bits_per_byte"].items():
            yield f"| bits per byte, {name} | {before:.4f} -> {after:.4f} |"


def main(folder: Path) -> None:
    """Write and print."""
    found = collect(folder)
    (folder / "gpu_session.json").write_text(json.dumps(found, indent=1) + "\n")
    print("\n".join(tables(found)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
